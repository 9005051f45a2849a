"""Checks of arguments, each naming the function and the argument."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray


def check_key(owner: str, key: Any) -> PRNGKeyArray:
    """A typed key; legacy uint32 keys are wrapped."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != ():
            raise ValueError(f"{owner}: key must be a single key, got shape {key.shape}.")
        return key
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(key)
    raise TypeError(f"{owner}: key must be a PRNG key, jax.random.key(0), got {key!r}.")


def check_count(owner: str, name: str, value: Any) -> int:
    """A positive integer."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be a positive integer, got {value!r}.") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}.")
    return number


def check_callable(owner: str, name: str, value: Any) -> None:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be a function, got {value!r}.")


def check_choice(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of a few values."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {choices}, got {value!r}.")


def check_optimizer(owner: str, optimizer: Any) -> optax.GradientTransformation | None:
    """An optax transformation, or None."""
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    raise TypeError(
        f"{owner}: optimizer must be an optax transformation such as optax.adam(1e-3), got "
        f"{optimizer!r}."
    )
