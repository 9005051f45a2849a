"""Elementwise affine map."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from vflow._core._numerics import as_float
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_positive


class Affine(AbstractBijection):
    r"""The elementwise affine map $y = \sigma x + \mu$ with $\sigma = e^{\lambda} > 0$.

    The trained leaves are `loc` ($\mu$) and `log_scale` ($\lambda$), so that a step of an optimiser
    is relative in $\sigma$ whatever its size, and $\log|\det J| = \sum_i \lambda_i$ is exact.

    Args:
        loc: $\mu$, any shape.
        scale: $\sigma > 0$; broadcast with `loc` to the shape of the event.

    Raises:
        ValueError: a scale that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> affine = vf.bijections.Affine(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]))
        >>> print(affine.forward_and_log_det(jnp.zeros(2))[0])
        [1. 2.]
    """

    loc: Array
    log_scale: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True, default=None)

    def __init__(self, loc: ArrayLike = 0.0, scale: ArrayLike = 1.0):
        loc, scale = as_float(loc), as_float(scale)
        check_positive("Affine", "scale", scale)
        self.shape = jnp.broadcast_shapes(loc.shape, scale.shape)
        self.loc = jnp.broadcast_to(loc, self.shape)
        self.log_scale = jnp.broadcast_to(jnp.log(scale), self.shape)
        self.condition_shape = None

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(\sigma x + \mu, \sum_i \lambda_i)$."""
        return x * jnp.exp(self.log_scale) + self.loc, jnp.sum(self.log_scale)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$((y - \mu) / \sigma, -\sum_i \lambda_i)$."""
        return (y - self.loc) * jnp.exp(-self.log_scale), -jnp.sum(self.log_scale)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $s / \sigma$."""
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score * jnp.exp(-self.log_scale)
