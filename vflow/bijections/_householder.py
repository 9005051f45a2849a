"""Orthogonal linear map by Householder reflections."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import householder_matvec

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim


class Householder(AbstractBijection):
    r"""A rotation $y = Qx$ as a product of reflections, $Q = H_1\cdots H_k$.

    $$H_i = I - 2\,\frac{v_i v_i^\top}{\|v_i\|^2}, \qquad Q^{-1} = Q^\top, \qquad \log|\det J| = 0$$

    It mixes coordinates and keeps lengths: well conditioned for all parameters. The k vectors are the
    trained leaf; dim of them (dim - 1 where dim is odd) reach every rotation. They start in equal pairs,
    whose reflections cancel: the map starts at the identity, hence k is even.

    Args:
        key: PRNG key of the vectors.
        dim: number of coordinates.
        num_reflections: k, even; by default 8, or fewer where dim is less than 7.

    Raises:
        ValueError: a number of reflections that is odd or below 2.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Householder(jax.random.key(0), 3)
        >>> y, log_det = layer.forward_and_log_det(jnp.array([1.0, 2.0, 3.0]))
        >>> print(jnp.round(y, 4), log_det)
        [1. 2. 3.] 0.0

    Source:
        Tomczak & Welling 2016 (arXiv 1611.09630), section 3; Householder 1958.
    """

    vectors: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, dim: int, num_reflections: int | None = None):
        check_dim("Householder", dim)
        if num_reflections is None:
            num_reflections = min(8, dim + dim % 2)
        if not isinstance(num_reflections, int) or num_reflections < 2 or num_reflections % 2:
            raise ValueError(
                "Householder: num_reflections must be an even integer of at least 2 (pairs cancel at "
                f"the start), got {num_reflections!r}."
            )
        half = jax.random.normal(key, (num_reflections // 2, dim))
        self.vectors = jnp.repeat(half, 2, axis=0)
        self.shape = (dim,)
        self.condition_shape = None

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(Qx, 0)$."""
        return householder_matvec(self.vectors, x), jnp.zeros_like(x, shape=())

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(Q^\top y, 0)$."""
        return householder_matvec(self.vectors, y, transpose=True), jnp.zeros_like(y, shape=())

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score turns with the point: $Qs$."""
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, householder_matvec(self.vectors, score)
