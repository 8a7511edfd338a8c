"""L-BFGS for several functions at once, side by side: each has its own steps, pairs and end.

Of G functions f_g of weights [P, C] the weights are [P, G, C], so that one call gives the values and the
gradients of all. Where the columns of C do not depend on each other, each is a function of its own.

The inverse Hessian starts from a diagonal H₀ that the functions state, times sᵀy / yᵀH₀y; a step, at first
of 1, is shortened until it decreases the function enough.

Reference: Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MEMORY = 10
NUM_ARRAYS_IN_MEMORY = 2 * MEMORY + 12
"""Arrays of the size of the weights [P, G, C] that are alive at a time, at most."""
_SUFFICIENT_DECREASE = 1e-4
_ROUNDING = 1e-13
_MAX_STEPS_OF_LINE_SEARCH = 20
_SMALLEST_CURVATURE = 1e-12


class Evaluation(NamedTuple):
    """Functions at their weights.

    Attributes:
        value: f_g; where the columns are independent, of each column.
        gradient: Its derivative by the weights.
        diagonal: About its second derivatives by each weight, >= 0; None where it was not asked for.

    Shapes:
        value [1, G, 1] or [1, G, C], gradient, diagonal [P, G, C].
    """

    value: Tensor
    gradient: Tensor
    diagonal: Tensor | None


class Functions(Protocol):
    """What is minimised: convex functions f_g of weights [P, C]."""

    @property
    def has_independent_columns(self) -> bool:
        """Whether the columns of C are functions of their own."""

    def __call__(self, weight: Tensor, which: Tensor, *, with_diagonal: bool) -> Evaluation:
        """The functions `which` [G] at the weights [P, G, C]."""


class Minimum(NamedTuple):
    """Where L-BFGS ended.

    Attributes:
        weight: [P, C].
        converged: Whether the gradient of each column was within the tolerance.
        num_iterations: Iterations until then.
    """

    weight: Tensor
    converged: bool
    num_iterations: int


def minimise(
    functions: Functions, first_guess: Tensor, which: Tensor, *, tolerance: float, max_iterations: int
) -> list[Minimum]:
    """The minima of some functions, each until it has converged or is given up.

    Args:
        functions: The functions.
        first_guess: Where all of them start.
        which: Numbers of those that are minimised.
        tolerance: Converged is where the gradient has, in each column of C, at most this 2-norm.
        max_iterations: Iterations after which a function is given up.

    Shapes:
        first_guess [P, C], which [G].

    Returns:
        The minima in the order of `which`.
    """
    weight = first_guess[:, None].repeat(1, len(which), 1)
    found = functions(weight, which, with_diagonal=True)
    assert found.diagonal is not None
    scale = torch.ones_like(found.value)
    state = _State(which, weight, found.value, found.gradient, found.diagonal, scale, pairs=[])
    minima: dict[int, Minimum] = {}
    for iteration in range(max_iterations + 1):
        converged = state.gradient.square().sum(dim=0).amax(dim=1).sqrt() <= tolerance
        finished = converged | (iteration == max_iterations)
        if finished.any():
            for column in finished.nonzero().flatten().tolist():
                minimum = Minimum(state.weight[:, column].clone(), bool(converged[column]), iteration)
                minima[int(state.which[column])] = minimum
            kept = (~finished).nonzero().flatten()
            if not len(kept):
                break
            state = state.keep(kept)
        # The second derivatives change fast at first, slowly later.
        _step(functions, state, renew_diagonal=(iteration + 1) & iteration == 0)
    return [minima[number] for number in which.tolist()]


@dataclass
class _State:
    """Where L-BFGS stands: the functions that go on, their weights, and what it has learnt.

    Shapes:
        which [G], weight, gradient, diagonal [P, G, C], value, scale [1, G, 1 or C]; of each pair s, y
        [P, G, C] and 1/sᵀy [1, G, 1 or C], oldest first.
    """

    which: Tensor
    weight: Tensor
    value: Tensor
    gradient: Tensor
    diagonal: Tensor
    scale: Tensor
    pairs: list[tuple[Tensor, Tensor, Tensor]]

    def keep(self, columns: Tensor) -> "_State":
        def take(each: Tensor) -> Tensor:
            return each.index_select(1, columns)

        return _State(
            self.which[columns],
            take(self.weight),
            take(self.value),
            take(self.gradient),
            take(self.diagonal),
            take(self.scale),
            [(take(s), take(y), take(inverse_product)) for s, y, inverse_product in self.pairs],
        )


def _step(functions: Functions, state: _State, *, renew_diagonal: bool) -> None:
    """One iteration, in place."""
    dims = (0,) if functions.has_independent_columns else (0, 2)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=dims, keepdim=True)

    initial = state.scale / state.diagonal.clamp(min=_SMALLEST_CURVATURE)
    direction = -_multiply_by_inverse_hessian(state.gradient, state.pairs, initial, dot)
    step, found = _search_line(functions, state, direction, dot, with_diagonal=renew_diagonal)
    s = direction.mul_(step)
    y = found.gradient - state.gradient
    state.weight = state.weight + s
    state.value, state.gradient = found.value, found.gradient
    product = dot(s, y)
    valid = product > 0
    state.pairs.append((s, y, torch.where(valid, 1 / product, 0.0)))
    del state.pairs[:-MEMORY]
    if found.diagonal is not None:
        state.diagonal = found.diagonal
    expected = dot(y, y / state.diagonal.clamp(min=_SMALLEST_CURVATURE))
    state.scale = torch.where(valid, product / expected, state.scale)


def _search_line(
    functions: Functions,
    state: _State,
    direction: Tensor,
    dot: Callable[[Tensor, Tensor], Tensor],
    *,
    with_diagonal: bool,
) -> tuple[Tensor, Evaluation]:
    """Steps that decrease the functions enough, and the functions there."""
    slope = dot(state.gradient, direction)
    step = torch.ones_like(slope)
    found = functions(state.weight + direction, state.which, with_diagonal=with_diagonal)
    for _ in range(_MAX_STEPS_OF_LINE_SEARCH - 1):
        change = found.value - state.value
        # Near the minimum a decrease drowns in the rounding of the value itself.
        rounding = _ROUNDING * (1 + state.value.abs())
        enough = change <= _SUFFICIENT_DECREASE * step * slope + rounding
        if enough.all():
            break
        parabola = -slope * step.square() / (2 * (change - slope * step))
        shorter = torch.maximum(0.1 * step, torch.minimum(0.5 * step, parabola))
        step = torch.where(enough, step, shorter)
        again = (~enough).any(dim=2)[0].nonzero().flatten()
        weight = state.weight[:, again] + step[:, again] * direction[:, again]
        part = functions(weight, state.which[again], with_diagonal=with_diagonal)
        for whole, of_part in zip(found, part, strict=True):
            if whole is not None and of_part is not None:
                whole[:, again] = of_part
    return step, found


def _multiply_by_inverse_hessian(
    gradient: Tensor,
    history: list[tuple[Tensor, Tensor, Tensor]],
    initial: Tensor,
    dot: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The two loops of L-BFGS over the pairs (s, y, 1/sᵀy), oldest first."""
    result = gradient
    coefficients = []
    for s, y, inverse_product in reversed(history):
        coefficient = inverse_product * dot(s, result)
        coefficients.append(coefficient)
        result = result - coefficient * y
    result = initial * result
    for (s, y, inverse_product), coefficient in zip(history, reversed(coefficients), strict=True):
        result = result + (coefficient - inverse_product * dot(y, result)) * s
    return result
