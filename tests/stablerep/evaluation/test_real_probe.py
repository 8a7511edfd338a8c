"""benchmarks/real_probe.py on a labelled set of its own making."""

import importlib.util
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

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
    other = real_probe.prepare_cifar10(folders, 9, tmp_path / "a", 1)
    assert [image.name for image in read_labelled_set(other).train] != [name for name, _ in drawn[0][:9]]
    with pytest.raises(ValueError, match="num_cifar10 must be a multiple of 3 and <= 15, got 10"):
        real_probe.choose_images([f"{c}/{i}" for c in "abc" for i in range(5)], 10, 0)


@pytest.mark.e2e
def test_three_sets_of_weights_are_probed_and_no_path_is_published(
    real_probe: ModuleType,
    write_folders: WriteFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(real_probe, "NUM_IMAGES_PER_BATCH", 8)
    quick = {
        "protocols": "[linear, knn, fewshot, geometry]",
        "linear.num_epochs": 2,
        "linear.num_views": 1,
        "knn.k": "[10, 20]",
        "fewshot.num_ways": 2,
        "fewshot.num_shots": 1,
        "fewshot.num_queries_per_class": 2,
        "num_workers": 0,
        "report": "false",
        "device": "cpu",
    }
    monkeypatch.setattr(real_probe, "OPTIONS", quick)
    save_checkpoint(tmp_path / "a.ckpt", image_size=32)
    data = write_folders(train=8, test=5)
    real_probe.measure(str(tmp_path / "a.ckpt"), clothing=str(data), num_epochs=2, work=str(tmp_path / "w"))
    text = (tmp_path / "results" / "real_probe.json").read_text()
    assert str(tmp_path) not in text
    probes = json.loads(text)["probes"]
    assert [probe["weights"] for probe in probes] == ["random", "checkpoint", "supervised"]
    assert probes[2]["supervised"]["num_steps"] == 6
    assert "| k-NN, k = 20 |" in (tmp_path / "results" / "real_probe.md").read_text()
    assert "| random | checkpoint | supervised |" in capsys.readouterr().out


def test_without_images_there_is_nothing_to_measure(
    real_probe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_probe.measure()
    assert "nothing to measure" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
