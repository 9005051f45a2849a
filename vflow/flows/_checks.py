"""Checks of the arguments that flow constructors share."""

from typing import Any

from vflow.bijections import AbstractBijection
from vflow.distributions import AbstractDistribution, Normal


def check_count(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}.")


def check_widths(owner: str, name: str, value: Any) -> tuple[int, ...]:
    """Hidden widths as a tuple; raise ValueError unless all are positive integers."""
    if not isinstance(value, tuple | list):
        raise ValueError(f"{owner}: {name} must be a tuple of widths, got {value!r}.")
    for width in value:
        check_count(owner, f"{name} (each width)", width)
    return tuple(value)


def check_common(
    owner: str,
    dim: Any,
    *,
    num_layers: Any = 1,
    condition_dim: Any = None,
    base: Any = None,
    tails: Any = None,
) -> tuple[AbstractDistribution, tuple[AbstractBijection, ...]]:
    """Base and last layers of a flow, after checks of the arguments that every flow has."""
    check_count(owner, "dim", dim)
    check_count(owner, "num_layers", num_layers)
    if condition_dim is not None:
        check_count(owner, "condition_dim", condition_dim)
    return check_base(owner, base, dim), check_tails(owner, tails, dim)


def check_base(owner: str, base: Any, dim: int) -> AbstractDistribution:
    """The base distribution, standard normal by default, on `(dim,)`."""
    if base is None:
        return Normal(dim)
    if not isinstance(base, AbstractDistribution):
        raise TypeError(f"{owner}: base must be a distribution, got {type(base).__name__}.")
    if base.shape != (dim,):
        raise ValueError(f"{owner}: base has event shape {base.shape}, expected {(dim,)}.")
    return base


def check_tails(owner: str, tails: Any, dim: int) -> tuple[AbstractBijection, ...]:
    """The last layers of a flow: none, or one bijection on `(dim,)`."""
    if tails is None:
        return ()
    if not isinstance(tails, AbstractBijection):
        raise TypeError(f"{owner}: tails must be a bijection, got {type(tails).__name__}.")
    if tails.shape != (dim,):
        raise ValueError(f"{owner}: tails has shape {tails.shape}, expected {(dim,)}.")
    return (tails,)
