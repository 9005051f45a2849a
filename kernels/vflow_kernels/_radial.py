"""Radial maps: constraint, forward, closed-form inverse and score."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MARGIN = 1e-3


def radial_constrain(
    raw_alpha: Float[Array, ""], raw_beta: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Positive $\alpha$ and $\beta > -\alpha$, for which the radial map is invertible.

    $$\alpha = \varepsilon + \log(1 + e^{\hat\alpha}), \qquad
      \beta = -(1 - \varepsilon)\,\alpha + \log(1 + e^{\hat\beta}), \qquad \varepsilon = 10^{-3}$$

    The paper has $\varepsilon = 0$, which rounds to a singular map for strongly negative parameters.

    Args:
        raw_alpha: $\hat\alpha$, unbounded, shape ().
        raw_beta: $\hat\beta$, unbounded, shape ().

    Returns:
        `(alpha, beta)`, shapes ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import radial_constrain
        >>> alpha, beta = radial_constrain(jnp.asarray(0.0), jnp.asarray(-1e4))
        >>> print(f"{alpha:.4f} {beta:.4f}")
        0.6941 -0.6935

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770), appendix A.2.
    """
    alpha = _MARGIN + jax.nn.softplus(raw_alpha)
    return alpha, (_MARGIN - 1) * alpha + jax.nn.softplus(raw_beta)


def _distance(offset: Array) -> Array:
    """The length of a vector, with derivative zero at the origin instead of NaN."""
    square = offset @ offset
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)


def _factors(r: Array, alpha: Array, beta: Array, dim: int) -> tuple[Array, Array, Array, Array]:
    """h = 1 / (alpha + r), stretch across (A) and along (B) the radius, log-determinant."""
    h = 1 / (alpha + r)
    across, along = beta * h, alpha * beta * h**2
    log_det = (dim - 1) * jnp.log1p(across) + jnp.log1p(along)
    return h, 1 + across, 1 + along, log_det


def radial_forward(
    x: Float[Array, " d"],
    centre: Float[Array, " d"],
    alpha: Float[Array, ""],
    beta: Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The radial map and its log-determinant.

    $$y = x + \beta h\,(x - x_0), \quad h = \frac1{\alpha + r}, \quad r = \|x - x_0\|, \qquad
      \log|\det J| = (d-1)\log(1 + \beta h) + \log(1 + \alpha\beta h^2)$$

    Cost: $6d$ flops, a square root and two logs.

    Args:
        x: point, shape (d,).
        centre: $x_0$, shape (d,).
        alpha: positive, shape ().
        beta: above $-\alpha$, shape ().

    Returns:
        `(y, log_det)`; shapes (d,) and ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import radial_forward
        >>> one = jnp.asarray(1.0)
        >>> y, log_det = radial_forward(jnp.array([3.0, 0.0]), jnp.zeros(2), one, one)
        >>> print(y, f"{log_det:.4f}")
        [3.75 0.  ] 0.2838

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770), equation 14.
    """
    offset = x - centre
    _, across, _, log_det = _factors(_distance(offset), alpha, beta, x.size)
    return centre + across * offset, log_det


def radial_inverse(
    y: Float[Array, " d"],
    centre: Float[Array, " d"],
    alpha: Float[Array, ""],
    beta: Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The inverse of `radial_forward` in closed form: a quadratic equation for the radius.

    With $r' = \|y - x_0\|$ and $t = \alpha + \beta - r'$,

    $$r = \tfrac12\big(-t + \sqrt{t^2 + 4\alpha r'}\big), \qquad
      x = x_0 + \frac{\alpha + r}{\alpha + \beta + r}\,(y - x_0),$$

    the root written without cancellation for either sign of $t$.

    Cost: $6d$ flops, two square roots and two logs.

    Args:
        y: point, shape (d,).
        centre: $x_0$, shape (d,).
        alpha: positive, shape ().
        beta: above $-\alpha$, shape ().

    Returns:
        `(x, log_det)`; the log-determinant is that of the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import radial_inverse
        >>> one = jnp.asarray(1.0)
        >>> print(radial_inverse(jnp.array([3.75, 0.0]), jnp.zeros(2), one, one)[0])
        [3. 0.]
    """
    offset = y - centre
    far = _distance(offset)
    t = alpha + beta - far
    size = jnp.where(t > 0, t, -t) + jnp.sqrt(t**2 + 4 * alpha * far)
    r = jnp.where(t > 0, 2 * alpha * far / size, 0.5 * size)
    _, across, _, log_det = _factors(r, alpha, beta, y.size)
    return centre + offset / across, -log_det


def radial_push_score(
    x: Float[Array, " d"],
    score: Float[Array, " d"],
    centre: Float[Array, " d"],
    alpha: Float[Array, ""],
    beta: Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, " d"]]:
    r"""The score of the density behind a radial map, by the Sherman-Morrison formula.

    With $e = (x - x_0)/r$, $A = 1 + \beta h$ and $B = 1 + \alpha\beta h^2$,

    $$\nabla\log|\det J| = -\Big[\frac{(d-1)\beta h^2}{A} + \frac{2\alpha\beta h^3}{B}\Big]\,e,
      \qquad \rho = s - \nabla\log|\det J|, \qquad
      s_y = \frac1A\Big(\rho - \frac{B - A}{B}\,(e^\top\rho)\,e\Big).$$

    Cost: $6d$ flops more than `radial_forward`; no inverse.

    Args:
        x: point before the map, shape (d,).
        score: score of its density, shape (d,).
        centre: $x_0$, shape (d,).
        alpha: positive, shape ().
        beta: above $-\alpha$, shape ().

    Returns:
        `(y, log_det, score_y)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import radial_push_score
        >>> one, x = jnp.asarray(1.0), jnp.array([3.0, 0.0])
        >>> y, log_det, score = radial_push_score(x, -x, jnp.zeros(2), one, one)
        >>> print(f"{score[0]:.4f}")
        -2.7488

    Source:
        Vaitl, Winkler, Richter & Kessel 2024 (arXiv 2403.15881), Proposition 3.2.
    """
    offset = x - centre
    r = _distance(offset)
    h, across, along, log_det = _factors(r, alpha, beta, x.size)
    unit = offset / jnp.where(r > 0, r, 1)
    slope = -beta * h**2 * ((x.size - 1) / across + 2 * alpha * h / along)
    inner = unit @ score - slope
    score_y = (score - (slope + (along - across) / along * inner) * unit) / across
    return centre + across * offset, log_det, score_y
