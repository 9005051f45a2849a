"""Batches of draws."""

import operator
from collections.abc import Callable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from vflow._core._numerics import as_float
from vflow.distributions._distribution import AbstractDistribution


def as_key(key: Any) -> PRNGKeyArray:
    """A typed PRNG key from a typed or a legacy one, or a TypeError."""
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    if shape == () and dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if shape == (2,) and dtype == jnp.uint32:
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(
        f"key must be one PRNG key, as jax.random.key(0) makes it, got {type(key).__name__} of "
        f"shape {shape} and dtype {dtype}."
    )


def sample_and_log_prob(
    key: PRNGKeyArray,
    flow: Any,
    n: SupportsIndex,
    condition: ArrayLike | None = None,
    log_density: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    r"""`n` independent draws and their log densities.

    $$x_i \sim q,\quad \ell_i = \log q(x_i),\quad i = 1, \dots, n$$

    Args:
        key: PRNG key; it is split into one per draw.
        flow: a flow or any distribution.
        n: number of draws, positive.
        condition: None, one condition of `condition_shape` for all draws, or one per draw,
            shape `(n, *condition_shape)`.
        log_density: the target, for families whose draws depend on it (stochastic flows);
            the others ignore it.

    Returns:
        `(x, log_q)`: shapes `(n, *shape)` and `(n,)`.

    Raises:
        ValueError: n is not positive, or a condition that does not fit.
        TypeError: key, flow or n of a wrong type.

    Example:
        >>> import jax, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 3)
        >>> x, log_q = vf.sample_and_log_prob(jax.random.key(1), flow, 5)
        >>> print(x.shape, log_q.shape)
        (5, 3) (5,)
    """
    key = as_key(key)
    if not hasattr(flow, "sample_and_log_prob"):
        raise TypeError(f"flow must be a distribution, got {type(flow).__name__}.")
    try:
        if isinstance(n, bool):
            raise TypeError
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be a positive integer, got {n!r}.") from None
    if n < 1:
        raise ValueError(f"n must be a positive integer, got {n}.")
    # Exact families take no target; only families that declare themselves otherwise see it.
    extra = {} if isinstance(flow, AbstractDistribution) else {"log_density": log_density}

    def draw(key, condition):
        return flow.sample_and_log_prob(key, condition, **extra)

    keys = jax.random.split(key, n)
    if condition is None:
        return jax.vmap(lambda key: draw(key, None))(keys)
    condition = as_float(condition)
    shape = flow.condition_shape
    if shape is None:
        raise ValueError("condition: a condition was given, but the flow is unconditional.")
    if condition.shape == shape:
        return jax.vmap(draw, in_axes=(0, None))(keys, condition)
    if condition.shape == (n, *shape):
        return jax.vmap(draw)(keys, condition)
    raise ValueError(
        f"condition: shape {condition.shape} is neither {shape} (one for all draws) nor "
        f"{(n, *shape)} (one per draw)."
    )
