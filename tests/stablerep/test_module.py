import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from stablerep.backbones import load_backbone
from stablerep.callbacks import OnlineKNN, Throughput
from stablerep.checkpoint import AtomicCheckpointIO
from stablerep.module import (
    NonFiniteLossError,
    OptimizerConfig,
    StableRep,
    learning_rate_factor,
    split_by_decay,
)
from tests.stablerep.datasets import write_image_folder
from tests.stablerep.test_losses import naive_loss


def build_module(**options: Any) -> StableRep:
    defaults: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2},
        "image_size": 16,
        "projection_hidden_features": 16,
        "projection_out_features": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-3, num_warmup_steps=2),
        "num_captions_per_rank": 4,
        "num_views_per_caption": 3,
    }
    return StableRep(**(defaults | options))


def build_batches(num_batches: int = 6) -> list[dict[str, Any]]:
    return [
        {"images": torch.randn(4, 3, 3, 16, 16), "labels": torch.arange(4), "captions": list("abcd")}
        for _ in range(num_batches)
    ]


class Loader(torch.utils.data.Dataset[Any]):
    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


def train(module: StableRep, folder: Path, batches: list[dict[str, Any]], **options: Any) -> pl.Trainer:
    """Fits with as many steps as batches; the batches are in memory, so Lightning's advice does not apply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|smaller than the logging)")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")  # inside Lightning
        trainer = pl.Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            max_steps=len(batches),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[AtomicCheckpointIO()],
            **({"logger": False} | options),
        )
        trainer.fit(module, torch.utils.data.DataLoader(Loader(batches), batch_size=None))
    return trainer


def test_published_rule_gives_the_published_learning_rate() -> None:
    assert OptimizerConfig().peak_learning_rate(43 * 32 * 6) == pytest.approx(3.225e-3)
    assert OptimizerConfig(learning_rate=0.5).peak_learning_rate(8256) == 0.5


def test_schedule_is_linear_warm_up_then_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 4, 12) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 13):
        assert factors[step] == pytest.approx((1 + math.cos(math.pi * (step - 4) / 8)) / 2)
    assert factors[12] == pytest.approx(0)


def test_biases_and_norms_alone_are_not_decayed() -> None:
    module = build_module()
    decayed, others = split_by_decay(module.parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(p)] for p in others} == {
        n for n, p in module.named_parameters() if n.endswith("bias") or ("norm" in n) or p.ndim == 1
    }
    assert {"backbone.cls_token", "backbone.pos_embed"} <= {names[id(p)] for p in decayed}
    assert len(decayed) + len(others) == len(list(module.parameters()))


def test_loss_of_a_step_is_the_papers_formula_on_the_heads_output(tmp_path: Path) -> None:
    module = build_module()
    batches = build_batches(1)
    losses: list[Tensor] = []
    module.log = lambda name, value, **_: losses.append(value) if name == "loss" else None  # type: ignore[method-assign]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    reference = build_module()
    reference.load_state_dict(module.state_dict())
    train(module, tmp_path, batches)
    images = batches[0]["images"]
    views = [reference.projection_head(reference.backbone(images[:, view])) for view in range(3)]
    expected = naive_loss(torch.cat(views), torch.arange(4).repeat(3), 0.1)
    torch.testing.assert_close(losses[0], expected.detach(), atol=1e-5, rtol=1e-5)


def test_non_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    module = build_module()
    batches = build_batches(3)
    batches[1]["images"][0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 1 with learning rate 0\.001"):
        train(module, tmp_path, batches)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    module = build_module()
    weight = next(parameter for parameter in module.backbone.parameters() if parameter.ndim > 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is (nan|inf) at step 0 with learning rate"):
        train(module, tmp_path, build_batches())
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_checkpoint_of_a_run_gives_back_the_trained_backbone(tmp_path: Path) -> None:
    module = build_module()
    trainer = train(module, tmp_path, build_batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_backbone(tmp_path / "a.ckpt")(images), module.eval()(images))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]  # nothing temporary is left


def test_failed_save_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fill_the_disk(checkpoint: Any, file: Any) -> None:
        file.write(b"half a check")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_checkpoint_from_the_web_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint must be a local file"):
        AtomicCheckpointIO().load_checkpoint("https://example.org/a.ckpt")


class Recorder(pl.loggers.Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def test_online_knn_measures_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "scenes")
    probe, recorder = OnlineKNN(str(tmp_path / "scenes"), every_n_steps=2, k=3), Recorder()
    module = build_module()
    train(
        module,
        tmp_path,
        build_batches(5),
        logger=recorder,
        log_every_n_steps=1,
        callbacks=[Throughput(), probe],
    )
    measured = [(step, row["knn_top1"]) for step, row in recorder.rows if "knn_top1" in row]
    assert [step for step, _ in measured] == [0, 2, 4, 5]
    assert all(0 <= value <= 1 for _, value in measured)
    assert module.backbone.training
    logged = set().union(*(row for _, row in recorder.rows))
    assert {"loss", "learning_rate", "images_per_second", "positives_per_anchor", "embedding_std"} <= logged
    assert [row["positives_per_anchor"] for _, row in recorder.rows if "loss" in row] == [2.0] * 5


def test_online_knn_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="labelled images .*scenes/train do not exist"):
        OnlineKNN(str(tmp_path / "scenes")).setup(
            pl.Trainer(logger=False, accelerator="cpu"), build_module(), "fit"
        )


def test_online_knn_names_an_unreadable_image(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "scenes")
    file = sorted((tmp_path / "scenes" / "test").rglob("*.*"))[0]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file.name}: not a readable image"):
        OnlineKNN(str(tmp_path / "scenes"), k=3).setup(
            pl.Trainer(logger=False, accelerator="cpu"), build_module(), "fit"
        )


def test_online_knn_labels_are_those_of_train_where_a_split_lacks_a_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "scenes")
    shutil.rmtree(tmp_path / "scenes" / "test" / "circle")
    probe = OnlineKNN(str(tmp_path / "scenes"), k=3)
    probe.setup(pl.Trainer(logger=False, accelerator="cpu"), build_module(), "fit")
    assert set(probe._images["train"][1].tolist()) == {0, 1}
    assert set(probe._images["test"][1].tolist()) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"num_warmup_steps": -1}, "num_warmup_steps must be >= 0, got -1"),
    ],
)
def test_impossible_optimizer_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        build_module(temperature=0.0)
