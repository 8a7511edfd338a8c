"""StableRep as a LightningModule: features of all views, their embeddings, the losses on them, the optimizer.

    images ─▶ backbone ─▶ features ─┬─▶ projection_head ─▶ embeddings ─▶ image_loss_weight · image loss
                                    └─▶ text_head ◀─ text_tower ◀─ captions: text.loss_weight · text loss

What is compared with StableRep goes through the same module, and so shares all else:

    objective        text   image_loss_weight   data.positives   positives of an image
    stablerep        -      1                   caption          the other images of its caption
    stablerep_plus   yes    1                   caption          these, and the caption
    simclr           -      1                   image            the other crops of the image: NT-Xent
    supcon           -      1                   class            the images of its class
    clip             yes    0                   caption          the caption, with one view of each
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stablerep import distributed
from stablerep.backbones import (
    ProjectionHead,
    ProjectionNorm,
    add_backbone_to_checkpoint,
    build_backbone,
)
from stablerep.collapse import embedding_std, positives_per_anchor, rank_me
from stablerep.distributed.sharding import shard, whole
from stablerep.losses import multi_positive_contrastive_loss
from stablerep.memory import EmbeddingMemory
from stablerep.micro_batches import run_in_parts
from stablerep.optimizer import (
    PUBLISHED_OPTIMIZER,
    OptimizerConfig,
    Schedule,
    split_by_decay,
    update_average,
)
from stablerep.runs.finite import FiniteWatch
from stablerep.text import ImageTextHead, TextConfig, Tokenizer, build_text_tower

logger = logging.getLogger(__name__)

_SCHEDULE_KEY = "stablerep_schedule"

Objective = Literal["stablerep", "stablerep_plus", "simclr", "supcon", "clip"]
Positives = Literal["caption", "image", "class"]


class StableRep(pl.LightningModule):
    """min over backbone f and heads of w1 · image loss + w2 · text loss of f(x) (see `stablerep.losses`).

    Args:
        backbone: timm name of a vision transformer with a class token.
        backbone_options: Further arguments of the timm model: patch_size, embed_dim, depth, num_heads,
            drop_path_rate.
        image_size: Side of the square input, pixels; the data's.
        projection_hidden_features: Width of the head's two hidden layers.
        projection_out_features: Width of the embeddings.
        projection_norm: Norm of the head's hidden layers (see `ProjectionHead`).
        temperature: τ of the image loss, > 0.
        image_loss_weight: w1, the weight of the image loss, >= 0; 0 trains CLIP and needs `text`.
        queue_size: Embeddings of earlier steps that the image loss compares with too, >= 0; 0 is off. For
            batches that memory keeps small.
        text: The text tower of StableRep+ and CLIP; null is none.
        optimizer: Learning rate, decay, schedule, clipping and averaging of the weights.
        num_captions_per_microbatch: Captions whose activations are in memory at a time, >= 1: the backbones
            run once more in the backward, and the gradient stays that of the whole batch. Null is all.
        gradient_checkpointing: Keep the activations of one transformer block at a time instead, likewise
            computed again.
        compile_backbone: Run the backbone through torch.compile.
        num_captions_per_rank: Captions in a batch of one rank, for the learning rate; the data's.
        num_views_per_caption: Views of each caption, >= 2 (1 for CLIP); the data's.
        positives: What the labels of the batch tell apart; the data's.

    Raises:
        ValueError: If an option is out of its bound, or two contradict each other.

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
        projection_norm: ProjectionNorm = "batchnorm_per_view",
        temperature: float = 0.1,
        image_loss_weight: float = 1.0,
        queue_size: int = 0,
        text: TextConfig | None = None,
        optimizer: OptimizerConfig = PUBLISHED_OPTIMIZER,
        num_captions_per_microbatch: int | None = None,
        gradient_checkpointing: bool = False,
        compile_backbone: bool = False,
        num_captions_per_rank: int = 64,
        num_views_per_caption: int = 6,
        positives: Positives = "caption",
    ) -> None:
        super().__init__()
        # as a checkpoint holds them
        text = TextConfig(**text) if isinstance(text, Mapping) else text
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, Mapping) else optimizer
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if queue_size < 0:
            raise ValueError(f"queue_size must be >= 0, got {queue_size}")
        if num_captions_per_microbatch is not None and num_captions_per_microbatch < 1:
            raise ValueError(f"num_captions_per_microbatch must be >= 1, got {num_captions_per_microbatch}")
        self.objective = find_objective(
            image_loss_weight, text is not None, positives, num_views_per_caption, queue_size
        )
        self.backbone = build_backbone(backbone, image_size, backbone_options)
        num_features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.projection_head: ProjectionHead | None = None
        if image_loss_weight:
            self.projection_head = ProjectionHead(
                num_features, projection_hidden_features, projection_out_features, projection_norm
            )
        self.queue = EmbeddingMemory(queue_size, projection_out_features) if queue_size else None
        self.text_tower: nn.Module | None = None
        self.text_head: ImageTextHead | None = None
        if text is not None:
            self.text_tower = build_text_tower(text)
            self.text_head = ImageTextHead(num_features, text)
            self._tokenize = Tokenizer(text.context_length)
        self.ema_backbone: nn.Module | None = None
        if optimizer.ema_decay is not None:
            self.ema_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        if gradient_checkpointing:
            for tower in (self.backbone, self.text_tower):
                if tower is not None:
                    tower.set_grad_checkpointing(True)  # type: ignore[operator]
        if compile_backbone:
            self.backbone.compile()
        self.temperature = temperature
        self.image_loss_weight = image_loss_weight
        self.optimizer_config = optimizer
        self.num_captions_per_microbatch = num_captions_per_microbatch
        self.num_captions_per_rank = num_captions_per_rank
        self.num_views_per_caption = num_views_per_caption
        self.schedule = Schedule()
        self._resumed_schedule: Schedule | None = None
        self.finite_watch = FiniteWatch()
        # The queue is the same on every rank as it is; DDP would send it from the first rank at each step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers() if name.startswith("queue.")]
        )
        self.save_hyperparameters(
            {  # plain types only, so that a checkpoint loads with weights_only
                "backbone": backbone,
                "backbone_options": dict(backbone_options or {}),
                "image_size": image_size,
                "projection_hidden_features": projection_hidden_features,
                "projection_out_features": projection_out_features,
                "projection_norm": projection_norm,
                "temperature": temperature,
                "image_loss_weight": image_loss_weight,
                "queue_size": queue_size,
                "text": None if text is None else text.to_plain(),
                "optimizer": optimizer.to_plain(),
                "num_captions_per_microbatch": num_captions_per_microbatch,
                "gradient_checkpointing": gradient_checkpointing,
                "num_captions_per_rank": num_captions_per_rank,
                "num_views_per_caption": num_views_per_caption,
                "positives": positives,
            }
        )

    def setup(self, stage: str) -> None:
        """Synchronises BatchNorm over ranks where torch can: on accelerators.

        Raises:
            ValueError: If BatchNorm would see one caption alone.
        """
        num_captions = self.num_captions_per_rank
        if distributed.world_size() > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.synchronize_batchnorm()
            num_captions *= distributed.world_size()
        heads = (self.projection_head, self.text_head)
        if num_captions < 2 and any(_has_batchnorm(head) for head in heads if head is not None):
            raise ValueError(
                "num_captions_per_rank must be >= 2 where BatchNorm is over a rank's captions, "
                f"got {self.num_captions_per_rank}; model.projection_norm layernorm needs no other captions"
            )

    def synchronize_batchnorm(self) -> None:
        """Lets the heads' BatchNorm take its statistics over all ranks."""
        for name in ("projection_head", "text_head"):
            if (head := getattr(self, name)) is not None:
                setattr(self, name, nn.SyncBatchNorm.convert_sync_batchnorm(head))

    def configure_model(self) -> None:
        """Splits the weights over the ranks, where the trainer's strategy is the sharded one."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        parts = (self.backbone, self.projection_head, self.text_tower, self.text_head, self.ema_backbone)
        for part in parts:
            if part is not None:
                shard(part, mesh)

    def forward(self, images: Tensor) -> Tensor:
        """Features: the class token after the final norm.

        Shapes:
            images [N, 3, H, W] -> [N, num_features]
        """
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one batch (see `stablerep.data.stream`).

        Raises:
            NonFiniteLossError: On a CPU; elsewhere the backward comes first. As each rank's loss holds the
                embeddings of all ranks, they stop together.
            ValueError: If a text tower finds no captions.
        """
        tokens = self._read_tokens(batch)  # on the host, while the device is still at the step before
        num_captions, num_views = batch["images"].shape[:2]
        features = self._run(self.backbone, batch["images"].flatten(0, 1), num_views)
        features = features.unflatten(0, (num_captions, num_views))
        losses, embeddings = [], features
        if tokens is not None:
            text_loss, embeddings = self._text_loss(features, tokens, batch["labels"])
            losses.append(text_loss)
        if self.projection_head is not None:
            embeddings = self.projection_head(features).flatten(0, 1)  # [captions · views, D]
            losses.append(self._image_loss(embeddings, batch["labels"].repeat_interleave(num_views)))
        loss = torch.stack(losses).sum()
        self.finite_watch.watch("loss", loss, self.global_step, self._learning_rate())
        if self._is_log_step():
            self._log_step(batch, loss, embeddings.detach())
        if self.queue is not None:
            self.queue.push(embeddings, batch["labels"].repeat_interleave(num_views))
        return loss

    def _run(self, tower: nn.Module, rows: Tensor, num_rows_per_caption: int) -> Tensor:
        """The tower's output, in micro-batches where they are asked for."""
        num_captions = self.num_captions_per_microbatch
        return run_in_parts(
            tower, rows, None if num_captions is None else num_captions * num_rows_per_caption
        )

    def _image_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        queue = None if self.queue is None else self.queue.read()
        result = multi_positive_contrastive_loss(embeddings, labels, self.temperature, queue)
        if self._is_log_step():
            num_lonely = result.num_anchors_without_positive.float()
            self._log_mean("image_loss", result.loss)
            self.log("anchors_without_positive", num_lonely, batch_size=1, sync_dist=True, reduce_fx="sum")
        return self.image_loss_weight * result.loss

    def _text_loss(self, features: Tensor, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted image–text loss, and the projected images [captions · views, D]."""
        assert self.text_tower is not None
        assert self.text_head is not None
        result = self.text_head(features, self._run(self.text_tower, tokens, 1), labels)
        if self._is_log_step():
            self._log_mean("text_loss", result.loss.loss)
            self.log("logit_scale", result.scale.detach(), batch_size=1)
        return self.text_head.loss_weight * result.loss.loss, result.images

    def _read_tokens(self, batch: dict[str, Any]) -> Tensor | None:
        """The captions' tokens on the device."""
        if self.text_tower is None:
            return None
        captions = batch.get("captions") or [""] * len(batch["labels"])
        if num_empty := sum(not caption for caption in captions):
            raise ValueError(
                f"model.text needs the caption of each image, {num_empty} of {len(captions)} have none"
            )
        tokens = self._tokenize(captions)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the gradient, which the ranks share by now, and cuts it where it is too long.

        Raises:
            NonFiniteLossError: If the step's loss is not finite, or a gradient: on a CPU this step's,
                elsewhere that of the step before. The scaler of fp16 skips such steps by itself.
        """
        self.finite_watch.settle()  # not earlier: an accelerator has this step's backward to do meanwhile
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self.finite_watch.watch("gradient norm", norm, self.global_step, self._learning_rate())
        if (limit := self.optimizer_config.max_gradient_norm) is not None:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        if self._is_log_step():
            self.log("gradient_norm", norm, batch_size=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step; then what follows from the new weights."""
        super().optimizer_step(*args, **kwargs)
        if self.text_head is not None:
            self.text_head.clamp_logit_scale()
        if self.ema_backbone is not None and self.optimizer_config.ema_decay is not None:
            update_average(self.ema_backbone, self.backbone, self.optimizer_config.ema_decay)

    def _is_log_step(self) -> bool:
        """Whether Lightning writes this step's figures: only then are they computed."""
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return (self.global_step + 1) % every == 0

    def _log_mean(self, name: str, loss: Tensor) -> None:
        """A loss of the whole step, which is the mean over ranks."""
        self.log(name, loss.detach(), batch_size=1, sync_dist=True)

    def _log_step(self, batch: dict[str, Any], loss: Tensor, embeddings: Tensor) -> None:
        self.finite_watch.settle()  # what follows has no answer for embeddings that are not finite
        labels = batch["labels"].repeat_interleave(batch["images"].shape[1])
        labels = distributed.all_gather_rows(labels, distributed.gather_sizes(len(labels), labels.device))
        queue = None if self.queue is None else self.queue.read()
        values: dict[str, Any] = {
            "learning_rate": self._learning_rate(),
            "positives_per_anchor": positives_per_anchor(labels, None if queue is None else queue.labels),
            "embedding_std": embedding_std(embeddings),
            "rank_me": rank_me(embeddings),
            "captions_dropped": float(sum(batch.get("num_dropped", ()))),  # and replaced by others
        }
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        self.log_dict(values, batch_size=1)

    def _learning_rate(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """AdamW over two groups, and the schedule by step."""
        if (num_batches := self.trainer.accumulate_grad_batches) != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1, as the loss compares all images of a step, got "
                f"{num_batches}; model.num_captions_per_microbatch saves memory instead"
            )
        config = self.optimizer_config
        num_steps, is_by_epochs = self._find_end()
        num_steps_per_epoch = self._num_steps_per_epoch()
        num_ranks = distributed.world_size()
        num_images = self.num_captions_per_rank * num_ranks * self.num_views_per_caption
        self.schedule = Schedule(
            peak=config.peak_learning_rate(num_images),
            num_warmup_steps=config.count_warmup_steps(num_steps_per_epoch),
            num_steps=num_steps,
            num_steps_per_epoch=num_steps_per_epoch if is_by_epochs else None,
        )
        logger.info(
            "%s: %d captions x %d ranks x %d views = %d images a step; %d steps, warm-up %d, %d images seen",
            *(self.objective, self.num_captions_per_rank, num_ranks, self.num_views_per_caption, num_images),
            *(num_steps, self.schedule.num_warmup_steps, num_steps * num_images),
        )
        logger.info("peak learning rate %s", config.explain_peak(num_images))
        decayed, others = split_by_decay(self.parameters())
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.schedule.peak,
            betas=config.betas,
            # With a scaler, fused AdamW would unscale within the step, after the norm was taken.
            fused=self.trainer.strategy.root_device.type == "cuda" and not has_scaler,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Goes on in the schedule where the data do, if a step or an epoch has another size than before."""
        before, self._resumed_schedule = self._resumed_schedule, None
        if before is None:
            return
        self.schedule = self.schedule.resume(before, self.global_step)
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [self.schedule.peak for _ in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["initial_lr"] = self.schedule.peak
            group["lr"] = self.schedule.peak * self.schedule.factor(scheduler.last_epoch)
        if self.schedule != before:
            logger.info(
                "step %d stands at %d of the schedule's %d, learning rate %.4g",
                *(self.global_step, self.global_step + self.schedule.num_skipped_steps),
                *(self.schedule.num_steps, self._learning_rate()),
            )

    def _find_end(self) -> tuple[int, bool]:
        """Optimizer steps of the run, and whether its epochs end it rather than `max_steps`.

        From the config: the trainer's own estimate would build a loader.
        """
        max_steps, max_epochs = self.trainer.max_steps, self.trainer.max_epochs or -1
        num_steps_per_epoch = self._num_steps_per_epoch()
        if max_epochs < 0 or num_steps_per_epoch is None:
            if max_steps < 0:
                raise ValueError(
                    "trainer.max_steps or trainer.max_epochs must be set: the schedule ends there"
                )
            return max_steps, False
        num_steps = max_epochs * num_steps_per_epoch
        if 0 <= max_steps < num_steps:
            return max_steps, False
        if max_steps < 0 and self.trainer.limit_train_batches != 1.0:
            raise ValueError(
                "trainer.limit_train_batches needs trainer.max_steps, where the schedule ends, got "
                f"{self.trainer.limit_train_batches}"
            )
        return num_steps, True

    def _num_steps_per_epoch(self) -> int | None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        return None if datamodule is None else int(datamodule.num_steps_per_epoch)

    def on_train_end(self) -> None:
        """Looks at the last step's loss and gradient too."""
        self.finite_watch.settle()

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
        if (schedule := checkpoint.get(_SCHEDULE_KEY)) is not None:
            self._resumed_schedule = Schedule(**schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` reads.

        Raises:
            NonFiniteLossError: If the step before was not finite: then nothing is saved.
        """
        self.finite_watch.settle()
        add_backbone_to_checkpoint(checkpoint, self.backbone)
        checkpoint[_SCHEDULE_KEY] = asdict(self.schedule)


def _has_batchnorm(head: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in head.modules())


def find_objective(
    image_loss_weight: float,
    has_text: bool,
    positives: Positives,
    num_views_per_caption: int,
    queue_size: int,
) -> Objective:
    """The name of what is trained (see the table at the head of this module).

    Raises:
        ValueError: If the settings contradict each other, or leave nothing to learn from.
    """
    if not image_loss_weight >= 0:
        raise ValueError(f"image_loss_weight must be >= 0, got {image_loss_weight}")
    if not image_loss_weight and not has_text:
        raise ValueError("image_loss_weight must be > 0 without a text tower, got 0.0")
    if not image_loss_weight and queue_size:
        raise ValueError(f"queue_size must be 0 where image_loss_weight is 0, got {queue_size}")
    if has_text and positives != "caption":
        raise ValueError(f"data.positives must be caption with a text tower, got {positives}")
    least = 2 if image_loss_weight else 1
    if num_views_per_caption < least:
        raise ValueError(f"num_views_per_caption must be >= {least}, got {num_views_per_caption}")
    if has_text:
        return "stablerep_plus" if image_loss_weight else "clip"
    return {"caption": "stablerep", "image": "simclr", "class": "supcon"}[positives]  # type: ignore[return-value]
