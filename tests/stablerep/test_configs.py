"""Every shipped config of `stablerep fit`: its arithmetic, its model at its own size, a scaled-down step."""

import csv
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stablerep.backbones import load_backbone
from stablerep.cli import main
from stablerep.module import StableRep
from stablerep.optimizer import OptimizerConfig
from stablerep.text import TextConfig
from tests.stablerep.datasets import encode_noise, write_dataset, write_image_folder
from tests.stablerep.training import Recorder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NAMES = {path.stem for path in CONFIGS.glob("*.yaml") if not path.name.startswith("generate_")}
OVERLAYS = sorted(name for name in NAMES if name.startswith("overlay_"))
RECIPES = sorted(NAMES - set(OVERLAYS))
BASE = "cc12m_vitb16_1x"
LOGGERS = ["overlay_mlflow", "overlay_wandb"]
MODELS = [[name] for name in RECIPES] + [[BASE, name] for name in OVERLAYS if name not in LOGGERS]
STEPS = [names for names in MODELS if names[-1] != "overlay_sharded"]
TIMEOUT_SECONDS = 240

PUBLISHED_EPOCHS = {
    "cc12m_vitb16_1x": (15, 0.5),
    "cc12m_vitb16_2x": (31, 1.0),
    "cc12m_vitb16_3x": (46, 1.5),
    "redcaps_vitb16_1x": (13, 0.45),
    "redcaps_vitb16_2x": (27, 0.9),
    "redcaps_vitb16_3x": (40, 1.35),
}
SMALL = [
    *("--data.num_captions_per_rank", "4", "--data.image_size", "32", "--data.num_workers", "0"),
    *("--model.backbone_options", "{patch_size: 8, depth: 1, embed_dim: 16, num_heads: 2}"),
    *("--model.projection_hidden_features", "16"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.max_steps", "1"),
]
SMALL_TEXT = [
    *("--model.text.width", "16", "--model.text.num_layers", "1", "--model.text.num_heads", "2"),
    *("--model.text.out_features", "8", "--model.text.context_length", "16"),
]


def read(names: list[str]) -> dict[str, Any]:
    """The files' values, those of later files in the place of earlier ones."""
    values: dict[str, Any] = {}
    for name in names:
        merge(values, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    return values


def merge(values: dict[str, Any], later: dict[str, Any]) -> None:
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def read_comment(name: str) -> str:
    """The text above a config, its line breaks gone."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.strip("# ") for line in lines if line.startswith("#"))


def count_images(values: dict[str, Any]) -> tuple[int, int, int]:
    """Captions of a rank, ranks, views."""
    data, trainer = values["data"], values["trainer"]
    num_ranks = trainer["devices"] * trainer.get("num_nodes", 1)
    return data["num_captions_per_rank"], num_ranks, data["num_views_per_caption"]


@pytest.mark.parametrize("names", [[name] for name in RECIPES] + [[BASE, name] for name in OVERLAYS])
def test_arithmetic_in_the_comment_is_what_the_config_sets(names: list[str]) -> None:
    comment, values = read_comment(names[-1]), read(names)
    if "Arithmetic: that of the config before it" in comment:
        assert count_images(values) == count_images(read(names[:1]))
        return
    found = re.findall(r"(\d+) captions x (\d+) ranks? x (\d+) views = (\d+) images a step", comment)
    captions, ranks, views = count_images(values)
    num_images = captions * ranks * views
    assert found == [tuple(map(str, (captions, ranks, views, num_images)))]
    for images, rate in re.findall(r"2e-4 \* (\d+) / 512 = (\d[\d.e-]*\d)", comment):
        assert int(images) == num_images
        assert float(rate) == pytest.approx(OptimizerConfig().peak_learning_rate(num_images))


@pytest.mark.parametrize("name", RECIPES)
def test_length_in_the_comment_is_what_the_config_sets(name: str) -> None:
    comment, values = read_comment(name), read([name])
    captions, ranks, views = count_images(values)
    trainer = values["trainer"]
    if (num_steps := trainer.get("max_steps", -1)) > 0:
        assert f"{num_steps} steps see {num_steps * captions * ranks * views:,} images" in comment
        return
    epochs = trainer["max_epochs"]
    known = re.search(r"on ([\d,]+) captions of LAION", comment)
    if known is None:
        assert f"Of N captions, floor(N / {captions * ranks}) steps are an epoch" in comment
        assert f"{epochs} epochs see at most {epochs * views} N images" in comment
        return
    steps = int(known[1].replace(",", "")) // (captions * ranks)
    assert (
        f"{known[1]} captions are {steps} steps an epoch; {epochs} epochs are {steps * epochs} steps"
        in comment
    )
    assert f"see {steps * epochs * captions * ranks * views:,} images" in comment


@pytest.mark.parametrize("name", PUBLISHED_EPOCHS)
def test_published_recipes_have_the_published_settings(name: str) -> None:
    values = read([name])
    epochs, warmup = PUBLISHED_EPOCHS[name]
    optimizer = values["model"]["optimizer"]
    assert (values["trainer"]["max_epochs"], optimizer["num_warmup_epochs"]) == (epochs, warmup)
    assert count_images(values) == (43, 32, 6)
    assert (optimizer["betas"], optimizer["weight_decay"]) == ([0.9, 0.98], 0.1)
    assert OptimizerConfig(**optimizer).peak_learning_rate(43 * 32 * 6) == pytest.approx(3.225e-3)
    assert values["model"]["temperature"] == 0.1


@pytest.mark.parametrize("names", MODELS, ids="+".join)
def test_model_of_each_config_can_be_built_at_its_own_size(names: list[str]) -> None:
    values = read(names)
    model, data = values["model"], values["data"]
    if model.get("text") is not None:
        model["text"] = TextConfig(**model["text"])
    model["optimizer"] = OptimizerConfig(**model["optimizer"])
    shared = {key: data[key] for key in ("num_captions_per_rank", "num_views_per_caption", "positives")}
    with torch.device("meta"):
        module = StableRep(**model, **shared, image_size=data["image_size"])
        images = torch.zeros(2, 3, data["image_size"], data["image_size"])
    assert module(images).shape == (2, module.backbone.num_features)
    expected = {"overlay_clip": "clip", "overlay_simclr": "simclr", "overlay_supcon": "supcon"}
    default = "stablerep_plus" if "text" in names[-1] else "stablerep"
    assert module.objective == expected.get(names[-1], default)


def test_recipe_table_names_every_config() -> None:
    text = (CONFIGS / "README.md").read_text()
    missing = [path.name for path in CONFIGS.glob("*.yaml") if f"`{path.name}`" not in text]
    assert not missing
    named = set(re.findall(r"`([a-z0-9_]+\.yaml)`", text))
    assert {name for name in named if not (CONFIGS / name).exists()} == {"config.yaml"} & named


def write_labelled_tar(root: Path) -> None:
    """Eight images in two classes, as WebDataset has them."""
    root.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for index in range(8):
            members = {"jpg": encode_noise(rng, 32), "cls": str(index % 2).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{index:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Options that point a config at data of this test."""
    write_dataset(tmp_path / "shards", [8, 8], num_images=6, size=32)
    write_image_folder(tmp_path / "labelled", num_images=10, size=32)
    return [
        *("--data.root", str(tmp_path / "shards"), "--trainer.callbacks.k", "5"),
        *("--trainer.callbacks.data", str(tmp_path / "labelled"), "--output", str(tmp_path / "run")),
    ]


def command(names: list[str], *options: str) -> list[str]:
    """`stablerep fit` on the configs, scaled down."""
    configs = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    text = SMALL_TEXT if read(names)["model"].get("text") else []
    return ["fit", *configs, *SMALL, *text, *options]


@pytest.mark.e2e
@pytest.mark.parametrize("names", STEPS, ids="+".join)
def test_one_step_of_each_config_runs(names: list[str], folders: list[str], tmp_path: Path) -> None:
    options = list(folders)
    if names[-1] == "overlay_supcon":
        write_labelled_tar(tmp_path / "tars")
        options += ["--data.root", str(tmp_path / "tars")]
    assert main(command(names, *options)) == 0
    run = tmp_path / "run"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for figure in ("loss", "learning_rate", "knn_top1", "ridge_top1", "images_per_second", "share_of_peak"):
        assert any(row[figure] for row in rows), figure
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "views" / "step_00000000.png").exists()
    backbone = load_backbone(run / "checkpoints" / "last.ckpt")
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


@pytest.mark.parametrize("name", LOGGERS)
def test_config_of_another_logger_is_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command([BASE, name], "--print_config")) == 0
    (logger,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]
    assert logger == {"class_path": logger["class_path"], "init_args": logger["init_args"]}
    expected = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]["logger"][0]
    assert logger["class_path"] == expected["class_path"]
    assert expected["init_args"].items() <= logger["init_args"].items()


class KeptRecorder(Recorder):
    """Keeps the last one that was made."""

    last: "KeptRecorder"

    def __init__(self) -> None:
        super().__init__()
        KeptRecorder.last = self


@pytest.mark.e2e
def test_another_logger_stands_beside_csv_and_tensorboard(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "logger.yaml").write_text(f"trainer: {{logger: [{{class_path: {__name__}.KeptRecorder}}]}}")
    assert main([*command([BASE], *folders), "--config", str(tmp_path / "logger.yaml")]) == 0
    assert len(KeptRecorder.last.read("loss")) == 1
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.mark.e2e
@pytest.mark.distributed
def test_sharded_config_trains_on_two_ranks(folders: list[str], tmp_path: Path) -> None:
    words = command([BASE, "overlay_text", "overlay_sharded"], *folders, "--trainer.devices", "2")
    result = subprocess.run(
        [sys.executable, "-m", "stablerep.cli", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert "stablerep_plus: 4 captions x 2 ranks x 6 views = 48 images a step" in result.stderr
    assert load_backbone(tmp_path / "run" / "checkpoints" / "last.ckpt").image_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.image_loss_weight", "0"], "image_loss_weight must be > 0 without a text tower, got 0.0"),
        (
            ["--model.text.width", "16", "--data.positives", "image"],
            "data.positives must be caption with a text",
        ),
        (["--model.backbone", "resnet18"], "backbone resnet18 "),
        (["--model.backbone", "vit_base_patch16_gap_224"], "does not pool a class token"),
        (["--model.temperature", "0"], "temperature must be > 0, got 0.0"),
        (["--data.num_views_per_caption", "1"], "num_views_per_caption must be >= 2, got 1"),
        (["--model.num_captions_per_microbatch", "0"], "num_captions_per_microbatch must be >= 1, got 0"),
        (["--model.optimizer.num_warmup_steps", "3"], "num_warmup_epochs must be 0 where num_warmup_steps"),
    ],
)
def test_contradiction_gets_one_line(
    options: list[str], message: str, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = command([BASE], *folders)
    if "resnet18" in options:
        small += ["--model.backbone_options", "{}"]
    if "vit_base_patch16_gap_224" in options:
        small += ["--model.backbone_options", "{depth: 1}"]
    assert main([*small, *options]) == 1
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("stablerep fit: error: ")
    assert message in last_line
