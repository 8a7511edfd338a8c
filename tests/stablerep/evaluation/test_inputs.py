import pytest
import torch

from stablerep.evaluation import inputs
from stablerep.evaluation.inputs import check_features, check_labels, normalize_embeddings


@pytest.mark.parametrize("row", [0, 7, 19, 20, 22])
def test_the_first_row_that_is_not_finite_is_named(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_NUM_VALUES_PER_SLICE", 30)  # ten rows a slice, a ragged end
    features = torch.zeros(23, 3)
    check_features("x", features)
    features[row, 1] = torch.inf
    features[-1, 2] = torch.nan
    with pytest.raises(ValueError, match=f"x must be finite, got a row {row} that is not"):
        check_features("x", features)


def test_odd_shapes_and_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be \[N, D\], got \[4\]"):
        check_features("x", torch.zeros(4))
    with pytest.raises(ValueError, match=r"x must be \[N, 3\], got \[4, 2\]"):
        check_features("x", torch.zeros(4, 2), width=3)
    with pytest.raises(ValueError, match="x must be >= 5, got 4"):
        check_features("x", torch.zeros(4, 2), at_least=5)
    with pytest.raises(ValueError, match=r"y must be \[3\], got \[3, 1\]"):
        check_labels("y", torch.zeros(3, 1), 3)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=r"y must be in \[0, 2\), got"):
            check_labels("y", torch.tensor([0, wrong, 1]), 3, 2)


def test_unit_embeddings_keep_float64_and_no_other_type() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        found = normalize_embeddings("x", torch.tensor([[3.0, 4.0]], dtype=dtype))
        assert found.dtype == expected
        assert found.tolist() == [pytest.approx([0.6, 0.8])]
    for odd in (0.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="x must be finite and other than zero"):
            normalize_embeddings("x", torch.tensor([[1.0, 1.0], [odd, 0.0]]))
