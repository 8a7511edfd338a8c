"""`stablerep evaluate` in-process, on small random vision transformers: every protocol, end to end."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from stablerep.arguments import set_parsing_rules
from stablerep.backbones import add_backbone_to_checkpoint, build_backbone
from stablerep.cli import main, parse_config
from stablerep.evaluation import protocols
from stablerep.evaluation.cache import store
from stablerep.evaluation.config import PROTOCOLS, EvaluateConfig, KnnConfig
from stablerep.evaluation.evaluate import complete_lists
from stablerep.evaluation.plan import make_plan
from stablerep.evaluation.protocols import Evaluation, list_scores
from stablerep.evaluation.results import Row, read_results
from stablerep.loading import LoadedModel, load_model
from stablerep.loading.model import EvaluationTransform
from stablerep.text import TextConfig
from tests.stablerep.datasets import write_dataset
from tests.stablerep.evaluation.evaluating import QUICK, evaluate, read_run, values_of
from tests.stablerep.models import SMALL_TEXT, save_checkpoint

WriteFolders = Callable[..., Path]
EncodeImage = Callable[[str, int], bytes]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A vision transformer without a text tower."""
    torch.manual_seed(1234)  # not the seed of a random initialisation
    backbone = build_backbone(
        "vit_tiny_patch16_224", 32, {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
    )
    content = {"state_dict": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}}
    add_backbone_to_checkpoint(content, backbone)
    path = tmp_path / "tiny.ckpt"
    torch.save(content, path)
    return path


@pytest.fixture
def text_checkpoint(tmp_path: Path) -> Path:
    """StableRep+: with a text tower and projections of both sides."""
    save_checkpoint(tmp_path / "plus.ckpt", TextConfig(**SMALL_TEXT), image_size=32)
    return tmp_path / "plus.ckpt"


def rows_of(rows: Sequence[Row], prefix: str) -> list[Row]:
    return [row for row in rows if row.protocol.startswith(prefix)]


# --- what a run leaves


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
    results = evaluate(checkpoint, write_folders(**splits), tmp_path / "out")
    heldout = "validation" if validation else "held-out part of train"
    assert [(row.protocol, row.selection) for row in results.rows] == [
        ("linear_paper", "test"),
        ("linear_heldout", heldout),
        ("linear_bn_paper", "test"),
        ("linear_bn_heldout", heldout),
        ("knn5", "none"),
    ]
    assert results.names[0] == "test/blue/000.png"
    for row in results.rows:
        assert row.predictions is not None
        num_correct = int((row.predictions == row.targets).sum())
        oracle = binomtest(num_correct, 15).proportion_ci(method="wilson")
        assert row.n == 15
        assert row.value == pytest.approx(num_correct / 15)
        assert row.interval == pytest.approx((oracle.low, oracle.high))
    assert results.rows[0].hyperparameters["views_cached"] == 2
    provenance = results.provenance
    assert provenance.transform.startswith("Resize(37, bicubic), CenterCrop(32)")
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in provenance.hashes.values())
    assert provenance.hashes["weights"] == load_model(checkpoint).digest
    assert provenance.hashes["architecture"] == load_model(checkpoint).forward_digest
    assert {"stablerep", "python", "torch", "torchvision", "timm"} <= provenance.versions.keys()

    content = read_run(tmp_path / "out")
    assert content["command"].startswith("stablerep evaluate --checkpoint=")
    assert content["settings"]["linear"]["num_epochs"] == 3
    assert content["facts"]["model"]["architecture"] == "vit_tiny_patch16_224"
    counts = {"train": 24, "test": 15} | ({"validation": 9} if validation else {})
    assert content["facts"]["data"]["images"] == counts
    assert {"preparation", "features", "linear", "knn", "total"} == content["seconds"].keys()
    table = (tmp_path / "out" / "report.md").read_text()
    printed = capsys.readouterr().out
    for row in results.rows:
        assert f"| {row.protocol} | accuracy, % | cls | {100 * row.value:.2f} |" in table
        assert f"| {row.protocol} | accuracy, % | cls | {100 * row.value:.2f} |" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tiny.ckpt on folders" in page
    assert page.count("data:image/") >= 12  # pictures of neighbours


@pytest.mark.e2e
def test_the_model_index_has_every_row_and_no_path(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path
) -> None:
    results = evaluate(checkpoint, write_folders(train=6, test=4), tmp_path / "out")
    text = (tmp_path / "out" / "model-index.yml").read_text()
    (index,) = yaml.safe_load(text)["model-index"]
    assert index["name"] == "tiny.ckpt"
    found = [metric["value"] for result in index["results"] for metric in result["metrics"]]
    assert sorted(found) == sorted(row.value for row in results.rows)
    assert str(tmp_path) not in text


@pytest.mark.e2e
def test_two_runs_give_the_same_predictions(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path
) -> None:
    data = write_folders(train=6, test=4)
    a, b = (evaluate(checkpoint, data, tmp_path / name, "--cache=null") for name in ("a", "b"))
    assert a.provenance == b.provenance
    for row, other in zip(a.rows, b.rows, strict=True):
        assert row.predictions is not None
        assert other.predictions is not None
        assert np.array_equal(row.predictions, other.predictions)


@pytest.mark.e2e
def test_figures_of_an_evaluation_are_accepted_by_the_export(
    write_folders: WriteFolders, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "model.ckpt")
    out = tmp_path / "out"
    results = evaluate(tmp_path / "model.ckpt", write_folders(train=6, test=4), out, "--protocols=[knn]")
    words = ["export", str(tmp_path / "model.ckpt"), f"--output={tmp_path / 'exported'}"]
    assert main([*words, f"--results={out}"]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| knn5 | accuracy, % | cls | {100 * results.rows[0].value:.2f} |" in card


# --- protocols


@pytest.mark.e2e
def test_every_protocol_of_classes_runs_on_every_feature_and_says_what_is_left_out(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(train=8, test=5)
    options = ("--protocols=all", "--features=all", "--knn.k=[5, 500]", "--report=false")
    results = evaluate(checkpoint, data, tmp_path / "out", *options)
    features = ["cls", "patch_mean", "cls_last4"]
    assert [(row.protocol, row.metric, row.feature) for row in results.rows] == [
        *((f"linear{bn}_{on}", "accuracy", "cls") for bn in ("", "_bn") for on in ("paper", "heldout")),
        *(("logreg", m, f) for f in features for m in ("accuracy", "mean_per_class_accuracy")),
        *(("knn5", "accuracy", feature) for feature in features),
        *(("ridge", "accuracy", feature) for feature in features),
        *(("fewshot_2way_1shot", "accuracy", feature) for feature in features),
        *(("geometry", m, f) for f in features for m in ("uniformity", "rankme")),
        ("robustness_clean", "accuracy", "cls"),
        ("robustness_gaussian_noise", "accuracy", "cls"),
        ("robustness_gaussian_noise_1", "accuracy", "cls"),
        ("robustness_gaussian_noise_5", "accuracy", "cls"),
        ("robustness", "accuracy", "cls"),
    ]
    found = {row.protocol: row for row in results.rows}
    mild, strong, mean = (found[f"robustness_gaussian_noise{end}"] for end in ("_1", "_5", ""))
    assert mean.value == pytest.approx((mild.value + strong.value) / 2) == found["robustness"].value
    assert mean.interval is not None
    assert mean.interval[0] <= mean.value <= mean.interval[1]
    assert mean.n == 15
    notes = read_run(tmp_path / "out")["notes"]
    assert f"left out: zeroshot needs a text tower, and {checkpoint} has none" in notes
    assert f"left out: retrieval needs a text tower, and {checkpoint} has none" in notes
    assert "knn: no k of 500, as there are 24 training images" in notes
    assert "geometry: no alignment and no LiDAR, which need several images of the same captions" in notes
    assert any(note.startswith("robustness: at 32 pixels, not ImageNet-C's 224") for note in notes)
    assert (
        f"note: left out: zeroshot needs a text tower, and {checkpoint} has none" in capsys.readouterr().out
    )
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.e2e
def test_rows_are_what_scikit_learn_says_of_the_cached_features(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, cache_home: Path
) -> None:
    data = write_folders(train=8, test=5)
    options = ("--protocols=[knn, logreg]", "--knn.k=[1]", "--features=[patch_mean]")
    results = evaluate(checkpoint, data, tmp_path / "out", *options)
    splits = {}
    for path in (cache_home / "features").glob("*.safetensors"):
        with store.safe_open(path, framework="pt") as content:
            split = content.metadata()["split"]
            splits[split] = [content.get_tensor(name).numpy() for name in ("values", "labels")]
    assert splits.keys() == {"train", "test"}
    nearest = KNeighborsClassifier(1, metric="cosine").fit(*splits["train"])
    by_metric = {(row.protocol, row.metric): row for row in results.rows}
    assert by_metric["knn1", "accuracy"].value == nearest.score(*splits["test"])
    logreg = by_metric["logreg", "mean_per_class_accuracy"]
    assert logreg.predictions is not None
    assert logreg.value == pytest.approx(balanced_accuracy_score(splits["test"][1], logreg.predictions))
    assert logreg.hyperparameters["num_penalties"] == 45


@pytest.mark.e2e
def test_several_classes_an_image_are_scored_by_average_precision(
    checkpoint: Path, tmp_path: Path, encode_image: EncodeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    colours = ("blue", "green", "red")
    labels = {"train": [[0], [1], [2], [0, 1], [], [2]] * 3, "test": [[0], [1], [2], [0, 2], [1]]}
    tables = {
        split: Dataset.from_dict(
            {
                "image": [
                    {"bytes": encode_image(colours[(x or [0])[0]], i), "path": None}
                    for i, x in enumerate(found)
                ],
                "label": found,
            },
            features=Features({"image": Image(), "label": List(ClassLabel(names=list(colours)))}),
        )
        for split, found in labels.items()
    }
    DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    results = evaluate(checkpoint, f"hf:{tmp_path / 'saved'}", tmp_path / "out", "--protocols=all")
    (row,) = rows_of(results.rows, "logreg")
    assert (row.metric, row.n) == ("map11", 5)
    assert row.predictions is not None
    assert row.targets is not None
    assert row.predictions.shape == row.targets.shape == (5, 3)
    assert row.value == pytest.approx(naive_map11(row.predictions, row.targets), abs=1e-6)
    assert {name for row in results.rows for name in PROTOCOLS if row.protocol.startswith(name)} == {
        "logreg",
        "geometry",
    }
    notes = read_run(tmp_path / "out")["notes"]
    assert any(note.startswith("left out: knn needs one class an image") for note in notes)
    assert main(["evaluate", f"--checkpoint={checkpoint}", f"--data=hf:{tmp_path / 'saved'}"]) == 1


def naive_map11(scores: np.ndarray, targets: np.ndarray) -> float:
    """VOC 2007's average precision: the mean over recalls 0, 0.1, …, 1 of the best precision beyond."""
    precisions = []
    for column in range(scores.shape[1]):
        shown = targets[np.argsort(-scores[:, column], kind="stable"), column]
        precision = np.cumsum(shown) / np.arange(1, len(shown) + 1)
        recall = np.cumsum(shown) / shown.sum()
        best = [max(precision[recall >= level - 1e-9], default=0.0) for level in np.linspace(0, 1, 11)]
        precisions.append(np.mean(best))
    return float(np.mean(precisions))


@pytest.mark.e2e
def test_a_generated_dataset_gives_retrieval_and_geometry(text_checkpoint: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", [5, 3], num_images=4)
    results = evaluate(text_checkpoint, tmp_path / "shards", tmp_path / "out", "--protocols=all")
    found = values_of(results)
    assert {metric for protocol, metric, _ in found if protocol == "geometry"} == {
        *("alignment", "lidar", "uniformity", "rankme")
    }
    for direction, num_queries in (("image_to_text", 32), ("text_to_image", 8)):
        rows = rows_of(results.rows, f"retrieval_{direction}")
        assert [row.metric for row in rows] == ["recall@1", "recall@5"]  # of 8 captions, no ten
        assert {row.n for row in rows} == {num_queries}
        assert rows[0].value <= rows[1].value
    assert {row.protocol for row in results.rows} == {
        *("geometry", "retrieval_image_to_text", "retrieval_text_to_image")
    }
    notes = read_run(tmp_path / "out")["notes"]
    assert sum(note.startswith("left out: ") for note in notes) == len(PROTOCOLS) - 2
    assert read_run(tmp_path / "out")["facts"]["data"]["images"] == {"test": 32}


@pytest.mark.e2e
def test_alignment_is_the_mean_over_pairs_of_the_models_own_features(
    text_checkpoint: Path, tmp_path: Path, cache_home: Path
) -> None:
    write_dataset(tmp_path / "shards", [3], num_images=2)
    options = ("--protocols=[geometry]", "--features=[projection]")
    results = evaluate(text_checkpoint, tmp_path / "shards", tmp_path / "out", *options)
    (path,) = (cache_home / "features").glob("*.safetensors")
    with store.safe_open(path, framework="pt") as content:
        x = torch.nn.functional.normalize(content.get_tensor("values").double(), dim=1)
    pairs = [float((x[2 * i] - x[2 * i + 1]).square().sum()) for i in range(3)]
    assert values_of(results)["geometry", "alignment", "projection"] == pytest.approx(np.mean(pairs))


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["generated", "folders"])
def test_the_scores_that_are_foretold_are_those_that_come(
    text_checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, kind: str
) -> None:
    if kind == "generated":
        data = tmp_path / "shards"
        write_dataset(data, [5, 2], num_images=2)
    else:
        data = write_folders(train=8, test=4)
    results = evaluate(text_checkpoint, data, tmp_path / "out", "--protocols=all", "--features=all")
    words = [f"--checkpoint={text_checkpoint}", f"--data={data}", "--protocols=all", "--features=all"]
    config = parse_config(
        EvaluateConfig, [*words, *QUICK, "--dry_run=true"], prog="stablerep evaluate", description="Evaluate."
    )
    plan = make_plan(config)
    foretold = list_scores(config, plan.dataset, plan.protocols, plan.feature_names)
    assert sorted(foretold) == sorted(row.key for row in results.rows)


@pytest.mark.e2e
def test_zero_shot_takes_names_of_classes_from_the_set_or_a_file(
    text_checkpoint: Path, write_folders: WriteFolders, tmp_path: Path
) -> None:
    data = write_folders(train=2, test=4)
    results = evaluate(text_checkpoint, data, tmp_path / "out", "--protocols=[zeroshot]")
    (row,) = results.rows
    model = load_model(text_checkpoint)
    classes = model.encode_texts([f"a photo of a {name}." for name in ("blue", "green", "red")])
    images = [PIL.Image.open(path) for path in sorted((data / "test").glob("*/*.png"))]
    transform = EvaluationTransform(model.input_format)
    with torch.no_grad():
        embedded = model.encode_images(torch.stack([transform(image) for image in images]))
    similarities = F.normalize(embedded, dim=1) @ F.normalize(classes, dim=1).T
    assert row.predictions is not None
    assert row.predictions.tolist() == similarities.argmax(dim=1).tolist()
    assert row.value == (row.predictions == row.targets).mean()
    assert row.feature == "image_text"
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\n")
    option = f"--zeroshot.class_names={names}"
    turned = evaluate(text_checkpoint, data, tmp_path / "turned", "--protocols=[zeroshot]", option).rows[0]
    assert turned.predictions is not None
    assert np.array_equal(turned.predictions, 2 - row.predictions)
    assert not torch.equal(classes[0], classes[2])  # else the turn would not show
    names.write_text("red\n")
    words = ["evaluate", f"--checkpoint={text_checkpoint}", f"--data={data}", "--protocols=[zeroshot]"]
    assert main([*words, option]) == 1


@pytest.mark.e2e
def test_shards_and_the_exact_protocol_run(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    results = evaluate(checkpoint, shards, tmp_path / "out", "--linear.num_views=null")
    assert read_run(tmp_path / "out")["facts"]["data"]["images"] == {"train": 12, "test": 6}
    assert results.rows[0].hyperparameters["views_cached"] is None


# --- what goes wrong on the way


@pytest.mark.e2e
@pytest.mark.parametrize(
    "error", [ValueError, torch.OutOfMemoryError, torch.linalg.LinAlgError, RuntimeError]
)
def test_a_protocol_that_fails_leaves_the_scores_of_the_others(
    error: type[Exception],
    checkpoint: Path,
    write_folders: WriteFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(evaluation: Evaluation) -> list[Row]:
        assert [row.protocol for row in read_results(tmp_path / "out").rows] == ["knn5"]  # already written
        raise error("no memory is left")

    monkeypatch.setitem(protocols._PROTOCOLS, "ridge", fail)
    data = write_folders(train=6, test=4)
    options = ("--protocols=[knn, ridge, geometry]", "--require=ridge>=0")
    results = evaluate(checkpoint, data, tmp_path / "out", *options, code=1)
    assert {row.protocol for row in results.rows} == {"knn5", "geometry"}
    assert "ridge failed: no memory is left" in read_run(tmp_path / "out")["notes"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stablerep")]
    assert errors == [
        "stablerep evaluate: ridge failed: no memory is left",
        "stablerep evaluate: not met: ridge>=0: there is no such score",
    ]
    monkeypatch.undo()
    results = evaluate(checkpoint, data, tmp_path / "out", "--protocols=[ridge]")
    assert {row.protocol for row in results.rows} == {"knn5", "geometry", "ridge"}


@pytest.mark.e2e
def test_settings_that_change_a_score_are_among_its_settings(
    text_checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_folders(train=6, test=4), tmp_path / "out"
    (tmp_path / "names.txt").write_text("sky\nleaf\nfire\n")
    protocols = "--protocols=[robustness, zeroshot]"
    before = evaluate(text_checkpoint, data, out, protocols).rows
    words = ["evaluate", f"--checkpoint={text_checkpoint}", f"--data={data}", f"--output={out}", *QUICK]
    for option, told in (
        (
            "--knn.temperature=1",
            "robustness_clean accuracy of cls of other settings (knn.temperature was 0.07,",
        ),
        (f"--zeroshot.class_names={tmp_path / 'names.txt'}", "(zeroshot.class_names was sha256 "),
    ):
        capsys.readouterr()
        assert main([*words, protocols, option]) == 1
        assert told in capsys.readouterr().err
    assert list(read_results(out).rows) == list(before)


@pytest.mark.e2e
def test_later_commands_add_to_the_scores_of_the_folder(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_folders(train=6, test=4), tmp_path / "out"
    linear = evaluate(checkpoint, data, out, "--protocols=[linear]").rows
    evaluate(checkpoint, data, out, "--protocols=[knn]")
    results = evaluate(checkpoint, data, out, "--protocols=[knn]", "--features=[cls, patch_mean]")
    assert [row.key for row in results.rows] == [
        *(row.key for row in linear),
        ("knn5", "accuracy", "cls"),
        ("knn5", "accuracy", "patch_mean"),
    ]
    assert list(results.rows[: len(linear)]) == list(linear)
    for name in ("report.md", "model-index.yml"):
        assert "linear_bn_heldout" in (out / name).read_text(), name
    capsys.readouterr()
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", f"--output={out}", *QUICK]
    assert main([*words, "--protocols=[linear]", "--linear.num_epochs=4"]) == 1
    told = "linear_paper accuracy of cls of other settings (linear.num_epochs was 3, now 4): name another"
    assert told in capsys.readouterr().err
    assert list(read_results(out).rows) == list(results.rows)


# --- weights


@pytest.mark.e2e
def test_random_initialisation_is_seeded_and_not_the_checkpoint(
    checkpoint: Path, write_folders: WriteFolders
) -> None:
    data = write_folders(train=4, test=2)
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", "--protocols=[knn]", *QUICK]
    digests = []
    for options in (["--random_init"], ["--random_init"], ["--random_init", "--seed=1", "--overwrite"], []):
        assert main([*words, *options]) == 0
        place = f"tiny-folders{'-random_init' if options else ''}"
        text = (checkpoint.parent / "evaluation" / place / "results.jsonl").read_text()
        digests.append(re.search('"weights": "([0-9a-f]+)"', text)[1])  # type: ignore[index]
    assert digests[0] == digests[1]
    assert len({*digests}) == 3


@pytest.mark.e2e
def test_moving_average_is_probed_where_it_is_asked_for(write_folders: WriteFolders, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.ckpt", ema=True)
    data = write_folders(train=4, test=2)
    plain = evaluate(tmp_path / "model.ckpt", data, tmp_path / "plain", "--protocols=[knn]")
    ema = evaluate(tmp_path / "model.ckpt", data, tmp_path / "ema", "--protocols=[knn]", "--ema")
    assert plain.provenance.hashes["weights"] == load_model(tmp_path / "model.ckpt").digest
    assert ema.provenance.hashes["weights"] == load_model(tmp_path / "model.ckpt", ema=True).digest
    assert ema.provenance.hashes["weights"] != plain.provenance.hashes["weights"]
    assert ema.provenance.model.endswith(" (moving average)")


# --- the cache


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the images that any model extracted features of."""
    counts: list[int] = []
    original = LoadedModel.extract

    def spy(self: LoadedModel, images: torch.Tensor) -> Any:
        counts.append(len(images))
        return original(self, images)

    monkeypatch.setattr(LoadedModel, "extract", spy)
    return counts


ON_FEATURES = "--protocols=[logreg, knn, ridge, fewshot, geometry, robustness]"


@pytest.mark.e2e
def test_a_second_run_computes_nothing_and_gives_equal_rows(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, computed: list[int]
) -> None:
    data = write_folders(train=8, test=5)
    first = evaluate(checkpoint, data, tmp_path / "a", ON_FEATURES, "--features=all")
    assert sum(computed) == 24 + 15 + 2 * 15  # train, test, and two corrupted copies of test
    computed.clear()
    second = evaluate(checkpoint, data, tmp_path / "b", ON_FEATURES, "--features=all")
    assert computed == []
    assert values_of(second) == values_of(first)
    assert second.provenance == first.provenance


@pytest.mark.e2e
def test_features_of_other_weights_are_never_used(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, computed: list[int]
) -> None:
    data = write_folders(train=8, test=5)
    evaluate(checkpoint, data, tmp_path / "a", "--protocols=[knn]")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["backbone.cls_token"][0, 0, 0] += 1e-3
    torch.save(content, checkpoint)  # under the same name
    computed.clear()
    cached = evaluate(checkpoint, data, tmp_path / "b", "--protocols=[knn]")
    assert sum(computed) == 24 + 15
    fresh = evaluate(checkpoint, data, tmp_path / "c", "--protocols=[knn]", "--cache=null")
    assert values_of(cached) == values_of(fresh)


@pytest.mark.e2e
def test_texts_are_cached_too(
    text_checkpoint: Path, write_folders: WriteFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folders(train=2, test=2)
    first = evaluate(text_checkpoint, data, tmp_path / "a", "--protocols=[zeroshot]")
    monkeypatch.setattr(LoadedModel, "encode_texts", lambda *_: pytest.fail("texts were embedded again"))
    second = evaluate(text_checkpoint, data, tmp_path / "b", "--protocols=[zeroshot]")
    assert values_of(first) == values_of(second)


# --- ranks


@pytest.mark.e2e
@pytest.mark.distributed
def test_two_ranks_give_what_one_process_gives(
    text_checkpoint: Path, write_folders: WriteFolders, tmp_path: Path
) -> None:
    data = write_folders(train=8, test=5)  # 24 and 15 images: shares of ranks differ
    options = ("--protocols=all", "--cache=null", "--num_images_per_batch=4")
    one = evaluate(text_checkpoint, data, tmp_path / "one", *options)
    words = [f"--checkpoint={text_checkpoint}", f"--data={data}", f"--output={tmp_path / 'two'}"]
    command = [sys.executable, "-m", "stablerep.cli", "evaluate", *words, *QUICK, *options, "--devices=2"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    two = read_results(tmp_path / "two")
    assert two.names == one.names
    assert two.provenance == one.provenance
    for row, other in zip(one.rows, two.rows, strict=True):
        assert row.key == other.key
        assert other.value == pytest.approx(row.value, rel=1e-5)
        if row.predictions is not None and row.predictions.dtype.kind in "iu":
            assert other.predictions is not None
            assert np.array_equal(row.predictions, other.predictions)
    assert read_run(tmp_path / "two")["facts"]["machine"]["processes"] == 2


@pytest.mark.e2e
@pytest.mark.distributed
def test_what_stops_one_rank_stops_all_with_one_line(
    checkpoint: Path, write_folders: WriteFolders, tmp_path: Path
) -> None:
    data = write_folders(train=4, test=2)
    (data / "train" / "red" / "001.png").write_bytes(b"broken")
    words = [f"--checkpoint={checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "stablerep.cli", "evaluate", *words, *QUICK, "--devices=2"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 1
    # The other rank's progress bar may stand before it.
    lines = [line for line in found.stderr.splitlines() if "stablerep evaluate" in line]
    assert len(lines) == 1, found.stderr
    assert "train/red/001.png: not a readable image" in lines[0]


# --- beside the verb


@pytest.mark.e2e
def test_runs_are_compared_and_the_cache_is_looked_after_from_the_command_line(
    checkpoint: Path,
    write_folders: WriteFolders,
    tmp_path: Path,
    cache_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_folders(train=8, test=5)
    a = evaluate(checkpoint, data, tmp_path / "a", "--protocols=[knn]")
    b = evaluate(checkpoint, data, tmp_path / "b", "--protocols=[knn]", "--random_init")
    capsys.readouterr()
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["evaluate", "compare", *folders, "--output", str(tmp_path / "c")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| knn5"))
    assert f"{100 * a.rows[0].value:.2f}" in line
    assert f"{100 * b.rows[0].value:.2f}" in line
    assert (tmp_path / "c" / "compare.json").is_file()

    assert main(["evaluate", "cache", "ls"]) == 0
    assert f"{cache_home / 'features'}: 4 files" in capsys.readouterr().out
    assert main(["evaluate", "cache", "verify"]) == 0
    path = next((cache_home / "features").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    assert main(["evaluate", "cache", "verify"]) == 1
    assert path.name in capsys.readouterr().err
    assert main(["evaluate", "cache", "prune", "--max_bytes=0"]) == 0
    assert list((cache_home / "features").glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--require", "knn20>=0.55"], {"require": ["knn20>=0.55"]}),
        (["--require=knn20[cls]>=55%", "--require", "ridge>0"], {"require": ["knn20[cls]>=55%", "ridge>0"]}),
        (["--require", "[knn20>=0.55, ridge>0]"], {"require": ["knn20>=0.55", "ridge>0"]}),
        (["--protocols", "knn"], {"protocols": ["knn"]}),
        (["--protocols=knn,ridge", "--seed", "3"], {"protocols": ["knn", "ridge"], "seed": 3}),
        (["--protocols", "all", "--features=all"], {"protocols": "all", "features": "all"}),
        (
            ["--protocols=[linear, knn]", "--knn.k", "5"],
            {"protocols": ["linear", "knn"], "knn": KnnConfig((5,))},
        ),
    ],
)
def test_a_single_value_is_a_list_of_one(words: list[str], expected: dict[str, Any]) -> None:
    set_parsing_rules()
    words = complete_lists(["--checkpoint=a.ckpt", "--data=b", *words])
    config = parse_config(EvaluateConfig, words, prog="stablerep evaluate", description="an evaluation")
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_option_that_takes_a_list_takes_a_single_value() -> None:
    def list_options(kind: type, prefix: str = "") -> Iterator[str]:
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                yield from list_options(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
            elif {list, tuple} & {get_origin(part) for part in (hint, *get_args(hint))}:
                yield f"{prefix}{name}"

    options = set(list_options(EvaluateConfig))
    assert {"require", "protocols", "knn.k"} <= options
    for option in options - {"require"}:
        assert complete_lists([f"--{option}", "1"]) == [f"--{option}=[1]"]


def test_an_option_without_its_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--checkpoint=a.ckpt", "--data=b", "--protocols"]) == 2
    assert "--protocols" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compre"], ["cache"], ["cache", "list"]])
def test_unknown_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == 2
    message = capsys.readouterr().err
    assert f"unknown word '{' '.join(words)}' after evaluate" in message
    assert "compare, summarize, cache ls, cache verify, cache prune" in message


def test_the_caches_commands_start_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from stablerep.cli import main; "
        f"code = main(['evaluate', 'cache', 'ls', '--cache={tmp_path}']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
