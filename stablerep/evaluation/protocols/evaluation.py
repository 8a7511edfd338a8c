"""What the protocols have to work with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from stablerep.evaluation.cache.store import FeatureCache
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.extraction import ExtractionSettings
from stablerep.evaluation.features import Features
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

    def take(self, split: str, feature: str) -> Tensor:
        """A feature of a split, float32, on the device."""
        return self.features[split].values[feature].float().to(self.settings.device)

    def take_validation(self, feature: str) -> tuple[Tensor, Tensor] | None:
        """That of the validation split with its labels, if there is one."""
        if "validation" not in self.features:
            return None
        return self.take("validation", feature), self.features["validation"].labels.to(self.settings.device)
