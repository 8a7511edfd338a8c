"""What a report says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from stablerep.evaluation.results import Provenance, Row


@dataclass(frozen=True)
class Picture:
    """A labelled image to show; it is made small for the page."""

    image: Image.Image
    name: str
    target: int


@dataclass(frozen=True)
class NeighbourRow:
    """A test image and the training images nearest to it.

    Args:
        query: The test image.
        neighbours: The nearest first.
        similarities: Cosine similarity of each.
    """

    query: Picture
    neighbours: Sequence[Picture]
    similarities: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.neighbours) != len(self.similarities) or not self.neighbours:
            raise ValueError(
                f"similarities must be as many as neighbours, {len(self.neighbours)} and >= 1, "
                f"got {len(self.similarities)}"
            )


@dataclass(frozen=True)
class ReportContent:
    """Everything that report.md and report.html say; a part that is not given is left out.

    Args:
        title: Heading.
        rows: The scores.
        provenance: Model, data, hashes and versions of the rows.
        names: The test images.
        class_names: Name of each class; empty where images have several labels or none.
        targets: Class of each test image; None where images have several labels or none.
        features: Features of the test images, for the map and the spectrum.
        feature: Which feature that is.
        neighbours: Test images with their nearest training images.
        facts: By heading (such as model, data, machine): name → value.
        settings: The settings in force, nested as they are.
        seconds: Step → seconds.
        notes: What a reader has to know beside what the rows say, a sentence or two each: unreadable images,
            a choice at the edge of its grid.
        command: The command that was run.
        seed: Of which points are drawn where there are too many.

    Shapes:
        targets [M] int, features [M, D] float.

    Raises:
        ValueError: If there is no row, or sizes contradict each other.
    """

    title: str
    rows: Sequence[Row]
    provenance: Provenance
    names: Sequence[str]
    class_names: Sequence[str] = ()
    targets: np.ndarray | None = None
    features: Tensor | None = None
    feature: str = "cls"
    neighbours: Sequence[NeighbourRow] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a report needs at least one row")
        num_classes = len(self.class_names)
        if self.targets is not None:
            if self.targets.shape != (len(self.names),):
                raise ValueError(f"targets must be [{len(self.names)}], got {list(self.targets.shape)}")
            if len(self.targets) and not 0 <= self.targets.min() <= self.targets.max() < num_classes:
                raise ValueError(
                    f"targets must be in [0, {num_classes}), got {self.targets.min()} to {self.targets.max()}"
                )
        if self.features is not None and (
            self.features.ndim != 2 or len(self.features) != len(self.names) or self.features.shape[1] == 0
        ):
            raise ValueError(f"features must be [{len(self.names)}, D], got {list(self.features.shape)}")
        for row in self.neighbours:
            for picture in (row.query, *row.neighbours):
                if not 0 <= picture.target < num_classes:
                    raise ValueError(
                        f"target of {picture.name} must be in [0, {num_classes}), got {picture.target}"
                    )
