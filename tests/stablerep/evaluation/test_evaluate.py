"""`stablerep evaluate` in-process, on a small random vision transformer."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from stablerep.backbones import add_backbone_to_checkpoint, build_backbone
from stablerep.cli import main
from stablerep.evaluation import evaluate
from stablerep.evaluation.evaluate import EvaluateConfig, KnnConfig
from stablerep.evaluation.linear import LinearConfig
from stablerep.loading.model import LoadedModel

WriteFolders = Callable[..., Path]
QUICK = ["--linear.num_epochs=3", "--linear.num_views=2", "--knn.k=5", "--num_workers=0", "--device=cpu"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(1234)  # not the seed of a random initialisation
    backbone = build_backbone(
        "vit_tiny_patch16_224", 16, {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    )
    content = {"state_dict": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}}
    add_backbone_to_checkpoint(content, backbone)
    path = tmp_path / "tiny.ckpt"
    torch.save(content, path)
    return path


def evaluate_by_command(checkpoint: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", f"--output={output}"]
    assert main([*words, *QUICK, *options]) == 0
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    return content


@pytest.mark.e2e
@pytest.mark.parametrize("validation", [0, 3])
def test_results_are_complete(
    checkpoint: Path,
    write_folders: WriteFolders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    validation: int,
) -> None:
    splits = {"train": 8, "test": 5} | ({"validation": validation} if validation else {})
    results = evaluate_by_command(checkpoint, write_folders(**splits), tmp_path / "out")
    heldout = "validation" if validation else "held-out part of train"
    assert [(row["name"], row["selection"]) for row in results["results"]] == [
        ("linear_paper", "test"),
        ("linear_heldout", heldout),
        ("linear_bn_paper", "test"),
        ("linear_bn_heldout", heldout),
        ("knn5", "none"),
    ]
    with np.load(tmp_path / "out" / "predictions.npz") as predictions:
        for row in results["results"]:
            num_correct = int((predictions[row["name"]] == predictions["labels"]).sum())
            oracle = binomtest(num_correct, 15).proportion_ci(method="wilson")
            assert (row["num_correct"], row["n"]) == (num_correct, 15)
            assert row["value"] == pytest.approx(num_correct / 15)
            assert row["interval"] == pytest.approx([oracle.low, oracle.high])
        assert predictions["names"][0] == "test/blue/000.png"
    assert results["results"][0]["hyperparameters"]["views_cached"] == 2
    assert results["checkpoint"]["architecture"] == "vit_tiny_patch16_224"
    assert re.fullmatch("[0-9a-f]{64}", results["checkpoint"]["sha256"])
    assert re.fullmatch("[0-9a-f]{64}", results["data"]["fingerprint"])
    assert results["data"]["num_images"] == {"train": 24, "test": 15} | (
        {"validation": 9} if validation else {}
    )
    assert results["settings"]["linear"]["num_epochs"] == 3
    assert results["transform"]["evaluation"] == "Resize(18, bicubic), CenterCrop(16)"
    assert {"stablerep", "python", "torch", "torchvision", "timm"} <= results["versions"].keys()
    assert {"features", "linear", "knn", "total"} <= results["seconds"].keys()
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.split("\n\n", 1)[1].strip() in capsys.readouterr().out


@pytest.mark.e2e
def test_two_runs_give_the_same_predictions(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path
) -> None:
    data = write_folders(train=6, test=4)
    runs = [evaluate_by_command(checkpoint, data, tmp_path / name) for name in ("a", "b")]
    assert runs[0]["data"] == runs[1]["data"]
    with np.load(tmp_path / "a/predictions.npz") as a, np.load(tmp_path / "b/predictions.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.e2e
def test_shards_and_the_exact_protocol_run(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    results = evaluate_by_command(checkpoint, shards, tmp_path / "out", "--linear.num_views=null")
    assert results["data"]["num_images"] == {"train": 12, "test": 6}
    assert results["results"][0]["hyperparameters"]["views_cached"] is None


@pytest.mark.e2e
def test_random_initialisation_is_seeded_and_not_the_checkpoint(
    checkpoint: Path, write_folders: WriteFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write_folders(train=4, test=2))
    weights = []
    original = evaluate._extract_splits

    def spy(model: LoadedModel, *args: Any) -> Any:
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        return original(model, *args)

    monkeypatch.setattr(evaluate, "_extract_splits", spy)
    for seed, random_init in ((0, True), (0, True), (1, True), (0, False)):
        config = EvaluateConfig(
            checkpoint=str(checkpoint),
            data=data,
            random_init=random_init,
            seed=seed,
            protocols=["knn"],
            knn=KnnConfig(k=3),
            num_workers=0,
            device="cpu",
        )
        assert evaluate.run(config) == 0
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    names = {path.parent.name for path in checkpoint.parent.glob("evaluation/*/results.json")}
    assert names == {"tiny-folders", "tiny-folders-random_init"}


@pytest.mark.e2e
def test_moving_average_is_probed_where_it_is_asked_for(
    checkpoint: Path, write_folders: WriteFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    weights = content["state_dict"]
    content["state_dict"] = weights | {f"ema_{name}": value + 1 for name, value in weights.items()}
    torch.save(content, checkpoint)
    probed = []
    original = evaluate._extract_splits

    def spy(model: LoadedModel, *args: Any) -> Any:
        probed.append(model.backbone.cls_token.detach().clone())  # type: ignore[operator]
        return original(model, *args)

    monkeypatch.setattr(evaluate, "_extract_splits", spy)
    data = write_folders(train=4, test=2)
    for options in ([], ["--ema"]):
        words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", "--protocols=[knn]"]
        assert main([*words, *QUICK, "--knn.k=3", *options]) == 0
    assert torch.equal(probed[0], weights["backbone.cls_token"])
    assert torch.equal(probed[1], weights["backbone.cls_token"] + 1)
    results = [path.read_text() for path in sorted(checkpoint.parent.glob("evaluation/*/results.json"))]
    assert [json.loads(text)["checkpoint"]["ema"] for text in results] == [False, True]


def fails_with(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["evaluate", *QUICK, *words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stablerep")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.e2e
def test_bad_input_gives_one_line(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(train=4, test=2)
    good = [f"--checkpoint={checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, other)
    fails_with(capsys, [*good, f"--checkpoint={other}"], r"other\.ckpt")
    other.write_bytes(b"not a checkpoint")
    fails_with(capsys, [*good, f"--checkpoint={other}"], r"other\.ckpt")
    fails_with(capsys, [*good, "--checkpoint=absent.ckpt"], r"absent\.ckpt")
    fails_with(capsys, [*good, "--data=absent"], "labelled set not found: absent")
    fails_with(capsys, [*good, "--device=warp"], "device must be auto, cpu or an accelerator .* got warp")
    fails_with(capsys, [*good, f"--output={other}"], r"other\.ckpt")
    (data / "train" / "red" / "001.png").write_bytes(b"broken")
    fails_with(capsys, good, r"train/red/001\.png: not a readable image.*1 of 12 images unreadable")
    shutil.rmtree(data / "test")
    fails_with(capsys, good, r"has no test/ folder")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.e2e
def test_what_cannot_work_is_said_before_features_are_computed(
    checkpoint: Path, write_folders: WriteFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_extract_splits", lambda *_: pytest.fail("features were computed"))
    data = write_folders(train=1, test=1)
    for protocol, message in (
        ("knn", r"knn\.k must be <= 3, the number of training images, got 20"),
        ("linear", "class 'blue' has 1 training image"),
    ):
        config = EvaluateConfig(checkpoint=str(checkpoint), data=str(data), protocols=[protocol])  # type: ignore[list-item]
        with pytest.raises(ValueError, match=message):
            evaluate.run(config)


def test_settings_out_of_bounds_are_refused() -> None:
    for options, message in (
        ({"protocols": []}, "protocols must name at least one"),
        ({"num_images_per_batch": 0}, "num_images_per_batch must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be null or >= 0, got -1"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"ema": True, "random_init": True}, "ema and random_init exclude each other"),
        ({"error_budget_fraction": 2.0}, r"error_budget_fraction must be in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateConfig(checkpoint="x", data="y", **options)
    with pytest.raises(ValueError, match=r"knn.k must be >= 1, got 0"):
        KnnConfig(k=0)
    assert EvaluateConfig(checkpoint="x", data="y").linear == LinearConfig()
