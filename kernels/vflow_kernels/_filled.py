"""Arrays that are constants, and arrays that are written to memory."""

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


@jax.custom_jvp
def materialised(x: Array) -> Array:
    """x itself, written to memory before it is used.

    XLA fuses the slice of a stack that a loop takes into whatever reads it, and on a CPU a fused
    loop with such a slice in it is not vectorised: three to five times as long. It does not
    fuse a division into several readers. (It removes `jax.lax.optimization_barrier` before it fuses.)
    """
    return x / filled(x, 1.0)


@materialised.defjvp
def _materialised_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return materialised(*primals), tangents[0]
