"""Every protocol of `stablerep evaluate` on real photographs, for four sets of weights of one architecture.

    python benchmarks/real_probe.py --checkpoint demo/stablerep/checkpoints/last.ckpt --clothing FOLDER
    python benchmarks/real_probe.py --checkpoint … --cifar10 FOLDER --num_cifar10 1000 --clothing FOLDER

    random        the checkpoint's architecture with fresh weights, seed 0
    checkpoint    its weights
    text          StableRep+, trained here: a small text tower beside configs/embedded.yaml, on the demo's
                  images or, where there are none, on some that the shipped generator makes
    supervised    the checkpoint's architecture, trained here with cross-entropy on the labelled images

FOLDER has train/ and test/ (optionally validation/) with a folder of images a class; that of CIFAR-10 may
hold train.tar.gz and test.tar.gz of `<class>/<image>` instead. Nothing is fetched. Without a folder there is
nothing to measure, and nothing is written.

Photographs have classes and no captions, so retrieval, alignment and LiDAR are measured on images that the
shipped generator makes of captions which the text weights have not seen. The linear probe is the published
protocol, a new view in every epoch, with fewer epochs on the first set of photographs; on others it is the
quick mode over cached views, which the table marks as not comparable. Each model is then compared with
another one, test image by test image (`stablerep evaluate compare`).

The supervised weights are a reference for what labels alone give in this time, not the best that they can:
AdamW (learning rate 1e-3, weight decay 0.05, batches of 128), one epoch of linear warm-up and a cosine to
zero, random resized crops (scale 0.35 to 1) and flips of images that were resized and cropped once.

Writes benchmarks/results/real_probe.{json,md}; what is in between is kept in the work folder.
"""

import hashlib
import json
import math
import random
import shlex
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
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

from data_gen.shards import list_complete_shards, read_samples
from stablerep.backbones import add_backbone_to_checkpoint, build_backbone, load_backbone
from stablerep.cli import main
from stablerep.evaluation.results import read_results
from stablerep.evaluation.sets import LabelledImage, read_labelled_set
from stablerep.loading.model import build_eval_transform
from stablerep.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
WEIGHTS = ("random", "checkpoint", "text", "supervised")
PAIRS = (("checkpoint", "random"), ("text", "random"), ("supervised", "checkpoint"))
"""Whose scores are compared, in the order of the difference."""
CAPTIONED = "generated images"
NUM_IMAGES_PER_BATCH, LEARNING_RATE, WEIGHT_DECAY, CROP_SCALE = 128, 1e-3, 0.05, (0.35, 1.0)
OPTIONS = {
    "protocols": "all",
    # The smallest class of the clothing test images has twelve.
    "fewshot.num_queries_per_class": 7,
    # All five severities would take five times as long.
    "robustness.severities": "[3]",
    "num_workers": 2,
    "report": "false",
    "device": "cpu",
}
EXACT_PROBE = {"linear.num_epochs": 20, "linear.num_views": "null"}
QUICK_PROBE = {"linear.num_epochs": 40, "linear.num_views": 4}
GENERATOR = {
    "generator.model": "embedded",
    "generator.num_inference_steps": 8,
    "generator.dtype": "bfloat16",
    "num_captions_per_shard": 64,
}
NUM_IMAGES_PER_CAPTION = 4
TEXT_TRAINING = {
    "trainer.max_steps": 150,
    "model.optimizer.num_warmup_steps": 15,
    "model.text.width": 64,
    "model.text.num_layers": 2,
    "model.text.num_heads": 2,
    "model.text.out_features": 64,
    # Captions of the scene grammar have about 25 tokens at most.
    "model.text.context_length": 32,
    "trainer.callbacks": "[]",
    "trainer.enable_progress_bar": "false",
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
    "zero-shot": ("zeroshot", "accuracy"),
    "zero-shot, top 5": ("zeroshot", "top5_accuracy"),
    "k-NN, 15 corruptions": ("robustness", "accuracy"),
    "k-NN, 14 without frost": ("robustness_without_frost", "accuracy"),
    **{
        f"{title}, recall at {k}": (f"retrieval_{direction}", f"recall@{k}")
        for title, direction in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
        for k in (1, 5, 10)
    },
    "alignment": ("geometry", "alignment"),
    "uniformity": ("geometry", "uniformity"),
    "RankMe": ("geometry", "rankme"),
    "LiDAR": ("geometry", "lidar"),
}


@dataclass(frozen=True)
class Probe:
    """One set of weights on one set of images.

    Args:
        data: Name of the images.
        weights: One of `WEIGHTS`.
        command: What was run; files and folders are written as words.
        seconds: Wall time of the command, whose features nothing had computed before.
        training: How weights that were trained here came about; None for others.
        rows: The lines of results.jsonl, without predictions.
        notes: Protocols that were left out, and why.
    """

    data: str
    weights: str
    command: str
    seconds: float
    training: dict[str, Any] | None
    rows: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class Difference:
    """Two sets of weights on the same images.

    Args:
        data: Name of the images.
        above: The weights from whose scores the others' are taken.
        below: The others.
        command: What was run.
        rows: Those of compare.json.
    """

    data: str
    above: str
    below: str
    command: str
    rows: list[dict[str, Any]]


def measure(
    checkpoint: str = "demo/stablerep/checkpoints/last.ckpt",
    cifar10: str | None = None,
    clothing: str | None = None,
    num_cifar10: int | None = None,
    shards: str = "demo/shards",
    num_epochs: int = 10,
    num_captions: int = 160,
    num_test_captions: int = 100,
    work: str = "runs/real_probe",
    seed: int = 0,
) -> None:
    """Measure and print; see the module.

    Args:
        checkpoint: Checkpoint of `stablerep fit`, such as the demo's.
        cifar10: Folder of CIFAR-10.
        clothing: Folder of the clothing photographs, or of any labelled images.
        num_cifar10: Images of CIFAR-10 in each split, as many of each class, drawn by the seed; null is all.
        shards: Dataset of `stablerep generate` for the text weights; one is made if there is none.
        num_epochs: Epochs of the supervised training.
        num_captions: Captions of that dataset, if it is made.
        num_test_captions: Captions of the images on which retrieval is measured, two images each.
        work: Folder for whatever is made: images, weights and evaluations.
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
    root = Path(shards)
    if not (root / "dataset.json").is_file():
        root = generate_images(Path(work), num_captions, NUM_IMAGES_PER_CAPTION, seed)
    captioned = generate_images(Path(work), num_test_captions, 2, seed + 1, other_than=root)
    weights = {"random": Path(checkpoint), "checkpoint": Path(checkpoint)}
    weights["text"], text_training = train_with_text(root, Path(work) / "text", seed)
    probes, differences = list[Probe](), list[Difference]()
    for name, data in sets.items():
        linear = EXACT_PROBE if not probes else QUICK_PROBE
        place = Path(work) / f"evaluation-{digest_of(str(data.resolve()))}"
        weights["supervised"] = place / "supervised.ckpt"
        training = train_supervised(data, Path(checkpoint), weights["supervised"], num_epochs, seed)
        for kind, path in weights.items():
            print(f"-- {name}, {kind}", flush=True)
            trained = {"text": text_training, "supervised": training}.get(kind)
            options = OPTIONS | linear | {"seed": seed}
            probes.append(probe(name, data, kind, path, place / kind, options, trained))
        differences += [compare(name, place, above, below) for above, below in PAIRS]
    for kind in WEIGHTS[:3]:
        print(f"-- {CAPTIONED}, {kind}", flush=True)
        protocols = "[retrieval, geometry]" if kind == "text" else "[geometry]"
        options = OPTIONS | {"protocols": protocols, "seed": seed}
        output = Path(work) / f"evaluation-{CAPTIONED.replace(' ', '-')}" / kind
        trained = text_training if kind == "text" else None
        probes.append(probe(CAPTIONED, captioned, kind, weights[kind], output, options, trained))
    commit, machine = find_commit(), describe_machine() | {"torch": torch.__version__}
    result = {
        "commit": commit,
        "machine": machine,
        "num_cifar10": num_cifar10,
        "probes": list(map(asdict, probes)),
        "differences": list(map(asdict, differences)),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_probe.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page = build_page(commit, machine, probes, differences)
    (RESULTS / "real_probe.md").write_text(page)
    print(page)


def run_verb(*words: str | Path, **options: Any) -> None:
    """Runs a verb of `stablerep`; its failure ends the script."""
    code = main([*map(str, words), *(f"--{name}={value}" for name, value in options.items())])
    if code != 0:
        raise SystemExit(code)


def digest_of(text: str) -> str:
    """Eight hexadecimal digits by which a folder tells what it was made of."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def generate_images(
    work: Path, num_captions: int, num_images_per_caption: int, seed: int, other_than: Path | None = None
) -> Path:
    """A dataset of captions of the scene grammar, none of which is in the other dataset."""
    work.mkdir(parents=True, exist_ok=True)
    drawn = work / f".captions-{seed}.txt"
    known = set[str]()
    if other_than is not None:
        shards = list_complete_shards(other_than)
        known = {sample.caption for shard in shards for sample in read_samples(shard)}
    drawn.unlink(missing_ok=True)
    # More than are wanted, of which those that are known are left out.
    run_verb("scenes", captions=drawn, num_captions=2 * num_captions, seed=seed)
    chosen = [text for text in drawn.read_text().splitlines() if text not in known][:num_captions]
    if len(chosen) < num_captions:
        raise ValueError(f"num_captions {num_captions}: {len(chosen)} captions are new, ask for fewer")
    settings = GENERATOR | {"num_images_per_caption": num_images_per_caption, "seed": seed}
    folder = work / f"generated-{digest_of(json.dumps([chosen, settings]))}"
    captions = folder.with_suffix(".txt")
    captions.write_text("".join(f"{text}\n" for text in chosen))
    run_verb("generate", captions=captions, output=folder, **settings)
    return folder


def train_with_text(shards: Path, folder: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """Trains StableRep+ anew; its checkpoint, and the command and seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    configs = ("--config=configs/embedded.yaml", "--config=configs/overlay_text.yaml")
    options = TEXT_TRAINING | {"seed_everything": seed}
    start = time.perf_counter()
    run_verb("fit", *configs, **{"data.root": shards, "output": folder}, **options)
    words = shlex.join([*configs, *(f"--{name}={value}" for name, value in options.items())])
    training = {
        "command": f"stablerep fit --data.root SHARDS {words}",
        "num_captions": sum(shard.num_samples for shard in list_complete_shards(shards)),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return folder / "checkpoints" / "last.ckpt", training


def prepare_cifar10(folder: Path, num_images: int | None, work: Path, seed: int) -> Path:
    """The folder itself, or one in `work` with the chosen images as links or unpacked."""
    packed = (folder / "train.tar.gz").is_file()
    if num_images is None and not packed:
        return folder
    listed = [folder / f"{split}.tar.gz" for split in ("train", "test")] if packed else folder.glob("*/*")
    facts = sorted(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in listed)
    source = digest_of(json.dumps([str(folder.resolve()), facts]))
    target = work / f"cifar10-{num_images or 'all'}-{seed}-{source}"
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
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
    name: str,
    data: Path,
    weights: str,
    path: Path,
    output: Path,
    options: Mapping[str, Any],
    training: dict[str, Any] | None,
) -> Probe:
    """One column of a table: evaluates, and reads what came out."""
    words = [f"--{option}={value}" for option, value in options.items()]
    words += ["--random_init"] if weights == "random" else []
    start = time.perf_counter()
    run_verb(
        *("evaluate", f"--checkpoint={path}", f"--data={data}", f"--output={output}"),
        *("--cache=null", "--overwrite", *words),
    )
    seconds = time.perf_counter() - start
    results = read_results(output)
    rows = [
        {
            field: getattr(row, field)
            for field in ("protocol", "metric", "feature", "value", "interval", "n", "selection", "seconds")
        }
        | {"hyperparameters": dict(row.hyperparameters)}
        for row in results.rows
    ]
    named = f"{weights}.ckpt" if training else "CHECKPOINT"
    command = f"stablerep evaluate --checkpoint={named} --data={shlex.quote(name)} --cache=null"
    # Files are written as words, so that no folder of this machine is published.
    told = json.loads((output / "run.json").read_text())["notes"]
    notes = [note.replace(str(path), named).replace(str(data), name) for note in told]
    return Probe(name, weights, f"{command} {shlex.join(words)}", round(seconds, 1), training, rows, notes)


def compare(name: str, place: Path, above: str, below: str) -> Difference:
    """Two columns of a table, test image by test image."""
    output = place / f"{above}-{below}"
    run_verb("evaluate", "compare", place / above, place / below, output=output)
    content = json.loads((output / "compare.json").read_text())
    return Difference(
        name, above, below, f"stablerep evaluate compare {above} {below}", content["comparisons"]
    )


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


def find_commit() -> str:
    """The commit of this checkout, marked where files differ from it; where git does not tell, that."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def build_page(
    commit: str, machine: dict[str, Any], probes: Sequence[Probe], differences: Sequence[Difference]
) -> str:
    """The tables as Markdown: a column a set of weights, a row a protocol."""
    parts = [
        f"Commit {commit}; {machine['processor']}, {machine['num_cores']} cores, "
        f"{machine['num_threads']} threads, torch {machine['torch']}. Accuracies and recalls in %, with 95 % "
        "intervals over test images (few-shot: over episodes)."
    ]
    for name in dict.fromkeys(found.data for found in probes):
        found = [each for each in probes if each.data == name]
        num_test = next(row["n"] for row in found[0].rows if row["metric"] == "rankme")
        parts += [f"## {name}, {num_test:,} test images", build_table(found)]
        parts += [f"{each.weights}: {describe_training(each.training)}" for each in found if each.training]
        notes = dict.fromkeys(note for each in found for note in each.notes)
        parts.append("\n".join(f"- {note}" for note in notes))
        compared = [each for each in differences if each.data == name]
        if compared:
            parts.append(
                "Differences in points, image by image: 95 % of a paired bootstrap, and McNemar's exact p. "
                "Each is taken by itself: of twenty without any true difference one shows p < 0.05."
            )
            parts.append(build_table_of_differences(compared))
        commands = [*(each.command for each in found), *(each.command for each in compared)]
        parts.append("\n".join(f"    {command}" for command in commands))
    return "\n\n".join(part for part in parts if part) + "\n"


def describe_training(training: Mapping[str, Any]) -> str:
    """One line of weights that were trained here."""
    if "command" in training:
        return f"{training['num_captions']:,} captions, {training['seconds']:.0f} s; `{training['command']}`"
    return (
        f"{training['num_images']:,} training images, {training['num_epochs']} epochs in "
        f"{training['seconds']:.0f} s; its own classifier: "
        f"{100 * training['accuracy_of_its_own_classifier']:.1f} %"
    )


def describe_linear(probes: Sequence[Probe]) -> str:
    """What the linear probe of a set of images saw."""
    rows = [row for each in probes for row in each.rows if row["protocol"].startswith("linear_")]
    if not rows:
        return ""
    settings = rows[0]["hyperparameters"]
    views = settings["views_cached"]
    if views is None:
        return f" ({settings['num_epochs']} epochs of new views, published: 90)"
    return f" ({settings['num_epochs']} epochs over {views} cached views: not comparable)"


def build_table(probes: Sequence[Probe]) -> str:
    """One set of images."""
    lines = [f"| | {' | '.join(each.weights for each in probes)} |", "|---|" + "---|" * len(probes)]
    for title, (protocol, metric) in COLUMNS.items():
        cells = [find_cell(each, protocol, metric) for each in probes]
        if any(cells):
            shown = title + (describe_linear(probes) if title.startswith("linear") else "")
            lines.append(f"| {shown} | {' | '.join(cells)} |")
    lines.append(f"| seconds | {' | '.join(f'{each.seconds:.0f}' for each in probes)} |")
    return "\n".join(lines)


def build_table_of_differences(differences: Sequence[Difference]) -> str:
    """One set of images, a column a pair of weights."""
    names = " | ".join(f"{each.above} − {each.below}" for each in differences)
    lines = [f"| | {names} |", "|---|" + "---|" * len(differences)]
    for title, key in COLUMNS.items():
        cells = [
            next(
                (describe_difference(row) for row in each.rows if (row["protocol"], row["metric"]) == key), ""
            )
            for each in differences
        ]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_difference(row: Mapping[str, Any]) -> str:
    """A difference with its interval and p; empty where the images cannot be paired."""
    if row["interval"] is None:
        return ""
    value, low, high = (
        f"{100 * number:.1f}".replace("-", "−") for number in (row["difference"], *row["interval"])
    )
    test = f", p {row['mcnemar']['p_value']:.2g}" if row["mcnemar"] else ""
    return f"{value} ({low} to {high}){test}"


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
