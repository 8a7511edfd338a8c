"""The report: figures against scikit-learn, the Markdown, what the page says, the model-index."""

import base64
import builtins
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix

from stablerep.evaluation.formats import describe_metric, describe_protocol, format_settings
from stablerep.evaluation.reporting import build_markdown, write_report
from stablerep.evaluation.reporting.analysis import (
    choose_points,
    choose_queries,
    count_confusions,
    list_confused_pairs,
    project_to_plane,
)
from stablerep.evaluation.reporting.figures import (
    CHART_BOTTOM,
    CHART_HEIGHT,
    CHART_TOP,
    MAP_HEIGHT,
    MAP_WIDTH,
    build_interval_axis,
    build_spectrum_chart,
    place_points,
)
from stablerep.evaluation.reporting.model_index import build_eval_results, build_model_index
from stablerep.evaluation.reporting.page import build_page, to_data_uri
from stablerep.evaluation.reporting.ticks import choose_ticks
from tests.stablerep.evaluation.reports import PROVENANCE, build_content, row


def test_plane_equals_that_of_scikit_learn() -> None:
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 7)) * np.arange(1, 8))
    plane = project_to_plane(features)
    oracle = PCA(n_components=2).fit(features.numpy())
    expected = oracle.transform(features.numpy())
    signs = np.sign((expected * plane.coordinates.numpy()).sum(axis=0))
    np.testing.assert_allclose(plane.coordinates.numpy(), expected * signs, atol=1e-9)
    assert plane.shares == pytest.approx(tuple(oracle.explained_variance_ratio_))


def test_plane_does_not_flip_with_the_order_of_the_images() -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        project_to_plane(features[order]).coordinates, project_to_plane(features).coordinates[order]
    )


def test_plane_of_equal_or_of_one_dimensional_features_is_drawn_and_of_nan_refused() -> None:
    assert project_to_plane(torch.ones(5, 3)).shares == (0, 0)
    assert project_to_plane(torch.arange(4.0)[:, None]).shares == (1, 0)
    assert np.isfinite(place_points(project_to_plane(torch.ones(5, 3)).coordinates.numpy())).all()
    with pytest.raises(ValueError, match="features must be finite"):
        project_to_plane(torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(ValueError, match="features for a map must be >= 2, got 1"):
        project_to_plane(torch.ones(1, 3))


def test_confusions_equal_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    targets, predictions = random.integers(5, size=200), random.integers(5, size=200).astype(np.int8)
    confusion = count_confusions(predictions, targets, 5)
    np.testing.assert_array_equal(confusion.counts, confusion_matrix(targets, predictions))
    np.testing.assert_allclose(confusion.shares, confusion_matrix(targets, predictions, normalize="true"))


def test_no_answer_counts_for_no_class_and_against_its_own() -> None:
    confusion = count_confusions(np.array([-1, 0, 0]), np.array([0, 0, 2]), 4)
    assert confusion.counts.sum() == 2
    assert confusion.shares[0, 0] == 0.5
    assert confusion.num_images.tolist() == [2, 0, 1, 0]
    assert list_confused_pairs(confusion, 10) == [(2, 0, 1, 1.0)]


def test_queries_are_of_every_class_and_half_of_them_wrong() -> None:
    targets = np.repeat(np.arange(10), 30)
    predictions = np.where(np.arange(300) % 5 == 0, (targets + 1) % 10, targets)
    chosen = choose_queries(targets, predictions, num_queries=10)
    assert sorted(targets[chosen].tolist()) == list(range(10))
    assert (predictions[chosen] != targets[chosen]).sum() == 5
    assert (
        choose_queries(targets, num_queries=10).tolist() == choose_queries(targets, num_queries=10).tolist()
    )
    assert len(set(choose_queries(targets[:4], num_queries=12).tolist())) == 4
    with pytest.raises(ValueError, match="num_queries must be >= 1, got 0"):
        choose_queries(targets, num_queries=0)


def test_points_are_drawn_without_repetition_only_where_there_are_too_many() -> None:
    assert choose_points(5, 10, seed=0).tolist() == [0, 1, 2, 3, 4]
    chosen = choose_points(5000, 2000, seed=0)
    assert len(set(chosen.tolist())) == 2000
    assert chosen.tolist() == sorted(chosen.tolist())


def test_spectrum_of_a_geometric_series_is_a_straight_line() -> None:
    chart = build_spectrum_chart(10.0 ** -np.arange(5))
    assert chart is not None
    places = np.array([list(map(float, point.split(","))) for point in chart.points.split()])
    np.testing.assert_allclose(np.diff(places, 2, axis=0), 0, atol=0.11)
    assert places[0, 1] == CHART_TOP
    assert places[-1, 1] == pytest.approx(CHART_HEIGHT - CHART_BOTTOM)
    assert chart.num_for == {50: 1, 90: 1, 99: 2}
    assert [tick.text for tick in chart.y_ticks] == ["1", "10⁻¹", "10⁻²", "10⁻³", "10⁻⁴"]


def test_spectrum_leaves_out_what_is_rounding_and_is_none_without_variance() -> None:
    chart = build_spectrum_chart(np.array([1.0, 0.5, 1e-17, 0.0]))
    assert chart is not None
    assert len(chart.points.split()) == 2
    assert chart.num_directions == 4
    assert build_spectrum_chart(np.zeros(3)) is None


def test_map_keeps_shape_and_stays_inside() -> None:
    coordinates = np.random.default_rng(0).standard_normal((100, 2)) * [5, 1]
    places = place_points(coordinates)
    assert (places >= 0).all()
    assert (places <= [MAP_WIDTH, MAP_HEIGHT]).all()
    scales = np.ptp(places, axis=0) / np.ptp(coordinates, axis=0)
    assert scales[0] == pytest.approx(scales[1], rel=1e-2)
    assert np.corrcoef(places[:, 1], coordinates[:, 1])[0, 1] < -0.99  # y upwards


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.5, 0.5001], [0.02, 0.98], [0.831, 0.85]])
def test_axis_holds_every_interval(values: list[float]) -> None:
    rows = [row(value=value) for value in values] + [row("geometry", 61.3, metric="rankme", interval=None)]
    axis = build_interval_axis(rows)
    assert 0 <= axis.low < axis.high <= 1
    for found in rows[:-1]:
        assert found.interval is not None
        assert axis.low - 1e-9 <= found.interval[0] <= found.interval[1] <= axis.high + 1e-9
    assert 2 <= len(axis.ticks) <= 7


@pytest.mark.parametrize(
    ("protocol", "title"),
    [
        ("knn20", "k-NN, k = 20"),
        ("linear_heldout", "linear probe"),
        ("linear_bn_paper", "linear probe after BatchNorm, chosen on test"),
        ("fewshot_5way_1shot", "few-shot prototypes, 5way 1shot"),
        ("robustness_gaussian_noise", "k-NN on corrupted images, gaussian noise"),
        ("my_own", "my own"),
    ],
)
def test_protocols_are_named_in_words(protocol: str, title: str) -> None:
    assert describe_protocol(protocol) == title


def test_fractions_are_known_and_other_metrics_are_plain_numbers() -> None:
    assert describe_metric("recall@5").is_fraction
    assert not describe_metric("rankme").is_fraction
    assert describe_metric("alignment").higher_is_better is False
    assert not describe_metric("unheard_of").is_fraction
    assert format_settings({"num_epochs": 90, "batch_norm": False, "lr": 0.1 + 0.2, "views": None}) == (
        "epochs 90, batch norm no, lr 0.3"
    )


def test_markdown_says_which_rows_were_chosen_on_test_and_which_views_were_cached() -> None:
    text = build_markdown(build_content())
    assert (
        "| linear_paper | accuracy, % | cls | 90.00 | 85.00 to 95.00 | 60 | test | views cached 4 |" in text
    )
    assert "| geometry | rankme | cls | 61.3 |  | 60 | none | k 20 |" in text
    assert "best *on the test split*" in text
    assert "not comparable with published figures" in text
    assert "2 images could not be read." in text
    assert f"- weights: {'w' * 64}" in text
    assert "- num_images.train: 100" in text
    plain = build_markdown(build_content(rows=[row()], notes=[]))
    assert "test split" not in plain
    assert "not comparable" not in plain


def test_markdown_cells_stay_in_their_cells() -> None:
    text = build_markdown(build_content(rows=[row(hyperparameters={"name": "a|b\nc"})]))
    assert "| name a\\|b c |" in text


def test_report_is_written_whole_and_the_page_only_where_asked(tmp_path: Path) -> None:
    write_report(tmp_path, build_content(), page=False)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md"}
    write_report(tmp_path, build_content())
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html"}


def test_a_missing_extra_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs jinja2: pip install 'stablerep\[report\]'"):
        write_report(tmp_path, build_content())
    assert list(tmp_path.iterdir()) == []


def test_markdown_does_not_need_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    write_report(tmp_path, build_content(), page=False)
    assert (tmp_path / "report.md").exists()


def test_page_asks_nothing_of_the_network() -> None:
    page = build_page(build_content())
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"|https?://|url\(|@import", page) == []
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"features": None},
        {"neighbours": []},
        {"targets": None},
        {"rows": [row("geometry", 3.0, metric="rankme", interval=None)]},
        {
            "targets": None,
            "class_names": (),
            "neighbours": [],
            "features": None,
            "command": None,
            "facts": {},
        },
        {"rows": [row()], "names": ["a"], "targets": np.array([0]), "features": torch.ones(1, 3)},
        {"features": torch.ones(60, 3)},
    ],
)
def test_page_leaves_out_what_is_not_given(changes: dict[str, Any]) -> None:
    page = build_page(build_content(**changes))
    has_features = changes.get("features", True) is not None and len(changes.get("names", "many")) > 1
    assert ('id="feature-map"' in page) == has_features
    assert ('class="neighbours"' in page) == (changes.get("neighbours", True) != [])
    assert ('id="score-table"' in page) == any(
        describe_metric(found.metric).is_fraction for found in changes.get("rows", [row()])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "at least one row"),
        ({"targets": np.zeros(3, dtype=int)}, r"targets must be \[60\], got \[3\]"),
        ({"targets": np.full(60, 4)}, r"targets must be in \[0, 4\), got 4 to 4"),
        ({"features": torch.ones(59, 3)}, r"features must be \[60, D\], got \[59, 3\]"),
        ({"class_names": ["a"], "targets": None}, r"target of train/1.jpg must be in \[0, 1\), got 1"),
    ],
)
def test_content_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_content(**changes)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16", "F"])
def test_thumbnails_are_small_rgb_jpegs_of_any_image(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 400 * 300).astype(np.uint16).reshape(300, 400))
    else:
        image = Image.linear_gradient("L").resize((400, 300)).convert(mode)
    kind, _, data = to_data_uri(image, size=64).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("JPEG", "RGB", (64, 48))
        values = np.asarray(thumbnail).astype(int)
        assert values.max() - values.min() > 200  # neither cut to white nor left black


def test_transparent_parts_are_white() -> None:
    _, _, data = to_data_uri(Image.new("RGBA", (8, 8), (255, 0, 0, 0))).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert np.asarray(thumbnail).min() >= 250


def test_model_index_is_read_back_by_huggingface_hub() -> None:
    rows = [row(), row("zeroshot", 0.3), row("geometry", 61.3, metric="rankme", interval=None)]
    text = build_model_index(rows, PROVENANCE, model_name="vit", dataset_name="Clothing")
    index = yaml.safe_load(text)
    assert set(index) == {"model-index"}
    name, results = model_index_to_eval_results(index["model-index"])
    assert name == "vit"
    assert [(found.metric_type, found.metric_value) for found in results] == [
        ("accuracy", 0.5),
        ("accuracy", 0.3),
        ("rankme", 61.3),
    ]
    assert {found.dataset_name for found in results} == {"Clothing"}
    assert [found.task_type for found in results] == [
        "image-classification",
        "zero-shot-image-classification",
        "image-feature-extraction",
    ]
    assert results[0].metric_args is not None
    assert results[0].metric_args["interval"] == [0.45, 0.55]


def test_model_index_holds_no_path_of_this_machine() -> None:
    text = build_model_index([row()], PROVENANCE, model_name="vit")
    assert "someone" not in text
    assert "clothing" in text


def test_model_index_goes_into_a_card() -> None:
    results = build_eval_results([row()], PROVENANCE, dataset_type="someone/clothing")
    card = ModelCardData(model_name="vit", license="apache-2.0", eval_results=results)
    assert (
        yaml.safe_load(card.to_yaml())["model-index"][0]["results"][0]["dataset"]["type"]
        == "someone/clothing"
    )
    with pytest.raises(ValueError, match="at least one row"):
        build_model_index([], PROVENANCE, model_name="vit")


def test_model_index_says_what_is_not_comparable_with_published_figures() -> None:
    rows = [
        row(hyperparameters={"views_cached": None}),
        row("linear_heldout", hyperparameters={"views_cached": 4}),
        row("robustness", hyperparameters={"comparable": False}),
        row("robustness_fog", hyperparameters={"comparable": True}),
    ]
    marks = [result.metric_args for result in build_eval_results(rows, PROVENANCE)]
    assert [(mark or {}).get("comparable_with_published") for mark in marks] == [None, False, False, None]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.113, 0.42), (2.9, 5.6), (3.0, 3.0), (0, 400), (-1, 7)]
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = choose_ticks(low, high, 5)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "125"
