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
    shapes = [
        f"{key} is {list(given[key].shape)} there and {list(own[key].shape)} here"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    complaints = [
        *describe_keys("missing", [key for key in own if key not in given]),
        *describe_keys("unexpected", [key for key in given if key not in own]),
        *shapes[:_MAX_NAMES],
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


def strip_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
