"""`--require`: what it reads, what it refuses, and which scores do not reach it."""

import pytest

from stablerep.evaluation.requirements import check_requirements, find_unmet, parse_requirement
from stablerep.evaluation.results import Row


def row(protocol: str, value: float, metric: str = "accuracy", feature: str = "cls") -> Row:
    return Row(protocol, metric, value, None, "", 100, "none", {}, feature, 1.0)


ROWS = [
    row("knn20", 0.5512),
    row("logreg", 0.61),
    row("logreg", 0.58, "mean_per_class_accuracy"),
    row("retrieval", 0.3, "recall@1"),
    row("retrieval", 0.7, "recall@5"),
    row("geometry", -2.5, "uniformity"),
    row("robustness.fog", 0.4),
    row("ridge", 0.5),
    row("ridge", 0.6, feature="patch_mean"),
]


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ("knn20>=0.55", True),
        ("knn20 >= 0.5512", True),
        ("knn20>0.5512", False),
        ("knn20>=55.2%", False),
        ("knn20 <= 55.12 %", True),
        ("knn20<0.56", True),
        ("logreg>=0.6", True),
        ("logreg.accuracy>=.62", False),
        ("logreg.mean_per_class_accuracy>=0.58", True),
        ("retrieval.recall@5>=7e-1", True),
        ("geometry.uniformity<=-2", True),
        ("geometry<-3", False),
        ("robustness.fog>=0.4", True),
        ("robustness.fog.accuracy>=0.41", False),
        ("ridge[patch_mean]>=0.6", True),
        ("ridge.accuracy [cls] >= 0.6", False),
    ],
)
def test_a_requirement_is_met_where_the_score_reaches_it(text: str, is_met: bool) -> None:
    assert (find_unmet([parse_requirement(text)], ROWS) == []) is is_met


def test_what_is_not_met_is_named_with_its_value() -> None:
    requirements = [parse_requirement(text) for text in ("knn20>=0.6", "logreg>0.6", "ridge[cls]>=55%")]
    assert [str(unmet) for unmet in find_unmet(requirements, ROWS)] == [
        "knn20 accuracy of cls must be >= 0.6, got 0.5512",
        "ridge accuracy of cls must be >= 0.55, got 0.5",
    ]


@pytest.mark.parametrize(
    "text", ["", "knn20", "knn20=0.5", "knn20==0.5", ">=0.5", "knn20>=", "knn20 >= 1 2", "a b>=1"]
)
def test_a_text_that_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"require must be PROTOCOL\[.METRIC\] OPERATOR VALUE .*got '"):
        parse_requirement(text)


@pytest.mark.parametrize("value", ["x", "nan", "inf", "0,5"])
def test_a_value_that_is_no_finite_number_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"the value must be a finite number, got '{value}'"):
        parse_requirement(f"knn20>={value}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "knn2>=0.5",
            "there is no protocol 'knn2' in this evaluation; did you mean knn20.; it has geometry, knn20",
        ),
        ("zeroshot.accuracy>=0.5", "there is no protocol 'zeroshot' in this evaluation; it has geometry,"),
        ("knn20.acuracy>=0.5", "knn20 has no metric 'acuracy'; did you mean accuracy.; it has accuracy"),
        ("retrieval>=0.5", "retrieval has several metrics, name one: retrieval.recall@1, retrieval.recall@5"),
        ("ridge>=0.5", r"ridge has several features, name one: ridge\[cls\], ridge\[patch_mean\]"),
        ("knn20[patch_mean]>=0.5", "knn20 has no feature 'patch_mean'; it has cls"),
        ("knn20>=55", r"accuracy is a fraction in \[0, 1\], got 55; write 55% for per cent"),
    ],
)
def test_a_requirement_on_no_score_or_on_several_is_refused_before_the_work_and_after_it(
    text: str, message: str
) -> None:
    requirement = parse_requirement(text)
    with pytest.raises(ValueError, match=message):
        check_requirements([requirement], [row.key for row in ROWS])
    with pytest.raises(ValueError, match=message):
        find_unmet([requirement], ROWS)


def test_a_requirement_on_one_score_is_no_error_before_the_work() -> None:
    requirements = [parse_requirement(text) for text in ("knn20.accuracy>=0.5", "robustness.fog>0")]
    check_requirements(requirements, [row.key for row in ROWS])
