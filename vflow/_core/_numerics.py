"""Small numerical helpers that every floor may use."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


def as_float(x: ArrayLike) -> Array:
    """`x` as a floating-point array: floats keep their dtype, the rest takes JAX's default."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
