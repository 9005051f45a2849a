"""Sylvester maps: planar maps of rank M with a triangular determinant."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow_kernels._planar import tanh_root


def householder_columns(vectors: Float[Array, "k d"], rank: int) -> Float[Array, "d {rank}"]:
    r"""The first columns of a product of reflections, $H_1 \cdots H_k\,[e_1 \dots e_M]$.

    $$H_i = I - 2\,\frac{v_i v_i^\top}{\|v_i\|^2}$$

    The columns are orthonormal. A vector of zeros reflects nothing.

    Cost: $4kdM$ flops.

    Args:
        vectors: $v_1, \dots, v_k$, shape (k, d).
        rank: number of columns $M$, at most d.

    Returns:
        Matrix of shape (d, M).

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import householder_columns
        >>> print(householder_columns(jnp.ones((1, 2)), 1)[:, 0])
        [ 0. -1.]
    """
    tiny = jnp.finfo(vectors.dtype).tiny

    def reflect(columns, v):
        return columns - jnp.outer(2 * v / (v @ v + tiny), v @ columns), None

    start = jnp.eye(vectors.shape[1], rank, dtype=vectors.dtype) + 0 * vectors[0, 0]
    return jax.lax.scan(reflect, start, vectors, reverse=True)[0]


def sylvester_forward(
    x: Float[Array, " d"],
    q: Float[Array, "d m"],
    r1: Float[Array, "m m"],
    r2: Float[Array, "m m"],
    b: Float[Array, " m"],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The Sylvester map and its log-determinant.

    $$y = x + Q R_1 \tanh(a), \quad a = R_2 Q^\top x + b, \qquad
      \log|\det J| = \sum_i \log(1 + \delta_i\,(1 - \tanh^2 a_i)), \quad
      \delta_i = (R_1)_{ii}(R_2)_{ii}$$

    Cost: $4dM + 4M^2$ flops, $M$ tanh and $M$ logs.

    Args:
        x: point, shape (d,).
        q: orthonormal columns, shape (d, M).
        r1: upper triangular, shape (M, M).
        r2: upper triangular, shape (M, M); $\delta_i > -1$.
        b: offsets, shape (M,).

    Returns:
        `(y, log_det)`; shapes (d,) and ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import sylvester_forward
        >>> q, r, b = jnp.eye(3, 1), 0.5 * jnp.ones((1, 1)), jnp.zeros(1)
        >>> y, log_det = sylvester_forward(jnp.zeros(3), q, r, r, b)
        >>> print(y, f"{log_det:.4f}")
        [0. 0. 0.] 0.2231

    Source:
        van den Berg, Hasenclever, Tomczak & Welling 2018 (arXiv 1803.05649), equations 7 to 9.
    """
    h = jnp.tanh(r2 @ (x @ q) + b)
    return x + q @ (r1 @ h), _log_det(h, r1, r2)


def _log_det(h: Array, r1: Array, r2: Array) -> Array:
    return jnp.sum(jnp.log1p(jnp.diagonal(r1) * jnp.diagonal(r2) * (1 - h**2)))


def sylvester_inverse(
    y: Float[Array, " d"],
    q: Float[Array, "d m"],
    r1: Float[Array, "m m"],
    r2: Float[Array, "m m"],
    b: Float[Array, " m"],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The inverse of `sylvester_forward`: back-substitution with one scalar root a row.

    $v = Q^\top x$ solves $v + R_1\tanh(R_2 v + b) = Q^\top y$. From the last row to the first,
    everything in row $i$ but $v_i$ is known, and $a_i + \delta_i\tanh a_i$ equals a known number.

    Cost: $4dM + 4M^2$ flops and some ten evaluations of tanh a row, one row after the other.

    Args:
        y: point, shape (d,).
        q: orthonormal columns, shape (d, M).
        r1: upper triangular, shape (M, M).
        r2: upper triangular, shape (M, M); $\delta_i > -1$.
        b: offsets, shape (M,).

    Returns:
        `(x, log_det)`; the log-determinant is that of the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import sylvester_forward, sylvester_inverse
        >>> q, r, b = jnp.eye(3, 2), jnp.triu(0.5 * jnp.ones((2, 2))), jnp.zeros(2)
        >>> y, _ = sylvester_forward(jnp.array([1.0, -2.0, 3.0]), q, r, r, b)
        >>> print(jnp.round(sylvester_inverse(y, q, r, r, b)[0], 4))
        [ 1. -2.  3.]
    """

    def row(known, inputs):
        v, h = known  # entries up to this row are still zero
        i, r1_row, r2_row, target, offset = inputs
        rest = target - r1_row @ h
        a = tanh_root(r1_row[i] * r2_row[i], r2_row[i] * rest + r2_row @ v + offset)
        here = jnp.tanh(a)
        return (v.at[i].set(rest - r1_row[i] * here), h.at[i].set(here)), None

    target = y @ q
    zero = jnp.zeros_like(target)
    rows = (jnp.arange(b.size), r1, r2, target, b)
    (_, h), _ = jax.lax.scan(row, (zero, zero), rows, reverse=True)
    return y - q @ (r1 @ h), -_log_det(h, r1, r2)


def sylvester_push_score(
    x: Float[Array, " d"],
    score: Float[Array, " d"],
    q: Float[Array, "d m"],
    r1: Float[Array, "m m"],
    r2: Float[Array, "m m"],
    b: Float[Array, " m"],
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, " d"]]:
    r"""The score of the density behind a Sylvester map, by the Woodbury identity.

    With $h' = 1 - \tanh^2 a$ and $h'' = -2\tanh(a)\,h'$,

    $$w = Q^\top s - R_2^\top\,\frac{h''\delta}{1 + h'\delta}, \qquad
      (I + R_2^\top\operatorname{diag}(h')R_1^\top)\,v = w, \qquad
      s_y = s + Q\,(v - Q^\top s).$$

    The system is lower triangular; it is solved row by row without being formed.

    Cost: $4dM + 8M^2$ flops more than `sylvester_forward`; no inverse.

    Args:
        x: point before the map, shape (d,).
        score: score of its density, shape (d,).
        q: orthonormal columns, shape (d, M).
        r1: upper triangular, shape (M, M).
        r2: upper triangular, shape (M, M); $\delta_i > -1$.
        b: offsets, shape (M,).

    Returns:
        `(y, log_det, score_y)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import sylvester_push_score
        >>> q, r, b = jnp.eye(2, 1), 0.5 * jnp.ones((1, 1)), jnp.zeros(1)
        >>> print(sylvester_push_score(jnp.zeros(2), jnp.ones(2), q, r, r, b)[2])
        [0.8 1. ]

    Source:
        Vaitl, Winkler, Richter & Kessel 2024 (arXiv 2403.15881), Proposition 3.2.
    """
    h = jnp.tanh(r2 @ (x @ q) + b)
    slope = 1 - h**2
    delta = jnp.diagonal(r1) * jnp.diagonal(r2)
    det = 1 + slope * delta
    inner = score @ q

    def row(known, inputs):
        # known is R1^T v with the entries of v so far
        r1_row, r2_column, right, det = inputs
        v = (right - r2_column @ (slope * known)) / det
        return known + v * r1_row, v

    right = inner + (2 * h * slope * delta / det) @ r2
    _, v = jax.lax.scan(row, jnp.zeros_like(right), (r1, r2.T, right, det))
    return x + q @ (r1 @ h), jnp.sum(jnp.log1p(slope * delta)), score + q @ (v - inner)
