"""The batched L-BFGS against closed forms and SciPy: no function feels the others."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from stablerep.evaluation.lbfgs import Evaluation, minimise

NUM_WEIGHTS, NUM_COLUMNS = 6, 3


class LogCosh:
    """f_g(w) = Σ_c Σ_i log cosh(a_gic) + ½ s_g ‖w‖², a_g = x w − t_g; a sum over c, or each c by itself."""

    def __init__(self, num_functions: int, *, has_independent_columns: bool, diagonal: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(20, NUM_WEIGHTS, generator=generator, dtype=torch.float64)
        self.t = 3 * torch.randn(num_functions, 20, NUM_COLUMNS, generator=generator, dtype=torch.float64)
        self.s = torch.logspace(-4, 1, num_functions, dtype=torch.float64)
        self.has_independent_columns = has_independent_columns
        self.diagonal = diagonal
        self.num_evaluations = 0

    def __call__(self, weight: Tensor, which: Tensor, *, with_diagonal: bool) -> Evaluation:
        self.num_evaluations += len(which)
        a = torch.einsum("ip,pgc->gic", self.x, weight) - self.t[which]
        values = (a.abs() + (-2 * a.abs()).exp().log1p() - np.log(2)).sum(dim=1)  # [G, C]
        values = values + self.s[which, None] * weight.square().sum(dim=0) / 2
        gradient = torch.einsum("ip,gic->pgc", self.x, a.tanh()) + self.s[which, None] * weight
        value = values if self.has_independent_columns else values.sum(dim=1, keepdim=True)
        return Evaluation(value[None], gradient, torch.full_like(weight, self.diagonal))

    def minimum(self, number: int) -> np.ndarray:
        """By SciPy."""

        def one(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight = torch.from_numpy(flat).view(NUM_WEIGHTS, 1, NUM_COLUMNS)
            found = self(weight, torch.tensor([number]), with_diagonal=False)
            return float(found.value.sum()), found.gradient.numpy().ravel()

        start = np.zeros(NUM_WEIGHTS * NUM_COLUMNS)
        found = minimize(one, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000})
        weights: np.ndarray = found.x.reshape(NUM_WEIGHTS, NUM_COLUMNS)
        return weights


START = torch.zeros(NUM_WEIGHTS, NUM_COLUMNS, dtype=torch.float64)


# A diagonal that is far too small makes first steps far too long, and the other way round.
@pytest.mark.parametrize("diagonal", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("has_independent_columns", [False, True])
def test_minima_are_scipys(has_independent_columns: bool, diagonal: float) -> None:
    functions = LogCosh(4, has_independent_columns=has_independent_columns, diagonal=diagonal)
    minima = minimise(functions, START, torch.arange(4), tolerance=1e-8, max_iterations=500)
    for number, minimum in enumerate(minima):
        assert minimum.converged
        np.testing.assert_allclose(minimum.weight, functions.minimum(number), atol=1e-6)


@pytest.mark.parametrize("has_independent_columns", [False, True])
def test_functions_side_by_side_end_as_each_alone(has_independent_columns: bool) -> None:
    functions = LogCosh(5, has_independent_columns=has_independent_columns, diagonal=0.01)
    together = minimise(functions, START, torch.arange(5), tolerance=1e-6, max_iterations=500)
    assert len({minimum.num_iterations for minimum in together}) > 1
    for number in (4, 0, 2):
        (alone,) = minimise(functions, START, torch.tensor([number]), tolerance=1e-6, max_iterations=500)
        assert alone.num_iterations == together[number].num_iterations
        torch.testing.assert_close(alone.weight, together[number].weight, atol=1e-9, rtol=0)


def test_minima_come_in_the_order_that_was_asked_for() -> None:
    functions = LogCosh(4, has_independent_columns=False)
    asked = minimise(functions, START, torch.tensor([3, 1]), tolerance=1e-6, max_iterations=500)
    for number, minimum in zip((3, 1), asked, strict=True):
        np.testing.assert_allclose(minimum.weight, functions.minimum(number), atol=1e-4)


def test_a_function_that_is_given_up_is_said_to_be() -> None:
    functions = LogCosh(3, has_independent_columns=False)
    minima = minimise(functions, START, torch.arange(3), tolerance=1e-8, max_iterations=2)
    assert [(m.converged, m.num_iterations) for m in minima] == [(False, 2)] * 3


def test_a_start_at_the_minimum_takes_one_evaluation() -> None:
    functions = LogCosh(1, has_independent_columns=False)
    (minimum,) = minimise(functions, START, torch.tensor([0]), tolerance=1e-7, max_iterations=500)
    functions.num_evaluations = 0
    (again,) = minimise(functions, minimum.weight, torch.tensor([0]), tolerance=1e-6, max_iterations=500)
    assert (again.converged, again.num_iterations, functions.num_evaluations) == (True, 0, 1)
    assert torch.equal(again.weight, minimum.weight)
