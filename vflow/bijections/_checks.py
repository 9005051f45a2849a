"""Checks of constructor arguments; on traced values they do nothing."""

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array


def check_positive(owner: str, name: str, value: Array) -> None:
    """Raise ValueError unless every entry of `value` is positive and finite."""
    if isinstance(value, Tracer):
        return
    if not bool(jnp.all((value > 0) & jnp.isfinite(value))):
        raise ValueError(f"{owner}: {name} must be positive and finite, got {value}.")


def condition_shape(owner: str, condition_dim: int | None) -> tuple[int, ...] | None:
    """The shape of the condition of a layer; ValueError unless None or an integer of at least 1."""
    if condition_dim is None:
        return None
    if not isinstance(condition_dim, int) or condition_dim < 1:
        raise ValueError(
            f"{owner}: condition_dim must be None or an integer of at least 1, "
            f"got {condition_dim!r}."
        )
    return (condition_dim,)


def check_dim(owner: str, dim: int, least: int = 1) -> None:
    """Raise ValueError unless `dim` is an integer of at least `least`."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < least:
        raise ValueError(f"{owner}: dim must be an integer of at least {least}, got {dim!r}.")
