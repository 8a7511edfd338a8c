"""What is known, refused or told before the first feature of `stablerep evaluate`."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stablerep.cli import main
from stablerep.evaluation import dry_run, plan, run
from stablerep.evaluation.cache import fingerprint, store
from stablerep.evaluation.cache.files import DIGESTS_FOLDER
from stablerep.evaluation.config import EvaluateConfig, KnnConfig, LogregConfig, RobustnessConfig
from stablerep.evaluation.dry_run import format_seconds
from stablerep.evaluation.fewshot import FewShotConfig
from stablerep.evaluation.linear import LinearConfig
from stablerep.evaluation.plan import make_plan
from stablerep.evaluation.results import read_results
from stablerep.loading import load_model
from tests.stablerep.evaluation.evaluating import QUICK, evaluate, read_run
from tests.stablerep.models import save_checkpoint

WriteFolders = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model.ckpt", image_size=32)
    return tmp_path / "model.ckpt"


@pytest.fixture
def no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when features are computed."""
    monkeypatch.setattr(
        store, "extract_changed_features", lambda *_, **__: pytest.fail("features were computed")
    )


def files_of(root: Path) -> dict[Path, int]:
    """Beside the digests of images."""
    paths = (path for path in root.rglob("*") if DIGESTS_FOLDER not in path.parts)
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


@pytest.mark.usefixtures("no_features")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ["knn"], "knn": KnnConfig(k=(20, 30))}, r"knn\.k must be <= 3, .* images, got 20"),
        ({"protocols": ["linear"]}, "class 'blue' has 1 training image: linear chooses on held-out"),
        ({"protocols": ["logreg"]}, "class 'blue' has 1 training image: logreg chooses on held-out"),
        ({"protocols": ["ridge"]}, "ridge chooses on held-out images and needs at least 5 .*, got 3"),
        (
            {"protocols": ["fewshot"]},
            "fewshot draws from the test split of .*: few-shot classes must be >= 5",
        ),
        (
            {"protocols": ["fewshot"], "fewshot": FewShotConfig(num_ways=2)},
            r"images of each class must be >= 20 \(5 shots \+ 15 queries\), got 1",
        ),
        ({"protocols": ["zeroshot"]}, r"zeroshot needs a text tower, and .*model\.ckpt has none"),
        ({"protocols": ["retrieval"]}, r"retrieval needs a text tower, and .*model\.ckpt has none"),
        ({"features": ["text"]}, r"features: .*model\.ckpt has no text; it has cls, patch_mean, "),
        ({"device": "warp"}, "device must be auto, cpu or an accelerator of this machine, got warp"),
        ({"require": ["knn20>=0.5"]}, "there is no protocol 'knn20' in this evaluation; did you mean knn1"),
        ({"require": ["knn1>=55"]}, r"accuracy is a fraction in \[0, 1\], got 55; write 55% for per cent"),
        (
            {"require": ["knn1>=0.5"], "features": ["cls", "patch_mean"]},
            r"knn1 has several features, name one: knn1\[cls\], knn1\[patch_mean\]",
        ),
        (
            {"require": ["geometry.alignment>=1"], "protocols": ["geometry"]},
            "geometry has no metric 'alignment'; it has uniformity, rankme",
        ),
        (
            {"require": ["geometry>=1"], "protocols": ["geometry"]},
            "geometry has several metrics, name one: geometry.uniformity, geometry.rankme",
        ),
    ],
)
def test_what_cannot_work_is_said_before_features_are_computed(
    checkpoint: Path, write_folders: WriteFolders, options: dict[str, Any], message: str
) -> None:
    data = write_folders(train=1, test=1)
    defaults: dict[str, Any] = {"protocols": ["knn"], "knn": KnnConfig(k=(1, 20))}
    config = EvaluateConfig(checkpoint=str(checkpoint), data=str(data), cache=None, **defaults | options)
    with pytest.raises(ValueError, match=message):
        run.run(config)


@pytest.mark.usefixtures("no_features")
def test_corruptions_need_images_of_some_size(tmp_path: Path, write_folders: WriteFolders) -> None:
    save_checkpoint(tmp_path / "small.ckpt", image_size=16)
    data = write_folders(train=2, test=2)
    config = EvaluateConfig(checkpoint=str(tmp_path / "small.ckpt"), data=str(data), protocols=["robustness"])
    with pytest.raises(ValueError, match=r"robustness needs images of at least 32 pixels, and .* takes 16"):
        run.run(config)


@pytest.mark.usefixtures("no_features")
def test_a_page_without_its_library_is_refused_before_the_work(
    checkpoint: Path, write_folders: WriteFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = EvaluateConfig(checkpoint=str(checkpoint), data=str(write_folders(train=4, test=2)))
    with pytest.raises(ValueError, match=r"pip install 'stablerep\[report\]'"):
        run.run(config)


def test_without_images_that_share_captions_only_test_features_are_needed(
    checkpoint: Path, write_folders: WriteFolders
) -> None:
    def plan(*protocols: str, **options: Any) -> tuple[list[str], list[str]]:
        found = make_plan(
            EvaluateConfig(
                checkpoint=str(checkpoint),
                data=str(data),
                protocols=list(protocols),  # type: ignore[arg-type]
                cache=None,
                dry_run=True,
                **options,
            )
        )
        return found.needed_splits, found.needed_features

    data = write_folders(train=6, test=3)
    assert plan("geometry", features=["patch_mean"]) == (["test"], ["patch_mean"])
    assert plan("linear", features=["patch_mean"]) == (["train", "test"], ["cls"])
    assert plan("linear", "ridge", features=["patch_mean"]) == (["train", "test"], ["cls", "patch_mean"])


# --- a dry run


@pytest.mark.e2e
def test_a_dry_run_says_what_the_cache_has_and_writes_digests_alone(
    checkpoint: Path,
    write_folders: WriteFolders,
    tmp_path: Path,
    cache_home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_folders(train=8, test=5)
    evaluate(checkpoint, data, tmp_path / "out", "--protocols=[knn]")
    capsys.readouterr()
    counts = []
    original = dry_run.extract_features

    def count(*args: Any, **options: Any) -> Any:
        counts.append((len(args[1]), options["description"]))
        return original(*args, **options)

    monkeypatch.setattr(
        store, "extract_changed_features", lambda *_, **__: pytest.fail("features were computed")
    )
    monkeypatch.setattr(dry_run, "extract_features", count)
    before = files_of(tmp_path) | files_of(cache_home)
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", f"--output={tmp_path / 'new'}"]
    options = ["--protocols=[knn, linear, robustness]", "--features=[cls, patch_mean]", "--dry_run"]
    assert main([*words, *QUICK, *options]) == 0
    assert files_of(tmp_path) | files_of(cache_home) == before
    assert counts == [(15, "timing")] * 2
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "protocols knn, linear, robustness" in text
    assert "train 24 cls / patch_mean" in text
    assert "test 15 cls / patch_mean" in text
    assert "linear 48 - / augmented views" in text
    assert "robustness 30 - / 2 corrupted copies" in text
    assert re.search(r"time about 0 min \d\d s for 117 images", text)  # 24 + 15 + 48 + 30


@pytest.mark.e2e
def test_a_run_does_not_hash_again_what_a_dry_run_hashed(
    checkpoint: Path,
    write_folders: WriteFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED_NANOSECONDS", 0)
    data = write_folders(train=8, test=5)
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", *QUICK, "--protocols=[knn]"]
    assert main([*words, "--dry_run"]) == 0
    monkeypatch.setattr(fingerprint, "_hash", lambda image: pytest.fail(f"{image.name} was hashed again"))
    evaluate(checkpoint, data, tmp_path / "out", "--protocols=[knn]")


@pytest.mark.e2e
def test_a_dry_run_counts_cached_corruptions_as_done(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(train=8, test=5)
    options = ["--protocols=[robustness]", "--robustness.severities=[1]"]
    evaluate(checkpoint, data, tmp_path / "out", *options)
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", *QUICK]
    capsys.readouterr()
    assert main([*words, "--protocols=[robustness]", "--dry_run"]) == 0
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "robustness 15 1 corrupted copies / 1 corrupted copies" in text
    assert "for 15 images" in text


def test_seconds_are_written_for_people() -> None:
    assert [format_seconds(value) for value in (0.2, 61, 7500)] == ["0 min 00 s", "1 min 01 s", "2 h 05 min"]


# --- requirements and output folders


@pytest.mark.e2e
def test_a_requirement_that_is_not_met_is_named_and_sets_the_exit_code(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(train=8, test=5)
    options = ("--protocols=[knn]", "--require=knn5>=0", "--require=knn5[cls]>100%")
    results = evaluate(checkpoint, data, tmp_path / "out", *options, code=1)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stablerep")]
    value = f"{results.rows[0].value:.6g}"
    assert lines == [f"stablerep evaluate: not met: knn5 accuracy of cls must be > 1, got {value}"]
    evaluate(checkpoint, data, tmp_path / "out", "--protocols=[knn]", "--require=['knn5>=0']")


@pytest.mark.e2e
def test_results_of_other_weights_are_not_written_over(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_folders(train=8, test=5), tmp_path / "out"
    evaluate(checkpoint, data, out, "--protocols=[knn]")
    before = {path: path.read_bytes() for path in out.iterdir()}
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", f"--output={out}", *QUICK]
    capsys.readouterr()
    assert main([*words, "--protocols=[knn]", "--random_init"]) == 1
    message = f"{out / 'results.jsonl'} holds results of other weights"
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert main([*words, "--protocols=[knn]", "--random_init", "--overwrite"]) == 0
    assert read_results(out).provenance.model.endswith(" (random initialisation)")


def test_settings_out_of_bounds_are_refused() -> None:
    for options, message in (
        ({"protocols": []}, "protocols must be all, or different ones of linear, logreg"),
        ({"protocols": ["knn", "knn"]}, "protocols must be all, or different ones of"),
        ({"features": []}, "features must be all, or different ones of cls"),
        ({"num_images_per_batch": 0}, "num_images_per_batch must be >= 1, got 0"),
        ({"devices": 0}, "devices must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be null or >= 0, got -1"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"ema": True, "random_init": True}, "ema and random_init exclude each other"),
        ({"error_budget_fraction": 2.0}, r"error_budget_fraction must be in \[0, 1\], got 2.0"),
        ({"require": ["knn20=0.5"]}, "require must be PROTOCOL"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateConfig(checkpoint="x", data="y", **options)
    for build, message in (
        (lambda: KnnConfig(k=(0,)), r"knn.k must be different numbers >= 1, got \[0\]"),
        (lambda: KnnConfig(temperature=0), "knn.temperature must be > 0, got 0"),
        (lambda: LogregConfig(heldout_fraction=1), r"logreg.heldout_fraction must be in \(0, 1\), got 1"),
        (lambda: RobustnessConfig(severities=(6,)), r"robustness.severities must be of 1 to 5, got \[6\]"),
        (lambda: RobustnessConfig(corruptions=("rain",)), "robustness.corruptions must be of .*, got rain"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    assert EvaluateConfig(checkpoint="x", data="y").linear == LinearConfig()


# --- bad input


def fails_with(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    capsys.readouterr()
    assert main(["evaluate", *QUICK, *words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stablerep")]
    assert len(lines) == 1, lines
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
    fails_with(capsys, [*good, f"--output={other}"], r"other\.ckpt")
    fails_with(capsys, [*good, "--devices=2", "--device=warp"], "device must be auto, cpu or .* got warp")
    (data / "test" / "pink").mkdir()
    fails_with(capsys, good, "class 'pink' of .*test has no folder in .*train")
    (data / "train" / "pink").mkdir()
    fails_with(capsys, good, "class folder .*train/pink holds no images")
    for split in ("train", "test"):
        for name in ("pink", "red", "green"):
            shutil.rmtree(data / split / name)
    fails_with(capsys, good, "at least 2 classes are needed in train, got 1")
    shutil.rmtree(data / "test")
    fails_with(capsys, good, r"has no test/ folder")
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_what_a_model_has_to_say_of_itself_is_noted(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(checkpoint)
    model.remarks = ("resized otherwise",)
    monkeypatch.setattr(plan, "load_model", lambda *_, **__: model)
    config = EvaluateConfig(
        checkpoint=str(checkpoint),
        data=str(write_folders(train=1, test=1)),
        output=str(tmp_path / "out"),
        protocols=["geometry"],
    )
    assert "resized otherwise" in make_plan(config).notes


@pytest.mark.e2e
def test_an_unreadable_image_stops_the_run_beyond_the_budget_and_is_named_within_it(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(train=4, test=2)
    (data / "train" / "red" / "001.png").write_bytes(b"broken")
    words = [f"--checkpoint={checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
    fails_with(capsys, words, r"train/red/001\.png: not a readable image.*1 of 12 images unreadable")
    assert not (tmp_path / "out" / "results.jsonl").exists()
    evaluate(checkpoint, data, tmp_path / "out", "--error_budget_fraction=0.1", "--linear.num_views=1")
    content = read_run(tmp_path / "out")
    (line,) = content["facts"]["data"]["unreadable"]
    assert line == "train/red/001.png: not a readable image (no JPEG, PNG or WebP)"
    assert content["facts"]["data"]["images"] == {"train": 11, "test": 6}
    assert "1 image could not be read and left out; run.json has the names." in content["notes"]
    assert "1 image could not be read" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.e2e
def test_a_feature_that_is_not_finite_stops_the_run_and_names_the_image(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["backbone.norm.weight"].fill_(3.3e38)  # finite, and the products are not
    torch.save(content, checkpoint)
    data = write_folders(train=4, test=2)
    words = [f"--checkpoint={checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
    fails_with(capsys, words, r"train/blue/000\.png: its feature 'cls' is not finite")
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.e2e
def test_a_disk_that_fills_up_while_caching_costs_the_cache_and_not_the_run(
    checkpoint: Path,
    write_folders: WriteFolders,
    tmp_path: Path,
    cache_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_folders(train=4, test=2)
    first = evaluate(checkpoint, data, tmp_path / "a", "--protocols=[knn]")
    before = {path: path.read_bytes() for path in (cache_home / "features").glob("*.safetensors")}

    def fill(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", fill)
    options = ("--protocols=[knn]", "--features=[cls, patch_mean]")
    second = evaluate(checkpoint, data, tmp_path / "b", *options)
    assert "No space left on device" in caplog.text
    assert second.rows[0].value == first.rows[0].value
    assert {row.feature for row in second.rows} == {"cls", "patch_mean"}
    after = {path: path.read_bytes() for path in (cache_home / "features").glob("*.safetensors")}
    assert after == before
    assert not [path for path in (cache_home / "features").iterdir() if path.name.endswith(".tmp")]
