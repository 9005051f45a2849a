"""Constant arrays that stay where they are used."""

import jax
from jaxtyping import Array


def filled(x: Array, value: float) -> Array:
    """`jnp.full_like(x, value)`, with NaN where x has it.

    JAX moves constant arrays out of a `lax.scan` that is differentiated, one copy for each use. Each
    is then read from memory in every step, and XLA does not see that the copies are equal: the two
    tracks of a path gradient, equal up to there, are computed twice from there on. This constant
    depends on x, and costs nothing once fused.
    """
    x = jax.lax.stop_gradient(x)
    return jax.lax.clamp(x.dtype.type(value), x, x.dtype.type(value))
