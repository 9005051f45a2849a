"""Planar maps: the paper's constraint, forward, inverse and score."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow_kernels._root import monotone_root

_MARGIN = 1e-3


def planar_constrain(
    u: Float[Array, " d"], w: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The direction $\hat u$ that makes a planar map invertible, and $c = w^\top\hat u > -1$.

    $$\hat u = u + [m(w^\top u) - w^\top u]\,\frac{w}{\|w\|^2}, \qquad
      m(x) = -1 + \varepsilon + \log(1 + e^x), \qquad \varepsilon = 10^{-3}$$

    The paper has $\varepsilon = 0$: then $c$ rounds to $-1$ for strongly negative $w^\top u$ and the
    log-determinant is $-\infty$ on the plane. $c$ is $m(w^\top u)$ itself, without the rounding
    errors of the product. $w = 0$ gives $\hat u = u$ and $c = 0$.

    Cost: $6d$ flops.

    Args:
        u: free direction, shape (d,).
        w: normal of the plane, shape (d,).

    Returns:
        `(u_hat, c)`; shapes (d,) and ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import planar_constrain
        >>> u_hat, c = planar_constrain(jnp.array([50.0, 0.0]), jnp.array([1.0, 0.0]))
        >>> print(f"{c:.3f}")
        49.001

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770), appendix A.1.
    """
    inner, square = w @ u, w @ w
    tiny = jnp.finfo(w.dtype).eps ** 2
    m = _MARGIN - 1 + jax.nn.softplus(inner)
    u_hat = u + ((m - inner) / (square + tiny)) * w
    c = (square * m + tiny * inner) / (square + tiny)
    return u_hat, c


def tanh_root(c: Float[Array, "*s"], y: Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""The solution $a$ of $a + c\tanh a = y$, elementwise, for $c > -1$.

    A dozen safeguarded Newton steps at most in the bracket $y \pm |c|$; derivatives are implicit.

    Args:
        c: coefficient above -1, any shape.
        y: right-hand side, shape of `c`.

    Returns:
        The root, same shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import tanh_root
        >>> a = tanh_root(jnp.asarray(2.0), jnp.asarray(3.0))
        >>> print(f"{a + 2 * jnp.tanh(a):.4f}")
        3.0000
    """
    # Far from the plane tanh is +-1; within |y| <= c the line through the origin is near. Newton
    # from y itself would take some fifty steps for large c.
    far, near = y - c * jnp.sign(y), y / (1 + jnp.abs(c))
    start = jnp.where(c < 0, y, jnp.where(jnp.abs(y) > c, far, near))
    return monotone_root(_bend, c, y, y - jnp.abs(c), y + jnp.abs(c), start)


def _bend(a: Array, c: Array) -> Array:
    return a + c * jnp.tanh(a)


def planar_forward(
    x: Float[Array, " d"],
    u_hat: Float[Array, " d"],
    c: Float[Array, ""],
    w: Float[Array, " d"],
    b: Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The planar map and its log-determinant.

    $$y = x + \hat u \tanh(a), \quad a = w^\top x + b, \qquad
      \log|\det J| = \log(1 + c\,(1 - \tanh^2 a)), \quad c = w^\top\hat u$$

    Cost: $4d$ flops, one tanh and one log.

    Args:
        x: point, shape (d,).
        u_hat: direction $\hat u$, shape (d,), as `planar_constrain` returns it.
        c: $w^\top\hat u > -1$, shape ().
        w: normal of the plane, shape (d,).
        b: offset, shape ().

    Returns:
        `(y, log_det)`; shapes (d,) and ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import planar_constrain, planar_forward
        >>> w = jnp.array([1.0, 0.0])
        >>> y, log_det = planar_forward(jnp.zeros(2), *planar_constrain(w, w), w, jnp.zeros(()))
        >>> print(y, f"{log_det:.4f}")
        [0. 0.] 0.2733

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770), equations 10 to 12.
    """
    h = jnp.tanh(w @ x + b)
    return x + h * u_hat, jnp.log1p(c * (1 - h**2))


def planar_inverse(
    y: Float[Array, " d"],
    u_hat: Float[Array, " d"],
    c: Float[Array, ""],
    w: Float[Array, " d"],
    b: Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The inverse of `planar_forward`: one scalar root, $a + c\tanh a = w^\top y + b$.

    $$x = y - \hat u\tanh a$$

    Exact to rounding, and so are its derivatives (implicit). Where $c$ is near $-1$ the root is as
    ill-conditioned as the map: errors grow by $1/(1+c) \le 1000$.

    Cost: $4d$ flops and some ten evaluations of tanh.

    Args:
        y: point, shape (d,).
        u_hat: direction $\hat u$, shape (d,), as `planar_constrain` returns it.
        c: $w^\top\hat u > -1$, shape ().
        w: normal of the plane, shape (d,).
        b: offset, shape ().

    Returns:
        `(x, log_det)`; the log-determinant is that of the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import planar_constrain, planar_forward, planar_inverse
        >>> w = jnp.array([1.0, 2.0])
        >>> layer = (*planar_constrain(w, w), w, jnp.zeros(()))
        >>> y, _ = planar_forward(jnp.array([1.0, -3.0]), *layer)
        >>> print(jnp.round(planar_inverse(y, *layer)[0], 4))
        [ 1. -3.]
    """
    h = jnp.tanh(tanh_root(c, w @ y + b))
    return y - h * u_hat, -jnp.log1p(c * (1 - h**2))


def planar_push_score(
    x: Float[Array, " d"],
    score: Float[Array, " d"],
    u_hat: Float[Array, " d"],
    c: Float[Array, ""],
    w: Float[Array, " d"],
    b: Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, " d"]]:
    r"""The score of the density behind a planar map, by the Sherman-Morrison formula.

    With $h = \tanh a$, $h' = 1 - h^2$, $h'' = -2hh'$, $D = 1 + ch'$ and $\kappa = h''c/D$,

    $$s_y = s - \Big[\kappa + \frac{h'}{D}\,(\hat u^\top s - \kappa c)\Big]\,w.$$

    Cost: $4d$ flops more than `planar_forward`; no inverse.

    Args:
        x: point before the map, shape (d,).
        score: score of its density, shape (d,).
        u_hat: direction $\hat u$, shape (d,), as `planar_constrain` returns it.
        c: $w^\top\hat u > -1$, shape ().
        w: normal of the plane, shape (d,).
        b: offset, shape ().

    Returns:
        `(y, log_det, score_y)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import planar_constrain, planar_push_score
        >>> w = jnp.array([1.0, 0.0])
        >>> out = planar_push_score(jnp.zeros(2), w, *planar_constrain(w, w), w, jnp.zeros(()))
        >>> print(jnp.round(out[2], 4))
        [0.7609 0.    ]

    Source:
        Vaitl, Winkler, Richter & Kessel 2024 (arXiv 2403.15881), Proposition 3.2.
    """
    h = jnp.tanh(w @ x + b)
    slope = 1 - h**2
    det = 1 + c * slope
    bend = -2 * h * slope * c / det
    along = bend + slope / det * (u_hat @ score - bend * c)
    return x + h * u_hat, jnp.log1p(c * slope), score - along * w
