"""From an objective program to an unbiased estimator of its expectation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import ProgramError, combine, partition
from vflow.programs._frame import Frame, running


def expect(
    objective: Callable[..., Array], num_samples: int = 1, *, gradient: str = "total"
) -> Callable[..., Array]:
    """Turn an objective program into `S(key, *args)`: value and gradient unbiased.

    Args:
        objective: a function whose return value's expectation is the objective; a scalar.
        num_samples: independent runs that are averaged.
        gradient: what `simulate()` defaults to inside, "total" or "path".

    Returns:
        `S(key, *args) -> scalar`.
    """
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}.")

    def run(key, args):
        with running(Frame(key, gradient=gradient)):
            value = jnp.asarray(objective(*args))
        if value.shape != ():
            raise ProgramError(f"an objective must return a scalar, got shape {value.shape}.")
        return value

    def estimate(key: PRNGKeyArray, *args: Any) -> Array:
        if num_samples == 1:
            return run(key, args)
        keys = jax.random.split(key, num_samples)
        return jax.vmap(lambda key: run(key, args))(keys).mean()

    return estimate


def value_and_grad(estimate: Callable[..., Array], argnum: int = 0) -> Callable[..., tuple[Array, Any]]:
    """`(key, *args) -> (value, gradient)` with respect to the trainable leaves of one argument.

    Args:
        estimate: `S(key, *args)`, as `vf.expect` returns it.
        argnum: which of `args` to differentiate.

    Returns:
        A function; the gradient has the structure of `vf.params(args[argnum])`.
    """

    def wrapped(key: PRNGKeyArray, *args: Any) -> tuple[Array, Any]:
        trainable, static = partition(args[argnum])

        def loss(trainable):
            full = list(args)
            full[argnum] = combine(trainable, static)
            return estimate(key, *full)

        return jax.value_and_grad(loss)(trainable)

    return wrapped
