"""Sylvester layer."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from vflow_kernels import (
    householder_columns,
    sylvester_forward,
    sylvester_inverse,
    sylvester_push_score,
)

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim

_VARIANTS = ("orthogonal", "householder", "triangular")
_LARGEST = math.sqrt(1 - 1e-3)


class Sylvester(AbstractBijection):
    r"""A Sylvester layer: a planar layer of rank $M$, one hidden layer with $M$ units.

    $$y = x + Q R_1\tanh(R_2 Q^\top x + b)$$

    $Q$ has $M$ orthonormal columns; $R_1$, $R_2$ are upper triangular, their diagonals
    $\sqrt{1 - \varepsilon}\tanh(\cdot)$ with $\varepsilon = 10^{-3}$, so that the map is invertible
    for all parameters. (The paper has $\varepsilon = 0$: then saturated diagonals round to a
    singular map.) The inverse is exact: back-substitution with one scalar root a row. The layer
    starts at the identity, $R_1 = 0$, with $R_2$ and $Q$ random: the gradient for $R_1$ is not zero
    there.

    The variants differ in $Q$. "orthogonal": the orthonormal factor (QR) of a free $d \times M$
    matrix; "householder": the first columns of a product of reflections; "triangular": columns of
    the identity in a fixed `order`, so that the layer acts on M of the coordinates (all of them for
    $M = d$, where the Jacobian is triangular).

    Args:
        key: PRNG key.
        dim: number of coordinates $d$.
        rank: number of hidden units $M$, from 1 to $d$.
        variant: "orthogonal", "householder" or "triangular".
        num_reflections: number of reflections of "householder".
        order: for "triangular", the coordinates the layer acts on, `rank` distinct integers; by
            default 0, 1, ...

    Raises:
        ValueError: a rank outside 1 to `dim`, an unknown variant, an order that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Sylvester(jax.random.key(0), 3, rank=2)
        >>> print(layer.forward_and_log_det(jnp.ones(3))[0])
        [1. 1. 1.]

    Source:
        van den Berg, Hasenclever, Tomczak & Welling 2018 (arXiv 1803.05649), sections 3 and 4 (which
        orthonormalises by an iteration where this layer uses QR, and sets $M = d$ in the last two
        variants).
    """

    basis: Array
    raw_r1: Array
    raw_r2: Array
    bias: Array
    variant: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        rank: int = 1,
        *,
        variant: str = "orthogonal",
        num_reflections: int = 8,
        order: ArrayLike | None = None,
    ):
        check_dim("Sylvester", dim)
        if not 1 <= rank <= dim:
            raise ValueError(f"Sylvester: rank must be between 1 and dim = {dim}, got {rank}.")
        if variant not in _VARIANTS:
            raise ValueError(f"Sylvester: variant must be one of {_VARIANTS}, got {variant!r}.")
        if num_reflections < 1:
            raise ValueError(
                f"Sylvester: num_reflections must be at least 1, got {num_reflections}."
            )
        if order is not None and variant != "triangular":
            raise ValueError(f"Sylvester: order is for variant='triangular', not {variant!r}.")
        basis_key, r2_key, bias_key = jax.random.split(key, 3)
        if variant == "orthogonal":
            self.basis = jax.random.normal(basis_key, (dim, rank))
        elif variant == "householder":
            self.basis = jax.random.normal(basis_key, (num_reflections, dim))
        else:
            order = jnp.asarray(range(rank) if order is None else order)
            _check_order(order, rank, dim)
            self.basis = order.astype(jnp.int32)
        self.raw_r1 = jnp.zeros((rank, rank))
        self.raw_r2 = jax.random.normal(r2_key, (rank, rank))
        self.bias = 0.1 * jax.random.normal(bias_key, (rank,))
        self.variant = variant
        self.shape = (dim,)
        self.condition_shape = None

    @property
    def columns(self) -> Array:
        """$Q$, shape (dim, rank)."""
        (dim,), (rank,) = self.shape, self.bias.shape
        if self.variant == "orthogonal":
            return jnp.linalg.qr(self.basis)[0]
        if self.variant == "householder":
            return householder_columns(self.basis, rank)
        return (jnp.arange(dim, dtype=jnp.int32)[:, None] == self.basis[None, :]).astype(
            self.bias.dtype
        )

    def _params(self) -> tuple[Array, Array, Array, Array]:
        """The arguments of the kernels: Q, R1, R2 and b."""
        return self.columns, _upper(self.raw_r1), _upper(self.raw_r2), self.bias

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """Two products with $Q$ and one with each triangle."""
        return sylvester_forward(x, *self._params())

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One scalar root a row of the triangles, from the last to the first."""
        return sylvester_inverse(y, *self._params())

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """By the Woodbury identity: two more products with $Q$, no inverse."""
        return sylvester_push_score(x, score, *self._params())


def _check_order(order: Array, rank: int, dim: int) -> None:
    good = order.shape == (rank,) and jnp.issubdtype(order.dtype, jnp.integer)
    if good and not isinstance(order, Tracer):
        entries = set(order.tolist())
        good = len(entries) == rank and entries <= set(range(dim))
    if not good:
        raise ValueError(
            f"Sylvester: order must hold {rank} distinct integers (the rank) from 0 to {dim - 1}, "
            f"got {order}."
        )


def _upper(raw: Array) -> Array:
    """An upper triangle whose diagonal lies strictly between -1 and 1."""
    return jnp.triu(raw, 1) + jnp.diag(_LARGEST * jnp.tanh(jnp.diagonal(raw)))
