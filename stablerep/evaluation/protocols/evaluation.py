"""What the protocols have to work with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablerep import distributed
from stablerep.evaluation.cache.store import FeatureCache
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import Features, ViewFeatures
from stablerep.evaluation.sets import LabelledSet
from stablerep.loading import LoadedModel


@dataclass(frozen=True)
class Evaluation:
    """What protocols have to work with.

    Args:
        config: The options.
        model: The model.
        dataset: The set.
        settings: How features are computed.
        cache: Where they are kept.
        fingerprint: Of the test split, on rank 0.
        features: Of each split, on rank 0; empty elsewhere.
        feature_names: Those that the protocols on features are run for.
    """

    config: EvaluateConfig
    model: LoadedModel
    dataset: LabelledSet
    settings: ExtractionSettings
    cache: FeatureCache | None
    fingerprint: str
    features: Mapping[str, Features]
    feature_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.dataset.classes)

    @property
    def labels(self) -> Tensor:
        """Of the test images."""
        return self.features["test"].labels

    @property
    def float64_device(self) -> torch.device:
        """Where protocols in float64 compute: the device, or the CPU where the device cannot."""
        device = self.settings.device
        return device if has_float64(device) else torch.device("cpu")

    @property
    def train_groups(self) -> Tensor | None:
        """Numbers of the training images' captions, as `caption_labels`; None where no image has one."""
        train = self.features["train"]
        return train.caption_labels if any(train.caption_ids) else None

    def take(self, split: str, feature: str, device: torch.device | None = None) -> Tensor:
        """A feature of a split, float32, on the device unless another is given."""
        return self.features[split].values[feature].float().to(device or self.settings.device)

    def take_validation(self, feature: str) -> tuple[Tensor, Tensor] | None:
        """That of the validation split with its labels, if there is one, where float64 is computed."""
        if "validation" not in self.features:
            return None
        device = self.float64_device
        return self.take("validation", feature, device), self.features["validation"].labels.to(device)

    def check_images(self, split: str, found: Features | ViewFeatures | None, description: str) -> None:
        """Stops every rank where a later pass over a split is not of the images of `features`.

        Args:
            split: Which.
            found: What the pass gave on rank 0; None elsewhere.
            description: What it computed.

        Raises:
            ValueError: If an image could be read in one of the passes alone, or has changed; on every rank.
        """
        error = None if found is None else _compare_images(split, self.features[split], found, description)
        distributed.raise_together(error)


def _compare_images(
    split: str, first: Features, later: Features | ViewFeatures, description: str
) -> ValueError | None:
    if later.names != first.names:
        odd = sorted({*later.names}.symmetric_difference(first.names))
        return ValueError(f"{odd[0]}: could be read for its features or for its {description}, not for both")
    if later.digest != first.digest:
        return ValueError(f"images of {split} have changed while they were being evaluated")
    return None


def has_float64(device: torch.device) -> bool:
    """Whether it computes in float64: MPS and some others do not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True
