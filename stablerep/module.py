"""StableRep as a LightningModule: features of all views, embeddings view by view, the multi-positive loss.

The published rule for the learning rate is blr · (captions · ranks · views / 256) · (crops / 2); a view is
one crop of one image, so lr = blr · images_per_step / 512. The published run: 43 captions · 32 ranks · 6
views = 8256 images a step, 2e-4 · 8256 / 512 = 3.225e-3.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from stablerep import distributed
from stablerep.backbones import ProjectionHead, add_backbone_to_checkpoint, build_backbone
from stablerep.losses import multi_positive_contrastive_loss, normalize_embeddings
from stablerep.stream import Batch

logger = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss or its gradient is NaN or infinite: no optimizer step is taken with it."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine to 0, per step.

    Attributes:
        base_learning_rate: blr of the published rule lr = blr · images_per_step / 512.
        learning_rate: Peak learning rate in place of the rule's.
        weight_decay: Decoupled decay of parameters with two or more dimensions; the others have none.
        betas: Decay rates of AdamW's two moments.
        num_warmup_steps: Steps of the linear warm-up.
    """

    base_learning_rate: float = 2e-4
    learning_rate: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    num_warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("base_learning_rate", "learning_rate"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if self.num_warmup_steps < 0:
            raise ValueError(f"num_warmup_steps must be >= 0, got {self.num_warmup_steps}")

    def peak_learning_rate(self, num_images_per_step: int) -> float:
        """learning_rate where given, else base_learning_rate · num_images_per_step / 512."""
        return self.learning_rate or self.base_learning_rate * num_images_per_step / 512


def learning_rate_factor(step: int, num_warmup_steps: int, num_steps: int) -> float:
    """Share of the peak at a step: (step + 1) / warm-up, then ½(1 + cos π t), 0 at num_steps."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class StableRep(pl.LightningModule):
    """min over backbone f and head h of the multi-positive loss of h(f(x)) (see `stablerep.losses`).

    Args:
        backbone: timm name of a vision transformer with a class token.
        backbone_options: Further arguments of the timm model: patch_size, embed_dim, depth, num_heads.
        image_size: Side of the square input, pixels; the data's.
        projection_hidden_features: Width of the head's two hidden layers.
        projection_out_features: Width of the embeddings.
        temperature: τ of the loss, > 0.
        optimizer: Learning rate, decay and schedule.
        num_captions_per_rank: Captions in a batch of one rank, for the learning rate; the data's.
        num_views_per_caption: Views of each caption, for the learning rate; the data's.
        compile_backbone: Run the backbone through torch.compile.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, section 3.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224",
        backbone_options: dict[str, Any] | None = None,
        image_size: int = 224,
        projection_hidden_features: int = 4096,
        projection_out_features: int = 256,
        temperature: float = 0.1,
        optimizer: OptimizerConfig = OptimizerConfig(),
        num_captions_per_rank: int = 64,
        num_views_per_caption: int = 6,
        compile_backbone: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.backbone = build_backbone(backbone, image_size, backbone_options)
        self.projection_head = ProjectionHead(
            int(self.backbone.num_features),  # type: ignore[arg-type]
            projection_hidden_features,
            projection_out_features,
        )
        self.temperature = temperature
        self.optimizer_config = optimizer
        self.num_captions_per_rank = num_captions_per_rank
        self.num_views_per_caption = num_views_per_caption
        if compile_backbone:
            self.backbone.compile()
        self.save_hyperparameters(
            {  # plain types only, so that a checkpoint loads with weights_only
                "backbone": backbone,
                "backbone_options": dict(backbone_options or {}),
                "image_size": image_size,
                "projection_hidden_features": projection_hidden_features,
                "projection_out_features": projection_out_features,
                "temperature": temperature,
                "optimizer": asdict(optimizer) | {"betas": list(optimizer.betas)},
                "num_captions_per_rank": num_captions_per_rank,
                "num_views_per_caption": num_views_per_caption,
            }
        )

    def setup(self, stage: str) -> None:
        """Synchronises BatchNorm over ranks where torch can: on accelerators."""
        if distributed.world_size() > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.projection_head = nn.SyncBatchNorm.convert_sync_batchnorm(self.projection_head)

    def forward(self, images: Tensor) -> Tensor:
        """Features: the class token after the final norm.

        Shapes:
            images [N, 3, H, W] -> [N, num_features]
        """
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch.

        Raises:
            NonFiniteLossError: Before the optimizer steps; as each rank's loss holds the embeddings of all
                ranks, they stop together.
        """
        num_captions, num_views = batch["images"].shape[:2]
        features = self(batch["images"].flatten(0, 1)).unflatten(0, (num_captions, num_views))
        embeddings = self.projection_head.project_views(features).flatten(0, 1)  # [captions · views, D]
        labels = batch["labels"].repeat_interleave(num_views)
        result = multi_positive_contrastive_loss(embeddings, labels, self.temperature)
        if not torch.isfinite(result.loss):
            raise NonFiniteLossError(
                f"loss is {result.loss.item()} at step {self.global_step} with learning rate "
                f"{self._learning_rate():.3g}: training stops before the weights are changed"
            )
        self._log_step(batch, result.loss, embeddings, labels, int(result.num_anchors_without_positive))
        return result.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the gradient, which the ranks share by now.

        Raises:
            NonFiniteLossError: Before the optimizer steps. The scaler of fp16 skips such steps by itself.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            raise NonFiniteLossError(
                f"gradient norm is {norm.item()} at step {self.global_step} with learning rate "
                f"{self._learning_rate():.3g}: training stops before the weights are changed"
            )

    def _log_step(
        self, batch: Batch, loss: Tensor, embeddings: Tensor, labels: Tensor, num_without_positive: int
    ) -> None:
        _, counts = labels.unique(return_counts=True)
        spread = normalize_embeddings(embeddings.detach()).std(dim=0).mean() * embeddings.shape[1] ** 0.5
        values: dict[str, Any] = {
            "learning_rate": self._learning_rate(),
            "positives_per_anchor": (counts * (counts - 1)).sum().float() / len(labels),
            "anchors_without_positive": float(num_without_positive),
            "embedding_std": spread,  # of unit embeddings, times √D: 1 when spread evenly, 0 when collapsed
            "images_dropped": float(batch.get("num_images_dropped", 0)),
        }
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        self.log_dict(values, batch_size=len(batch["labels"]))

    def _learning_rate(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """AdamW over two groups, and the schedule by step."""
        if (num_batches := self.trainer.accumulate_grad_batches) != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1, as the loss compares all images of a step, got "
                f"{num_batches}"
            )
        config, num_steps = self.optimizer_config, self._num_steps()
        num_ranks = distributed.world_size()
        num_images = self.num_captions_per_rank * num_ranks * self.num_views_per_caption
        peak = config.peak_learning_rate(num_images)
        logger.info(
            "%d captions x %d ranks x %d views = %d images a step; "
            "peak learning rate %.4g, %d steps, warm-up %d",
            *(self.num_captions_per_rank, num_ranks, self.num_views_per_caption, num_images, peak),
            *(num_steps, config.num_warmup_steps),
        )
        decayed, others = split_by_decay(self.parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=peak,
            betas=config.betas,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, config.num_warmup_steps, num_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _num_steps(self) -> int:
        """Optimizer steps of the run, from the config: the trainer's own estimate would build a loader."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not self.trainer.max_epochs or self.trainer.max_epochs < 0:
            raise ValueError("trainer.max_steps or trainer.max_epochs must be set: the schedule ends there")
        if self.trainer.limit_train_batches != 1.0:
            raise ValueError(
                "trainer.limit_train_batches needs trainer.max_steps, where the schedule ends, got "
                f"{self.trainer.limit_train_batches}"
            )
        return int(self.trainer.max_epochs * datamodule.num_steps_per_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses, before anything is loaded, another architecture, and options that would have no effect.

        Raises:
            ValueError: If a weight is missing, unknown or of another shape, or an option of the optimizer is
                not that of the checkpoint, whose optimizer goes on; names the first.
        """
        theirs = {name: list(value.shape) for name, value in checkpoint["state_dict"].items()}
        ours = {name: list(value.shape) for name, value in self.state_dict().items()}
        for name in [*ours, *theirs]:
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"checkpoint {self.trainer.ckpt_path} does not fit the configured model: {name} is "
                    f"{theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
                )
        before, now = checkpoint["hyper_parameters"]["optimizer"], self.hparams["optimizer"]
        for name in ("base_learning_rate", "learning_rate", "weight_decay", "betas"):
            if before[name] != now[name]:
                raise ValueError(
                    f"model.optimizer.{name} is {before[name]} in checkpoint {self.trainer.ckpt_path}, whose "
                    f"optimizer goes on, and {now[name]} here"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` reads."""
        add_backbone_to_checkpoint(checkpoint, self.backbone)


def split_by_decay(parameters: Iterator[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (two or more dimensions; class and position tokens too) and without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
