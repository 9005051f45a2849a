"""The identity."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from vflow.bijections._bijection import AbstractBijection


class Identity(AbstractBijection):
    """The identity map, $y = x$.

    Args:
        shape: shape of one event.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> y, log_det = vf.bijections.Identity((2,)).forward_and_log_det(jnp.ones(2))
        >>> print(y, log_det)
        [1. 1.] 0.0
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """`(x, 0)`."""
        return x, jnp.zeros_like(x, shape=())

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """`(y, 0)`."""
        return y, jnp.zeros_like(y, shape=())

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """`(x, 0, score)`."""
        return x, jnp.zeros_like(x, shape=()), score
