"""Every protocol of `stablerep evaluate` on real photographs, for three sets of weights of one architecture.

    python benchmarks/real_probe.py --checkpoint demo/stablerep/checkpoints/last.ckpt --clothing FOLDER
    python benchmarks/real_probe.py --checkpoint … --cifar10 FOLDER --num_cifar10 2000

    random        the checkpoint's architecture with fresh weights, seed 0
    checkpoint    its weights
    supervised    the same architecture, trained here with cross-entropy on the labelled training images alone

FOLDER has train/ and test/ (optionally validation/) with a folder of images a class; that of CIFAR-10 may
hold train.tar.gz and test.tar.gz of `<class>/<image>` instead. Nothing is fetched. Without a folder there is
nothing to measure, and nothing is written.

The supervised weights are a reference for what labels alone give in this time, not the best that they can:
AdamW (learning rate 1e-3, weight decay 0.05, batches of 128), one epoch of linear warm-up and a cosine to
zero, random resized crops (scale 0.35 to 1) and flips of images that were resized and cropped once.

Writes benchmarks/results/real_probe.{json,md}; what is in between is kept in the work folder.
"""

import json
import math
import os
import platform
import random
import shlex
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from stablerep.backbones import add_backbone_to_checkpoint, build_backbone, load_backbone
from stablerep.cli import main
from stablerep.evaluation.transforms import build_eval_transform
from stablerep.evaluation.results import read_results
from stablerep.evaluation.sets import LabelledImage, read_labelled_set

RESULTS = Path(__file__).parent / "results"
WEIGHTS = ("random", "checkpoint", "supervised")
NUM_IMAGES_PER_BATCH, LEARNING_RATE, WEIGHT_DECAY, CROP_SCALE = 128, 1e-3, 0.05, (0.35, 1.0)
OPTIONS = {
    "protocols": "all",
    "linear.num_epochs": 40,
    "linear.num_views": 4,
    # The smallest class of the clothing test images has twelve.
    "fewshot.num_queries_per_class": 7,
    # All five severities would take five times as long.
    "robustness.severities": "[3]",
    "num_workers": 2,
    "report": "false",
    "device": "cpu",
}
COLUMNS = {
    "linear, held-out": ("linear_heldout", "accuracy"),
    "linear, on test": ("linear_paper", "accuracy"),
    "linear after BN, held-out": ("linear_bn_heldout", "accuracy"),
    "logistic regression": ("logreg", "accuracy"),
    "its mean per class": ("logreg", "mean_per_class_accuracy"),
    "k-NN, k = 10": ("knn10", "accuracy"),
    "k-NN, k = 20": ("knn20", "accuracy"),
    "k-NN, k = 100": ("knn100", "accuracy"),
    "k-NN, k = 200": ("knn200", "accuracy"),
    "ridge": ("ridge", "accuracy"),
    "few-shot, 5-way 5-shot": ("fewshot_5way_5shot", "accuracy"),
    "k-NN, 15 corruptions": ("robustness", "accuracy"),
    "uniformity": ("geometry", "uniformity"),
    "RankMe": ("geometry", "rankme"),
}


@dataclass(frozen=True)
class Probe:
    """One set of weights on one set of images.

    Args:
        data: Name of the images.
        weights: One of `WEIGHTS`.
        command: What was run; files and folders are written as words.
        seconds: Wall time of the command, whose features nothing had computed before.
        supervised: How the supervised weights were trained; None for others.
        rows: The lines of results.jsonl, without predictions.
        notes: Protocols that were left out, and why.
    """

    data: str
    weights: str
    command: str
    seconds: float
    supervised: dict[str, Any] | None
    rows: list[dict[str, Any]]
    notes: list[str]


def measure(
    checkpoint: str = "demo/stablerep/checkpoints/last.ckpt",
    cifar10: str | None = None,
    clothing: str | None = None,
    num_cifar10: int | None = None,
    num_epochs: int = 15,
    work: str = "runs/real_probe",
    seed: int = 0,
) -> None:
    """Measure and print; see the module.

    Args:
        checkpoint: Checkpoint of `stablerep fit`, such as the demo's.
        cifar10: Folder of CIFAR-10.
        clothing: Folder of the clothing photographs, or of any labelled images.
        num_cifar10: Images of CIFAR-10 in each split, as many of each class, drawn by the seed; null is all.
        num_epochs: Epochs of the supervised training.
        work: Folder for unpacked images, supervised weights and the evaluations.
        seed: Of every draw.
    """
    sets = {}
    if cifar10 is not None:
        sets["CIFAR-10"] = prepare_cifar10(Path(cifar10), num_cifar10, Path(work), seed)
    if clothing is not None:
        sets["clothing"] = Path(clothing)
    if not sets:
        print("real_probe: nothing to measure: --cifar10 FOLDER and --clothing FOLDER name real images")
        return
    probes = []
    for name, data in sets.items():
        for weights in WEIGHTS:
            print(f"-- {name}, {weights}", flush=True)
            probes.append(probe(name, data, weights, Path(checkpoint), Path(work), num_epochs, seed))
    machine = describe_machine()
    result = {"machine": machine, "num_cifar10": num_cifar10, "probes": list(map(asdict, probes))}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_probe.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / "real_probe.md").write_text(build_page(machine, probes))
    print(build_page(machine, probes))


def prepare_cifar10(folder: Path, num_images: int | None, work: Path, seed: int) -> Path:
    """The folder itself, or one in `work` with the chosen images as links or unpacked."""
    packed = (folder / "train.tar.gz").is_file()
    if num_images is None and not packed:
        return folder
    target = work / f"cifar10-{num_images or 'all'}-{seed}"
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    for split in ("train", "test"):
        if packed:
            with tarfile.open(folder / f"{split}.tar.gz") as tar:
                members = {m.name.removeprefix("./"): m for m in tar.getmembers() if m.isreg()}
                chosen = {members[name].name for name in choose_images(sorted(members), num_images, seed)}
                tar.extractall(
                    partial / split, [m for m in members.values() if m.name in chosen], filter="data"
                )
            continue
        names = [path.relative_to(folder / split).as_posix() for path in (folder / split).glob("*/*")]
        for name in choose_images(sorted(names), num_images, seed):
            link = partial / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / split / name).resolve())
    partial.rename(target)
    return target


def choose_images(names: Sequence[str], num_images: int | None, seed: int) -> list[str]:
    """As many `<class>/<image>` of each class, `num_images` in all; None takes every one.

    Raises:
        ValueError: If a class has too few, or the number is none that the classes can share.
    """
    if num_images is None:
        return list(names)
    classes: dict[str, list[str]] = {}
    for name in names:
        classes.setdefault(name.partition("/")[0], []).append(name)
    share, rest = divmod(num_images, len(classes))
    if rest or not 1 <= share <= min(map(len, classes.values())):
        raise ValueError(
            f"num_cifar10 must be a multiple of {len(classes)} and <= "
            f"{len(classes) * min(map(len, classes.values()))}, got {num_images}"
        )
    draw = random.Random(seed)
    return [name for members in classes.values() for name in sorted(draw.sample(members, share))]


def probe(
    name: str, data: Path, weights: str, checkpoint: Path, work: Path, num_epochs: int, seed: int
) -> Probe:
    """One row of the table: trains where it has to, evaluates, and reads what came out."""
    place = work / data.resolve().name
    supervised = None
    path = checkpoint
    if weights == "supervised":
        path = place / "supervised.ckpt"
        supervised = train_supervised(data, checkpoint, path, num_epochs, seed)
    output = place / weights
    options = OPTIONS | {"seed": seed}
    words = [f"--{option}={value}" for option, value in options.items()]
    words += ["--random_init"] if weights == "random" else []
    start = time.perf_counter()
    code = main(
        [
            *("evaluate", f"--checkpoint={path}", f"--data={data}", f"--output={output}"),
            *("--cache=null", "--overwrite", *words),
        ]
    )
    seconds = time.perf_counter() - start
    if code != 0:
        raise SystemExit(code)
    results = read_results(output)
    rows = [
        {
            field: getattr(row, field)
            for field in ("protocol", "metric", "feature", "value", "interval", "n", "selection", "seconds")
        }
        | {"hyperparameters": dict(row.hyperparameters)}
        for row in results.rows
    ]
    named = "supervised.ckpt" if supervised else "CHECKPOINT"
    command = f"stablerep evaluate --checkpoint {named} --data {name} --cache null {shlex.join(words)}"
    # Files are written as words, so that no folder of this machine is published.
    notes = [
        note.replace(str(path), named) for note in json.loads((output / "run.json").read_text())["notes"]
    ]
    return Probe(name, weights, command, round(seconds, 1), supervised, rows, notes)


def train_supervised(data: Path, like: Path, path: Path, num_epochs: int, seed: int) -> dict[str, Any]:
    """Trains the checkpoint's architecture with cross-entropy; writes its weights.

    Returns:
        Seconds, steps, and the accuracy of the trained classifier itself on the test images.
    """
    labelled = read_labelled_set(data)
    torch.manual_seed(seed)
    shape: Any = load_backbone(like, random_init=True)
    backbone: Any = build_backbone(shape.architecture, shape.image_size, shape.backbone_options)
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, len(labelled.classes)))
    start = time.perf_counter()
    pixels, labels = load_images(labelled.train, backbone.image_size)
    steps_per_epoch = len(pixels) // NUM_IMAGES_PER_BATCH
    num_steps = num_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / steps_per_epoch, 0.5 * (1 + math.cos(math.pi * step / num_steps))),
    )
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(backbone.image_size, scale=CROP_SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    for _ in tqdm(range(num_epochs), desc="supervised", unit=" epochs", leave=False):
        for chosen in torch.randperm(len(pixels)).split(NUM_IMAGES_PER_BATCH)[:steps_per_epoch]:
            views = torch.stack([augment(pixels[index]) for index in chosen])
            loss = F.cross_entropy(model(normalise(views, backbone)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    pixels, labels = load_images(labelled.test, backbone.image_size)
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(normalise(part, backbone)).argmax(dim=1) for part in pixels.split(256)])
    content = {"state_dict": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}}
    add_backbone_to_checkpoint(content, backbone)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return {
        "num_images": len(labelled.train),
        "num_epochs": num_epochs,
        "num_steps": num_steps,
        "seconds": round(seconds, 1),
        "accuracy_of_its_own_classifier": float((answers == labels).double().mean()),
    }


def load_images(images: Sequence[LabelledImage], size: int) -> tuple[Tensor, Tensor]:
    """Decoded once, as evaluation shows them: uint8 [N, 3, size, size], and the labels [N]."""
    transform = build_eval_transform(size)
    pixels = [decode(image, transform) for image in tqdm(images, desc="images", leave=False)]
    return torch.stack(pixels), torch.tensor([image.label for image in images])


def decode(image: LabelledImage, transform: v2.Transform) -> Tensor:
    """One image through the evaluation transform."""
    picture: Image.Image = image.decode(image.read_bytes())
    pixels: Tensor = transform(picture)
    return pixels


def normalise(pixels: Tensor, backbone: Any) -> Tensor:
    """uint8 images as the backbone takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    return (pixels.float() / 255 - mean) / std


def describe_machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def build_page(machine: dict[str, Any], probes: Sequence[Probe]) -> str:
    """The tables as Markdown: a column a set of weights, a row a protocol."""
    parts = [
        f"{machine['processor']}, {machine['num_cores']} cores, {machine['num_threads']} threads, "
        f"torch {machine['torch']}. Accuracies in %, with 95 % intervals over test images (few-shot: over "
        "episodes)."
    ]
    for name in dict.fromkeys(found.data for found in probes):
        found = [each for each in probes if each.data == name]
        num_test = max(row["n"] for row in found[0].rows if row["protocol"] == "knn20")
        parts += [f"## {name}, {num_test:,} test images", build_table(found)]
        for each in found:
            if each.supervised:
                parts.append(
                    f"supervised: {each.supervised['num_images']:,} training images, "
                    f"{each.supervised['num_epochs']} epochs in {each.supervised['seconds']:.0f} s; its own "
                    f"classifier: {100 * each.supervised['accuracy_of_its_own_classifier']:.1f} %"
                )
        notes = dict.fromkeys(note for each in found for note in each.notes)
        parts.append("\n".join(f"- {note}" for note in notes))
        parts.append("\n".join(f"    {each.command}" for each in found))
    return "\n\n".join(parts) + "\n"


def build_table(probes: Sequence[Probe]) -> str:
    """One set of images."""
    lines = [f"| | {' | '.join(each.weights for each in probes)} |", "|---|" + "---|" * len(probes)]
    for title, (protocol, metric) in COLUMNS.items():
        cells = [find_cell(each, protocol, metric) for each in probes]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append(f"| seconds | {' | '.join(f'{each.seconds:.0f}' for each in probes)} |")
    return "\n".join(lines)


def find_cell(probe: Probe, protocol: str, metric: str) -> str:
    """A score with its interval; empty where there is none."""
    for row in probe.rows:
        if (row["protocol"], row["metric"]) == (protocol, metric):
            if protocol == "geometry":
                return f"{row['value']:.2f}".replace("-", "−")
            text = f"{100 * row['value']:.1f}"
            if row["interval"]:
                low, high = row["interval"]
                text += f" ({100 * low:.1f} to {100 * high:.1f})"
            return text
    return ""


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
