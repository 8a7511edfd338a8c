"""benchmarks/real_probe.py on a labelled set of its own making."""

import importlib.util
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stablerep.evaluation.config import PROTOCOLS
from stablerep.evaluation.sets import read_labelled_set
from tests.stablerep.models import save_checkpoint

WriteFolders = Callable[..., Path]


@pytest.fixture
def real_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "real_probe.py"
    specification = importlib.util.spec_from_file_location("real_probe", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(__import__("sys").modules, "real_probe", module)
    specification.loader.exec_module(module)
    module.RESULTS = tmp_path / "results"  # type: ignore[attr-defined]
    return module


def test_images_are_drawn_alike_of_each_class_whether_packed_or_not(
    real_probe: ModuleType, write_folders: WriteFolders, tmp_path: Path
) -> None:
    folders = write_folders(train=8, test=5)
    packed = tmp_path / "packed"
    packed.mkdir()
    for split in ("train", "test"):
        with tarfile.open(packed / f"{split}.tar.gz", "w:gz") as tar:
            tar.add(folders / split, ".")
    drawn = []
    for name, folder in (("a", folders), ("b", packed)):
        chosen = real_probe.prepare_cifar10(folder, 9, tmp_path / name, 0)
        images = read_labelled_set(chosen)
        assert set(Counter(image.label for image in images.train).values()) == {3}
        drawn.append([(image.name, image.read_bytes()) for image in (*images.train, *images.test)])
    assert drawn[0] == drawn[1]
    (half,) = (path for path in (tmp_path / "a").iterdir())
    half.rename(half.with_name(f".{half.name}.partial"))  # as a run leaves it that was interrupted
    again = real_probe.prepare_cifar10(folders, 9, tmp_path / "a", 0)
    assert [image.name for image in read_labelled_set(again).train] == [name for name, _ in drawn[0][:9]]
    assert real_probe.prepare_cifar10(packed, 9, tmp_path / "a", 0) != again
    other = real_probe.prepare_cifar10(folders, 9, tmp_path / "a", 1)
    assert [image.name for image in read_labelled_set(other).train] != [name for name, _ in drawn[0][:9]]
    with pytest.raises(ValueError, match="num_cifar10 must be a multiple of 3 and <= 15, got 10"):
        real_probe.choose_images([f"{c}/{i}" for c in "abc" for i in range(5)], 10, 0)


QUICK = {
    "protocols": "all",
    "robustness.corruptions": "[fog]",
    "robustness.severities": "[3]",
    "knn.k": "[10, 20]",
    "fewshot.num_ways": 2,
    "fewshot.num_shots": 1,
    "fewshot.num_queries_per_class": 2,
    "zeroshot.templates": "plain",
    "num_workers": 0,
    "report": "false",
    "device": "cpu",
}
SMALL_TRAINING = {
    "trainer.max_steps": 2,
    "model.optimizer.num_warmup_steps": 1,
    "model.backbone_options": "{patch_size: 8, depth: 4, embed_dim: 16, num_heads: 2}",
    "model.projection_hidden_features": 16,
    "model.projection_out_features": 8,
    "model.text.width": 16,
    "model.text.num_layers": 1,
    "model.text.num_heads": 2,
    "model.text.out_features": 8,
    "model.text.context_length": 16,
    "data.image_size": 32,
    "data.num_captions_per_rank": 4,
    "data.num_workers": 0,
    "trainer.callbacks": "[]",
    "trainer.enable_progress_bar": "false",
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
}


@pytest.fixture
def tables(
    real_probe: ModuleType,
    write_folders: WriteFolders,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict[str, Any], str]:
    """The results of a tiny form of the script, on one set of images: as JSON, and the page."""
    monkeypatch.setattr(real_probe, "NUM_IMAGES_PER_BATCH", 8)
    monkeypatch.setattr(real_probe, "OPTIONS", QUICK)
    monkeypatch.setattr(real_probe, "EXACT_PROBE", {"linear.num_epochs": 2, "linear.num_views": "null"})
    monkeypatch.setattr(real_probe, "TEXT_TRAINING", SMALL_TRAINING)
    model = {
        "generator.model": str(tiny_pipeline),
        "generator.num_inference_steps": 1,
        "generator.device": "cpu",
    }
    monkeypatch.setattr(real_probe, "GENERATOR", model)
    save_checkpoint(tmp_path / "a.ckpt", image_size=32)
    data = write_folders(train=8, test=5)
    real_probe.measure(
        str(tmp_path / "a.ckpt"),
        clothing=str(data),
        shards=str(tmp_path / "none"),
        num_epochs=2,
        num_captions=4,
        num_test_captions=6,
        work=str(tmp_path / "w"),
    )
    text = (tmp_path / "results" / "real_probe.json").read_text()
    page = (tmp_path / "results" / "real_probe.md").read_text()
    assert str(tmp_path) not in text + page
    return json.loads(text), page


@pytest.mark.e2e
def test_every_set_of_weights_is_probed_and_compared(tables: tuple[dict[str, Any], str]) -> None:
    result, page = tables
    columns = [(probe["data"], probe["weights"]) for probe in result["probes"]]
    assert columns == [
        *(("clothing", weights) for weights in ("random", "checkpoint", "text", "supervised")),
        *(("generated images", weights) for weights in ("random", "checkpoint", "text")),
    ]
    assert result["probes"][3]["training"]["num_steps"] == 6
    assert "| | random | checkpoint | text | supervised |" in page
    assert "| linear, held-out (2 epochs of new views, published: 90) |" in page
    measured = {
        each["protocol"].partition("_")[0] for index in (2, 6) for each in result["probes"][index]["rows"]
    }
    assert {name for name in PROTOCOLS if not any(found.startswith(name) for found in measured)} == set()
    rows = {probe["weights"]: probe["rows"] for probe in result["probes"][:4]}
    for difference in result["differences"]:
        (found,) = (row for row in difference["rows"] if row["protocol"] == "knn20")
        above, below = (
            next(row["value"] for row in rows[difference[side]] if row["protocol"] == "knn20")
            for side in ("above", "below")
        )
        assert found["difference"] == pytest.approx(above - below)
    assert "| | checkpoint − random | text − random | supervised − checkpoint |" in page
    assert page.startswith(f"Commit {result['commit']}; ")


def test_views_that_were_cached_are_marked(real_probe: ModuleType) -> None:
    settings = {"protocol": "linear_paper", "hyperparameters": {"num_epochs": 40, "views_cached": 4}}
    probe = real_probe.Probe("d", "random", "", 0.0, None, [settings], [])
    assert real_probe.describe_linear([probe]) == " (40 epochs over 4 cached views: not comparable)"


def test_without_images_there_is_nothing_to_measure(
    real_probe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_probe.measure()
    assert "nothing to measure" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
