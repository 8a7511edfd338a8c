"""The probes against scikit-learn on real features, and the memory of the k-NN search.

    python benchmarks/probes.py --data FOLDER                          features of a random ViT-S
    python benchmarks/probes.py --data FOLDER --checkpoint last.ckpt   features of a checkpoint
    python benchmarks/probes.py --data FOLDER --features features.safetensors    read if there, else written

FOLDER has train/, validation/ and test/ with a folder of images a class.

Logistic regression: 45 λ chosen on validation, a refit on train and validation, the score on test, in ours
and in scikit-learn's `LogisticRegression` (lbfgs, C = 1/(nλ), the same standardised features, of equal
validation accuracies the largest λ). Both stop where the gradient is within the same tolerance; scikit-learn
is given the iterations that this takes, and in a row of its own its default of 100, where it stops early.
Each turn is a process of its own, the sides take turns, a ratio is that of two neighbours. Seconds are wall
time from the features to the predictions.

k-NN: 50,000 × 10,000 features of width 384, k up to 200: the peak of memory above what the inputs take.

Writes benchmarks/results/{name}.{json,md}.
"""

import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from jsonargparse import auto_cli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from stablerep.backbones import build_backbone, load_backbone
from stablerep.evaluation.knn import NUMBERS_OF_NEIGHBOURS, knn_classify_by_k
from stablerep.evaluation.logreg import PENALTIES, logistic_regression
from stablerep.loading.model import EvaluationTransform, InputFormat
from stablerep.machine import describe_processor

RESULTS = Path(__file__).parent / "results"
SPLITS = ("train", "validation", "test")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
KNN_SIZE = {"num_train": 50_000, "num_test": 10_000, "width": 384}
Features = dict[str, Tensor]


def fit_ours(features: Features, tolerance: float) -> dict[str, Any]:
    """The protocol by the library."""
    result = logistic_regression(
        features["train"],
        features["train_labels"],
        features["test"],
        num_classes=int(features["train_labels"].max()) + 1,
        validation=(features["validation"], features["validation_labels"]),
        tolerance=tolerance,
    )
    return {
        "penalty": result.penalty,
        "predictions": result.predictions.tolist(),
        "validation_accuracies": list(result.validation_scores),
        "num_iterations": [*result.num_iterations, result.refit_num_iterations],
        "num_converged": sum(result.converged) + result.refit_converged,
    }


def fit_scikit_learn(features: Features, tolerance: float, max_iterations: int = 100_000) -> dict[str, Any]:
    """The protocol by scikit-learn."""
    arrays = {name: tensor.numpy() for name, tensor in features.items()}
    iterations: list[int] = []
    num_converged = 0

    def fit(x: np.ndarray, y: np.ndarray, penalty: float) -> LogisticRegression:
        nonlocal num_converged
        model = LogisticRegression(C=1 / (len(x) * penalty), tol=tolerance, max_iter=max_iterations)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y)
        num_converged += not any(issubclass(each.category, ConvergenceWarning) for each in caught)
        iterations.append(int(model.n_iter_[0]))
        return model

    train, validation = arrays["train"].astype(np.float64), arrays["validation"].astype(np.float64)
    scaler = StandardScaler().fit(train)
    x, held_out = scaler.transform(train), scaler.transform(validation)
    accuracies = [
        float(fit(x, arrays["train_labels"], penalty).score(held_out, arrays["validation_labels"]))
        for penalty in PENALTIES
    ]
    penalty = max(zip(accuracies, PENALTIES, strict=True))[1]
    both = np.concatenate([train, validation])
    labels = np.concatenate([arrays["train_labels"], arrays["validation_labels"]])
    scaler = StandardScaler().fit(both)
    model = fit(scaler.transform(both), labels, penalty)
    return {
        "penalty": penalty,
        "predictions": model.predict(scaler.transform(arrays["test"].astype(np.float64))).tolist(),
        "validation_accuracies": accuracies,
        "num_iterations": iterations,
        "num_converged": num_converged,
    }


def fit_scikit_learn_by_default(features: Features, tolerance: float) -> dict[str, Any]:
    """The protocol by scikit-learn, each fit given up after 100 iterations."""
    return fit_scikit_learn(features, tolerance, max_iterations=100)


SIDES: dict[str, Callable[[Features, float], dict[str, Any]]] = {
    "ours": fit_ours,
    "scikit-learn": fit_scikit_learn,
    "scikit-learn, 100 iterations": fit_scikit_learn_by_default,
}


def measure(
    data: str,
    checkpoint: str | None = None,
    features: str | None = None,
    tolerances: tuple[float, ...] = (1e-5,),
    num_repeats: int = 3,
    num_threads: int = 1,
    name: str = "probes",
) -> None:
    """Measure and print; see the module.

    Args:
        data: Folder of labelled images with train/, validation/ and test/.
        checkpoint: Checkpoint that `stablerep fit` wrote; a seeded random ViT-S if not given.
        features: File of the features, so that they need not be computed again.
        tolerances: Largest entry of the gradient. At scikit-learn's default of 1e-4 its fits at small λ are
            still so far from the minimum that some validation images change class.
        num_repeats: Turns of each side.
        num_threads: Of each side; threads that wait for each other burn processor time.
        name: Name of the result files.
    """
    values, source = read_features(data, checkpoint, features)
    os.environ.update(dict.fromkeys(_THREADS, str(num_threads)))  # which the processes of the sides inherit
    rows = []
    for tolerance in tolerances:
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(num_repeats):
            for side, taken in turns.items():
                taken.append(run_alone(_fit, side, values, tolerance))
                print(f"{side}: {taken[-1]['seconds']:.1f} s", flush=True)
        rows.append({"tolerance": tolerance, "turns": turns})
    result = {
        "processor": describe_processor(),
        "num_threads": num_threads,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "features": source,
        "num_images": {split: len(values[split]) for split in SPLITS},
        "width": values["train"].shape[1],
        "num_classes": int(values["train_labels"].max()) + 1,
        "test_labels": values["test_labels"].tolist(),
        "logistic_regression": rows,
        "knn": {**KNN_SIZE, **run_alone(_search_neighbours)},
    }
    table = build_table(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


def read_features(data: str, checkpoint: str | None, file: str | None) -> tuple[Features, str]:
    """Features and labels of each split, and what they come from."""
    weights = f"checkpoint {Path(checkpoint).name}" if checkpoint else "random vit_small_patch16_224, seed 0"
    source = f"{Path(data).resolve().name}, {weights}"
    if file is not None and Path(file).exists():
        with safe_open(file, framework="pt") as tensors:
            if tensors.metadata() != {"source": source}:
                raise ValueError(f"{file} must hold the features of {source}, got {tensors.metadata()}")
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, source  # noqa: SIM118
    torch.manual_seed(0)
    backbone: Any = load_backbone(checkpoint) if checkpoint else build_backbone("vit_small_patch16_224", 224)
    backbone.eval()
    values: Features = {}
    for split in SPLITS:
        values[split], values[f"{split}_labels"] = _extract(backbone, Path(data) / split)
    if file is not None:
        save_file(values, file, metadata={"source": source})
    return values, source


@torch.no_grad()
def _extract(backbone: Any, folder: Path) -> tuple[Tensor, Tensor]:
    transform = EvaluationTransform(InputFormat(backbone.image_size, backbone.mean, backbone.std))
    images = ImageFolder(str(folder), transform, loader=Image.open)
    loader = DataLoader(images, batch_size=64, num_workers=1)
    batches = [(backbone(images), labels) for images, labels in tqdm(loader, desc=folder.name, leave=False)]
    return torch.cat([values for values, _ in batches]), torch.cat([labels for _, labels in batches])


def run_alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return result


def _serve(sender: Any, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    sender.send(function(*arguments))


def _fit(side: str, features: Features, tolerance: float) -> dict[str, Any]:
    small = {key: value[:: 1 + len(value) // 300] for key, value in features.items()}
    fit_ours(small, 1.0)  # what is set up once
    fit_scikit_learn(small, 1.0)
    start, start_processor = time.perf_counter(), time.process_time()
    result = SIDES[side](features, tolerance)
    seconds = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - start_processor,
    }
    return {**seconds, **result}


def _search_neighbours() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(KNN_SIZE["num_train"], KNN_SIZE["width"], generator=generator)
    test = torch.randn(KNN_SIZE["num_test"], KNN_SIZE["width"], generator=generator)
    labels = torch.arange(len(train)) % 10
    knn_classify_by_k(train[:500], labels[:500], test[:10], num_classes=10)  # what is set up once
    before = _read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    knn_classify_by_k(train, labels, test, num_classes=10)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": _read_status("VmHWM") - before}


def _read_status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def describe(row: dict[str, Any], side: str, labels: list[int]) -> str:
    """One row of the table; the ratio is that of this side to ours."""
    ours, turns = row["turns"]["ours"], row["turns"][side]
    accuracies = [float(np.mean(np.array(each["predictions"]) == labels)) for each in (turns[0], ours[0])]
    same = sum(
        a == b
        for a, b in zip(turns[0]["validation_accuracies"], ours[0]["validation_accuracies"], strict=True)
    )
    cells = [
        side,
        f"{row['tolerance']:g}",
        f"{turns[0]['penalty']:.3g}",
        f"{100 * accuracies[0]:.2f} %",
        f"{100 * (accuracies[0] - accuracies[1]):+.2f}",
        f"{same} of {len(PENALTIES)}",
        f"{turns[0]['num_converged']} of {len(PENALTIES) + 1}",
        f"{sum(turns[0]['num_iterations']):,}",
    ]
    for figure in ("seconds", "processor_seconds"):
        spent, least = ([turn[figure] for turn in each] for each in (turns, ours))
        ratios = [a / b for a, b in zip(spent, least, strict=True)]
        cells += [
            f"{statistics.median(spent):.2f}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        ]
    return "| " + " | ".join(cells) + " |"


def build_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes = ", ".join(f"{result['num_images'][split]:,} {split}" for split in SPLITS)
    knn = result["knn"]
    head = (
        f"Logistic regression, 45 λ and a refit: features of {result['features']}; {sizes} images, "
        f"{result['width']} features, {result['num_classes']} classes; {result['processor']}, "
        f"{result['num_threads']} threads, torch {result['torch']}, "
        f"scikit-learn {result['scikit-learn']}.\n\n"
        "| | tolerance | chosen λ | test accuracy | points above ours | λ with our validation accuracy | "
        "fits converged | iterations | seconds | to ours | processor seconds | to ours |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        describe(row, side, result["test_labels"])
        for row in result["logistic_regression"]
        for side in row["turns"]
    ]
    largest = max(NUMBERS_OF_NEIGHBOURS)
    tail = (
        f"\nk-NN, {knn['num_train']:,} × {knn['num_test']:,} features of width {knn['width']}, "
        f"k up to {largest}: {knn['bytes'] / 2**20:,.0f} MiB above the inputs, {knn['seconds']:.1f} s; "
        f"all similarities at once would take {knn['num_train'] * knn['num_test'] * 4 / 2**20:,.0f} MiB.\n"
    )
    return head + "\n".join(rows) + "\n" + tail


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
