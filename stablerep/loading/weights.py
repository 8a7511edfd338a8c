"""Weights into modules: whatever does not fit is named."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

_MAX_NAMES = 5


def fit_weights(
    module: nn.Module, weights: Mapping[str, Tensor], where: str, ignored_prefixes: Sequence[str] = ()
) -> None:
    """Loads weights into a module that must take all of them and lack none.

    Args:
        module: What takes them.
        weights: By the module's own names.
        where: What messages call the file.
        ignored_prefixes: Weights with these beginnings are left out: a classifier that the module has not.

    Raises:
        ValueError: If one is missing, unexpected or of another shape; names them.
    """
    own = module.state_dict()
    given = {key: value for key, value in weights.items() if not key.startswith(tuple(ignored_prefixes))}
    sizes, own_sizes = ({key: list(value.shape) for key, value in of.items()} for of in (given, own))
    complaints = [
        *describe_keys("missing", [key for key in own if key not in given]),
        *describe_keys("unexpected", [key for key in given if key not in own]),
        *describe_shapes(sizes, own_sizes),
    ]
    if complaints:
        raise ValueError(f"{where} does not fit its architecture: {'; '.join(complaints)}")
    module.load_state_dict(given)


def describe_keys(what: str, keys: Sequence[str]) -> list[str]:
    """`missing a, b and 3 more` as a list of one, or an empty one."""
    if not keys:
        return []
    more = f" and {len(keys) - _MAX_NAMES} more" if len(keys) > _MAX_NAMES else ""
    return [f"{what} {', '.join(keys[:_MAX_NAMES])}{more}"]


def describe_shapes(given: Mapping[str, list[int]], own: Mapping[str, list[int]]) -> list[str]:
    """`weight is [3] there and [4] here` for the first of those that differ."""
    return [
        f"{key} is {given[key]} there and {own[key]} here"
        for key in own
        if key in given and given[key] != own[key]
    ][:_MAX_NAMES]


def strip_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
