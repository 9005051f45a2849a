"""Checks of arguments, each naming the function and the argument."""

import operator
from typing import Any

import optax


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
