"""The options of `stablerep evaluate`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from stablerep.evaluation.cache.files import default_cache_folder
from stablerep.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from stablerep.evaluation.fewshot import FewShotConfig
from stablerep.evaluation.geometry import NUM_SAMPLES_FOR_RANK
from stablerep.evaluation.knn import NUMBERS_OF_NEIGHBOURS
from stablerep.evaluation.linear import LinearConfig
from stablerep.evaluation.requirements import parse_requirement
from stablerep.evaluation.sets import SetOptions

ProtocolName = Literal[
    "linear", "logreg", "knn", "ridge", "fewshot", "zeroshot", "retrieval", "geometry", "robustness"
]
PROTOCOLS: tuple[str, ...] = get_args(ProtocolName)
FeatureName = Literal["cls", "patch_mean", "cls_last4", "projection"]
FEATURES: tuple[str, ...] = get_args(FeatureName)
CLASS_PROTOCOLS = ("linear", "knn", "ridge", "fewshot", "zeroshot", "robustness")
"""Those that need one class an image."""
TEXT_PROTOCOLS = ("zeroshot", "retrieval")
"""Those that need a text tower."""


@dataclass(frozen=True)
class LogregConfig:
    """Settings of the logistic regression; the 45 penalties are fixed."""

    metric: Literal["accuracy", "mean_per_class_accuracy"] = "accuracy"
    """What the penalty is chosen by; both are reported. Sets with several labels an image have mAP alone."""
    heldout_fraction: float = 0.2
    """About the share of each class on which the penalty is chosen without a validation split."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"logreg.heldout_fraction must be in (0, 1), got {self.heldout_fraction}")


@dataclass(frozen=True)
class KnnConfig:
    """Settings of the weighted k-nearest-neighbour vote."""

    k: tuple[int, ...] = NUMBERS_OF_NEIGHBOURS
    """Numbers of neighbours that vote; those above the number of training images are left out, if one is
    not."""
    temperature: float = 0.07
    """T of the weights exp(cosine / T)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise ValueError(f"knn.k must be different numbers >= 1, got {list(self.k)}")
        if self.temperature <= 0:
            raise ValueError(f"knn.temperature must be > 0, got {self.temperature}")


@dataclass(frozen=True)
class ZeroShotConfig:
    """Settings of the zero-shot classification."""

    templates: Literal["openai_80", "openai_7", "plain"] = "openai_80"
    """Prompts: OpenAI's 80 for ImageNet, its subset of 7, or "a photo of a {}." alone."""
    class_names: str | None = None
    """Text file with a name a line, in the order of the classes; null takes the set's own names."""


@dataclass(frozen=True)
class GeometryConfig:
    """Settings of the geometry's measures."""

    num_images: int = NUM_SAMPLES_FOR_RANK
    """Images of which uniformity and RankMe are, at most, >= 2; drawn by the seed. Alignment and LiDAR are of
    all."""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(f"geometry.num_images must be >= 2, got {self.num_images}")


@dataclass(frozen=True)
class RobustnessConfig:
    """Settings of the accuracy on corrupted test images."""

    corruptions: tuple[str, ...] = CORRUPTIONS
    """Which of ImageNet-C's corruptions."""
    severities: tuple[int, ...] = SEVERITIES
    """Which severities, 1 to 5."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.corruptions) - set(CORRUPTIONS)):
            raise ValueError(f"robustness.corruptions must be of {', '.join(CORRUPTIONS)}, got {unknown[0]}")
        if not self.corruptions:
            raise ValueError("robustness.corruptions must name at least one")
        if not self.severities or set(self.severities) - set(SEVERITIES):
            raise ValueError(f"robustness.severities must be of 1 to 5, got {list(self.severities)}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SetOptions):
    """What to evaluate, on what, and how."""

    checkpoint: str
    """Model: a checkpoint of `stablerep fit`, the authors' .pth, a timm name, an exported folder, hf-hub:ID,
    or open_clip:ARCHITECTURE/WEIGHTS."""
    data: str
    """Labelled set: a folder with train/ and test/ (optionally validation/) of class folders or of .tar
    shards with jpg, png or webp + cls or txt; a dataset of `stablerep generate`; torchvision:NAME; hf:ID."""
    output: str | None = None
    """Folder for the results and the report; null makes one in evaluation/ beside the checkpoint, or here."""
    overwrite: bool = False
    """Write over scores of other settings in the output folder, and over results that cannot be read or are
    of other weights, data or transform."""
    random_init: bool = False
    """Evaluate the model's architecture with fresh, seeded weights: the baseline of no training."""
    ema: bool = False
    """Evaluate the moving average of the weights (`model.optimizer.ema_decay`) in place of the weights."""
    protocols: list[ProtocolName] | Literal["all"] = field(default_factory=lambda: ["linear", "knn"])
    """Which protocols to run: linear, logreg, knn, ridge, fewshot, zeroshot, retrieval, geometry, robustness;
    all runs those that the model and the data allow."""
    features: list[FeatureName] | Literal["all"] = field(default_factory=lambda: ["cls"])
    """Features that logreg, knn, ridge, fewshot and geometry see: cls, patch_mean, cls_last4, projection; all
    takes those that the model has. The linear probe and robustness see cls."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe."""
    logreg: LogregConfig = field(default_factory=LogregConfig)
    """The logistic regression."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """The k-nearest-neighbour vote."""
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    """The few-shot episodes, drawn from the test split."""
    zeroshot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    """The zero-shot classification."""
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    """The geometry of the features."""
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    """The accuracy on corrupted test images."""
    require: list[str] = field(default_factory=list)
    """Bounds such as knn20>=0.55 or logreg.mean_per_class_accuracy>60%: exit code 1 where one is not met."""
    dry_run: bool = False
    """Print the plan, what the cache has and how long it will take, and stop."""
    cache: str | None = field(default_factory=default_cache_folder)
    """Folder that keeps features for later runs; null keeps none."""
    devices: int = 1
    """Processes that compute features, on an accelerator each, or on the CPU."""
    num_images_per_batch: int = 256
    """Images in one forward pass of a process."""
    num_workers: int | None = None
    """Processes that decode images, of each device; null takes one a CPU core, at most 8; 0 decodes in the
    main process."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model."""
    storage: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which features are kept."""
    device: str = "auto"
    """Torch device of the model and the probes; auto takes the accelerator if there is one."""
    report: bool = True
    """Write report.html beside report.md; it needs the extra `report`."""
    seed: int = 0
    """Seed of fresh weights, augmentations, initial heads, order, held-out images and corruptions."""
    error_budget_fraction: float = 0.001
    """Largest share of a split's images that may be unreadable before the evaluation stops, in [0, 1]."""

    def __post_init__(self) -> None:
        for name, known in (("protocols", PROTOCOLS), ("features", FEATURES)):
            values = getattr(self, name)
            if values != "all" and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} must be all, or different ones of {', '.join(known)}, got {values}")
        for name in ("num_images_per_batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be null or >= 0, got {self.num_workers}")
        if self.ema and self.random_init:
            raise ValueError("ema and random_init exclude each other: fresh weights have no average")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if not 0 <= self.error_budget_fraction <= 1:
            raise ValueError(f"error_budget_fraction must be in [0, 1], got {self.error_budget_fraction}")
        for text in self.require:
            parse_requirement(text)
