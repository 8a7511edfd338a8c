"""Contents of small reports, for the tests of the report and of its page."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from stablerep.evaluation.reporting import NeighbourRow, Picture, ReportContent
from stablerep.evaluation.results import Provenance, Row

HOSTILE = '<img src=x onerror="throw 1"></script><script>throw 2</script>'
PROVENANCE = Provenance(
    "runs/last.ckpt",
    "/home/someone/clothing",
    "Resize(256), CenterCrop(224)",
    {"weights": "w" * 64, "data": "d" * 64, "transform": "t" * 64},
    {"torch": "2.15"},
)


def row(protocol: str = "knn20", value: float = 0.5, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "protocol": protocol,
        "metric": "accuracy",
        "value": value,
        "interval": (max(0.0, value - 0.05), min(1.0, value + 0.05)),
        "interval_method": "Wilson, 95 %",
        "n": 60,
        "selection": "none",
        "hyperparameters": {"k": 20},
        "feature": "cls",
        "seconds": 1.5,
    }
    return Row(**fields | changes)


def build_content(num_classes: int = 4, num_images: int = 60, **changes: Any) -> ReportContent:
    """A report with every part, on classes whose features are apart."""
    random = np.random.default_rng(0)
    targets = np.arange(num_images) % num_classes
    wrong = random.random(num_images) < 0.3
    predictions = np.where(wrong, (targets + 1) % num_classes, targets)
    value = float((predictions == targets).mean())
    arrays: dict[str, Any] = {"predictions": predictions, "targets": targets, "n": num_images}
    centres = torch.from_numpy(random.standard_normal((num_classes, 8)) * 3)
    names = [f"test/{index}.jpg" for index in range(num_images)]
    picture = Picture(Image.new("RGB", (40, 30), (200, 30, 30)), "test/0.jpg", 0)
    other = Picture(Image.new("L", (40, 30), 90), "train/1.jpg", 1)
    fields: dict[str, Any] = {
        "title": "last.ckpt on clothing",
        "rows": [
            row("linear_heldout", 0.85, selection="validation", seconds=40.0),
            row("linear_paper", 0.9, selection="test", hyperparameters={"views_cached": 4}, seconds=40.0),
            row(value=value, **arrays),
            row(value=value, feature="patch_mean", **arrays | {"predictions": targets}),
            row("geometry", 61.3, metric="rankme", interval=None, interval_method=""),
        ],
        "provenance": PROVENANCE,
        "names": names,
        "class_names": [f"class {index}" for index in range(num_classes - 1)] + [HOSTILE],
        "targets": targets,
        "features": centres[torch.from_numpy(targets)] + torch.from_numpy(random.random((num_images, 8))),
        "neighbours": [NeighbourRow(picture, [picture, other], [0.9, 0.8])],
        "facts": {"Data": {"num_images": {"train": 100, "test": num_images}}},
        "settings": {"knn": {"k": 20}, "note": HOSTILE},
        "seconds": {"features": 12.34},
        "notes": ["2 images could not be read."],
        "command": "stablerep evaluate --data clothing",
    }
    return ReportContent(**fields | changes)
