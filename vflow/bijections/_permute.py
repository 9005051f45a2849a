"""Permutations of the coordinates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(
        unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False
    )


def permuted(x: Array, order: Array, inverse: Array) -> Array:
    """`x[order]`, whose derivative is gathered by the inverse: that of an index is a slow scatter."""
    return jax.lax.custom_linear_solve(
        lambda y: _take(y, inverse),
        x,
        lambda _, x: _take(x, order),
        transpose_solve=lambda _, y: _take(y, inverse),
    )


class Permute(AbstractBijection):
    r"""A fixed permutation of the coordinates, $y_i = x_{\pi(i)}$.

    Args:
        permutation: the indices $\pi(0), \dots, \pi(d-1)$, each of 0 to d - 1 once.

    Raises:
        ValueError: indices that are no permutation.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> permute = vf.bijections.Permute(jnp.array([2, 0, 1]))
        >>> print(permute.forward_and_log_det(jnp.array([1.0, 2.0, 3.0]))[0])
        [3. 1. 2.]
    """

    permutation: Array
    inverse_permutation: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, permutation: ArrayLike):
        permutation = jnp.asarray(permutation)
        if permutation.ndim != 1 or not jnp.issubdtype(permutation.dtype, jnp.integer):
            raise ValueError(
                "Permute: permutation must be a vector of integers, got shape "
                f"{permutation.shape} and dtype {permutation.dtype}."
            )
        size = permutation.shape[0]
        if not isinstance(permutation, Tracer) and not np.array_equal(
            np.sort(permutation), np.arange(size)
        ):
            raise ValueError(
                f"Permute: permutation must hold each of 0 to {size - 1} once, got {permutation}."
            )
        self.permutation = permutation.astype(jnp.int32)
        self.inverse_permutation = jnp.argsort(self.permutation).astype(jnp.int32)
        self.shape = (size,)
        self.condition_shape = None

    def _forward(self, x: Array) -> Array:
        return permuted(x, self.permutation, self.inverse_permutation)

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(x_\pi, 0)$."""
        return self._forward(x), jnp.zeros_like(x, shape=())

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(y_{\pi^{-1}}, 0)$."""
        x = permuted(y, self.inverse_permutation, self.permutation)
        return x, jnp.zeros_like(y, shape=())

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The score is permuted in the same way."""
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, self._forward(score)


class Flip(AbstractBijection):
    r"""The reversal of the coordinates, $y_i = x_{d-1-i}$; its own inverse, without parameters.

    Args:
        dim: number of coordinates.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> print(vf.bijections.Flip(3).forward_and_log_det(jnp.array([1.0, 2.0, 3.0]))[0])
        [3. 2. 1.]
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, dim: int):
        check_dim("Flip", dim)
        self.shape = (dim,)
        self.condition_shape = None

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """`(x reversed, 0)`."""
        return x[::-1], jnp.zeros_like(x, shape=())

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """`(y reversed, 0)`."""
        return y[::-1], jnp.zeros_like(y, shape=())

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The score is reversed too."""
        return x[::-1], jnp.zeros_like(x, shape=()), score[::-1]
