import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stablerep.callbacks import FitProgressBar, OnlineProbes, Throughput, ViewGrid, draw_grid
from stablerep.distributed.sharding import ShardedStrategy
from stablerep.flops import count_flops_per_caption
from tests.stablerep.datasets import write_image_folder
from tests.stablerep.ranks import run_on_ranks
from tests.stablerep.training import Recorder, build_batches, build_module, train, train_as_rank


def test_probes_measures_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "scenes")
    probe, recorder = OnlineProbes(str(tmp_path / "scenes"), every_n_steps=2, k=3), Recorder()
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


def test_probes_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="labelled images .*scenes/train do not exist"):
        OnlineProbes(str(tmp_path / "scenes")).setup(
            pl.Trainer(logger=False, accelerator="cpu"), build_module(), "fit"
        )


def test_probes_names_an_unreadable_image(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "scenes")
    file = sorted((tmp_path / "scenes" / "test").rglob("*.*"))[0]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file.name}: not a readable image"):
        OnlineProbes(str(tmp_path / "scenes"), k=3).setup(
            pl.Trainer(logger=False, accelerator="cpu"), build_module(), "fit"
        )


def test_probes_labels_are_those_of_train_where_a_split_lacks_a_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "scenes")
    shutil.rmtree(tmp_path / "scenes" / "test" / "circle")
    probe = OnlineProbes(str(tmp_path / "scenes"), k=3)
    probe.setup(pl.Trainer(logger=False, accelerator="cpu"), build_module(), "fit")
    assert set(probe._images["train"][1].tolist()) == {0, 1}
    assert set(probe._images["test"][1].tolist()) == {1}


def test_probes_tell_colours_apart(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 10)):
        for label, level in (("dark", 40), ("bright", 200)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng([index, level]).integers(0, 30, (16, 16, 3))
                Image.fromarray((level + noise).astype(np.uint8)).save(folder / f"{index}.png")
    recorder = Recorder()
    train(
        build_module(),
        tmp_path,
        build_batches(1),
        logger=recorder,
        callbacks=[OnlineProbes(str(tmp_path), k=5)],
    )
    assert recorder.read("knn_top1") == recorder.read("ridge_top1") == [1.0, 1.0]


def _probe_as_rank(rank: int, folder: str) -> list[float]:
    torch.manual_seed(0)
    recorder, probes = Recorder(), OnlineProbes(folder, k=3)
    options: dict[str, Any] = {"logger": recorder, "callbacks": [probes], "strategy": ShardedStrategy()}
    train_as_rank(rank, build_module(), Path(folder), build_batches(1), **options)
    return recorder.read("knn_top1") + recorder.read("ridge_top1")


@pytest.mark.distributed
def test_sharded_weights_are_probed_as_whole_ones(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    torch.manual_seed(0)
    recorder = Recorder()
    probes = OnlineProbes(str(tmp_path), k=3)
    train(build_module(), tmp_path, build_batches(1), logger=recorder, callbacks=[probes])
    before_training = recorder.read("knn_top1")[0], recorder.read("ridge_top1")[0]
    first, _ = run_on_ranks(_probe_as_rank, 2, str(tmp_path))
    assert (first[0], first[2]) == before_training


def test_speed_is_images_over_time_and_its_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(100, 1000, 10))
    monkeypatch.setattr("stablerep.callbacks.time.perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr("stablerep.callbacks.find_peak_flops", lambda *_: (1e9, "test"))
    module, recorder = build_module(), Recorder()
    train(module, tmp_path, build_batches(4), logger=recorder, log_every_n_steps=2, callbacks=[Throughput()])
    assert recorder.read("images_per_second") == [pytest.approx(2 * 12 / 10)] * 2
    expected = 2 * 4 / 10 * count_flops_per_caption(module.hparams) / 1e9
    assert recorder.read("share_of_peak") == [pytest.approx(expected)] * 2


def test_progress_bar_reads_figures_when_they_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    metrics = pl.callbacks.RichProgressBar.get_metrics

    def record(self: Any, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        read.append(trainer.global_step)
        return metrics(self, trainer, module)

    monkeypatch.setattr(pl.callbacks.RichProgressBar, "get_metrics", record)
    bar = FitProgressBar()
    options: dict[str, Any] = {"callbacks": [bar], "enable_progress_bar": True, "log_every_n_steps": 3}
    trainer = train(build_module(), tmp_path, build_batches(7), **options)
    assert set(read) <= {0, 3, 6}
    assert {3, 6} <= set(read)
    assert "loss" in bar.get_metrics(trainer, build_module())


def test_picture_shows_the_views_row_by_row(tmp_path: Path) -> None:
    batches = build_batches(3)
    pixels = torch.rand(4, 3, 3, 16, 16)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    batches[0]["images"] = (pixels - mean) / std
    logger = TensorBoardLogger(tmp_path, name="", version="")
    grid = ViewGrid(every_n_steps=2, num_captions=2, num_views=8)
    train(build_module(), tmp_path, batches, logger=logger, callbacks=[grid])
    files = sorted(path.name for path in (tmp_path / "views").iterdir())
    assert files == ["step_00000000.png", "step_00000002.png"]
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "views" / files[0])))
    assert picture.shape == (32, 48, 3)
    for row, column in ((0, 0), (1, 2)):
        view = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(2, 0, 1)
        torch.testing.assert_close(view / 255, pixels[row, column], atol=0.003, rtol=0)
    logged = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in logged.Images("views")] == [0, 2]


def test_pixels_out_of_range_are_cut() -> None:
    images = torch.tensor([-9.0, 9.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 1)
    assert draw_grid(images, (0.5,) * 3, (0.2,) * 3).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (OnlineProbes, {"data": "x", "every_n_steps": 0}, "every_n_steps must be >= 1, got 0"),
        (OnlineProbes, {"data": "x", "temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (ViewGrid, {"every_n_steps": 0}, "every_n_steps must be >= 1, got 0"),
        (ViewGrid, {"num_views": 0}, "num_views must be >= 1, got 0"),
    ],
)
def test_impossible_callback_is_refused(callback: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback(**options)
