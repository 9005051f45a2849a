"""Monotone maps that give a normal variable power tails, stable through the log survival function."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow_kernels._root import monotone_root

_LOG_SLOPE = 0.5 * math.log(2 / math.pi)  # log of the hazard at zero
_SLOPE = math.exp(_LOG_SLOPE)
_NEWTON_STEPS = 4
_SMALLEST_TAIL = 1e-4


def _series_from(dtype: jnp.dtype) -> float:
    """From here on the asymptotic series of the Mills ratio is exact to rounding."""
    return 12.0 if jnp.finfo(dtype).bits > 32 else 6.0


def _mills_rest(z: Array) -> Array:
    """S in the Mills ratio (1 + S)/z, S = -1/z^2 + 3/z^4 - 15/z^6 + ..., twelve terms."""
    v = 1 / (z * z)
    rest = jnp.ones_like(z)
    for k in range(23, 1, -2):
        rest = 1 - k * v * rest
    return -v * rest


def _split(z: Array) -> tuple[Array, Array, Array]:
    """Whether the series holds, and z for either side of that, harmless where it is not asked."""
    edge = _series_from(z.dtype)
    far = z > edge
    return far, jnp.where(far, z, edge), jnp.where(far, 0.0, z)


def _near_survival(z: Array) -> Array:
    root_half = math.sqrt(0.5)
    return jnp.where(
        z < 1,
        -jnp.log1p(-jax.lax.erf(root_half * jnp.minimum(z, 1.0))),
        -jnp.log(jax.lax.erfc(root_half * z)),
    )


def _near_log_hazard(z: Array) -> Array:
    return _LOG_SLOPE - 0.5 * z * z + _near_survival(z)


@jax.custom_jvp
def _survival(z: Array) -> Array:
    r"""$u(z) = -\log 2\Phi(-z)$: zero at zero, about $z^2/2$ far right, above $-\log 2$ far left."""
    far, z_far, z_near = _split(z)
    tail = 0.5 * z_far * z_far + jnp.log(z_far) - jnp.log1p(_mills_rest(z_far)) - _LOG_SLOPE
    return jnp.where(far, tail, _near_survival(z_near))


@jax.custom_jvp
def _log_hazard(z: Array) -> Array:
    r"""$\log u'(z) = \log(\phi(z)/\Phi(-z))$."""
    far, z_far, z_near = _split(z)
    tail = jnp.log(z_far) - jnp.log1p(_mills_rest(z_far))
    return jnp.where(far, tail, _near_log_hazard(z_near))


@jax.custom_jvp
def _excess(z: Array) -> Array:
    r"""$(\log u')'(z) = u'(z) - z$, without the cancellation far right."""
    far, z_far, z_near = _split(z)
    rest = _mills_rest(z_far)
    near = jnp.exp(_near_log_hazard(z_near)) - z_near
    return jnp.where(far, -z_far * rest / (1 + rest), near)


@_survival.defjvp
def _survival_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    return _survival(z), jnp.exp(_log_hazard(z)) * dz


@_log_hazard.defjvp
def _log_hazard_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    return _log_hazard(z), _excess(z) * dz


@_excess.defjvp
def _excess_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    excess = _excess(z)
    return excess, (jnp.exp(_log_hazard(z)) * excess - 1) * dz


def _survival_inverse(u: Array) -> Array:
    """The z >= 0 with `_survival(z) = u`; a value only, the callers know the derivative."""
    near = u < 2
    u_far = jnp.where(near, 2.0, u) + math.log(2)
    far_start = jnp.sqrt(2 * u_far - jnp.log(4 * math.pi * u_far))
    near_start = math.sqrt(2) * jax.lax.erf_inv(-jnp.expm1(-jnp.where(near, u, 2.0)))
    z = jnp.where(near, near_start, far_start)
    for _ in range(_NEWTON_STEPS):
        z = z - (_survival(z) - u) * jnp.exp(-_log_hazard(z))
    return z


def _power(u: Array, tail: Array) -> Array:
    r"""$\operatorname{expm1}(\lambda u)/\lambda$, equal to $u$ at $\lambda = 0$, smooth there."""
    t = tail * u
    small = jnp.abs(t) < 0.25
    t_series, t_direct = jnp.where(small, t, 0.0), jnp.where(small, 1.0, t)
    series = jnp.ones_like(t)
    for k in range(12, 1, -1):
        series = 1 + t_series / k * series
    return u * jnp.where(small, series, jnp.expm1(t_direct) / t_direct)


def _edge(tail: Array) -> Array:
    r"""Where the map goes on as a straight line: $\lambda u(z)$ is at most 0.7 log(max) there.

    By $u(z) \le z^2/2 + z\sqrt{2/\pi}$.
    """
    room = 1.4 * math.log(float(jnp.finfo(tail.dtype).max))
    return jnp.sqrt(_SLOPE**2 + room / jnp.maximum(tail, _SMALLEST_TAIL)) - _SLOPE


def heavy_tail_forward(
    z: Float[Array, "*s"], lower: Float[Array, "*s"], upper: Float[Array, "*s"]
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    r"""A standard normal variable to a two-sided generalised Pareto one, elementwise.

    $$R(z) = \frac{s}{\lambda_s}\left(\operatorname{erfc}(|z|/\sqrt2)^{-\lambda_s} - 1\right),
      \qquad s = \operatorname{sign} z, \qquad
      \log R'(z) = \lambda_s u + \log\frac{\phi(z)}{\Phi(-|z|)},
      \qquad u = -\log 2\Phi(-|z|)$$

    With $Z \sim N(0, 1)$ each side of $R(Z)$ is generalised Pareto with shape $\lambda_s$ and scale
    one, so its tail falls like $x^{-1/\lambda_s}$. The derivative is continuous, the second one
    jumps at zero. Where $\lambda_s u$ reaches about 0.7 of the logarithm of the largest float (for
    $\lambda = 2$ at $|z| = 7.1$ in float32, 21.5 in float64), the map goes on as a straight line:
    everything is finite at every input.

    Cost: about 60 flops and five transcendental functions per element.

    Args:
        z: points, any shape.
        lower: $\lambda_- \ge 0$ of the side below zero, shape of `z`; zero is an exponential tail.
        upper: $\lambda_+ \ge 0$ of the side above zero, shape of `z`.

    Returns:
        `(x, log_derivative)` of the shape of `z`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import heavy_tail_forward
        >>> one = jnp.ones(1)
        >>> x, log_derivative = heavy_tail_forward(3 * one, 0.5 * one, one)
        >>> print(f"{x[0]:.2f} {log_derivative[0]:.4f}")  # erfc(3 / sqrt 2) = 0.0027
        369.40 7.1034

    Source:
        Hickling & Prangle 2025 (arXiv 2406.16971), the tail transform flow.
    """
    below = z < 0
    tail = jnp.where(below, lower, upper)
    size = jnp.where(below, -z, z)
    inner = jnp.minimum(size, _edge(tail))
    u = _survival(inner)
    log_slope = tail * u + _log_hazard(inner)
    x = _power(u, tail) + jnp.exp(log_slope) * (size - inner)
    return jnp.where(below, -x, x), log_slope


@jax.custom_jvp
def _heavy_tail_root(x: Array, lower: Array, upper: Array) -> Array:
    below = x < 0
    tail = jnp.where(below, lower, upper)
    size = jnp.where(below, -x, x)
    edge = _edge(tail)
    x_edge, log_slope = heavy_tail_forward(edge, tail, tail)
    inner = jnp.minimum(size, x_edge)
    t = tail * inner
    log1p = jnp.where(t > 0, jnp.log1p(t) / jnp.where(t > 0, t, 1.0), 1.0)
    z = _survival_inverse(inner * log1p) + (size - inner) * jnp.exp(-log_slope)
    return jnp.where(below, -z, z)


@_heavy_tail_root.defjvp
def _heavy_tail_root_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    z = _heavy_tail_root(*primals)
    (_, log_slope), (moved, _) = jax.jvp(
        lambda *tails: heavy_tail_forward(z, *tails), primals[1:], tangents[1:]
    )
    return z, (tangents[0] - moved) * jnp.exp(-log_slope)


def heavy_tail_inverse(
    x: Float[Array, "*s"], lower: Float[Array, "*s"], upper: Float[Array, "*s"]
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    r"""The inverse of `heavy_tail_forward`, elementwise.

    $u = \operatorname{log1p}(\lambda_s|x|)/\lambda_s$, then four Newton steps on
    $-\log 2\Phi(-|z|) = u$. Derivatives are implicit, through the forward map.

    Cost: about 300 flops and 25 transcendental functions per element.

    Args:
        x: points, any shape.
        lower: $\lambda_- \ge 0$, shape of `x`.
        upper: $\lambda_+ \ge 0$, shape of `x`.

    Returns:
        `(z, log_derivative)` of the shape of `x`; the second is that of the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import heavy_tail_inverse
        >>> one = jnp.ones(1)
        >>> print(f"{heavy_tail_inverse(369.398 * one, one, one)[0][0]:.4f}")
        3.0000

    Source:
        Hickling & Prangle 2025 (arXiv 2406.16971), the tail transform flow.
    """
    z = _heavy_tail_root(x, lower, upper)
    return z, -heavy_tail_forward(z, lower, upper)[1]


def smooth_tail_forward(
    z: Float[Array, "*s"],
    lower: Float[Array, "*s"],
    upper: Float[Array, "*s"],
    log_weights: Float[Array, "3 *s"],
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    r"""A smooth map from normal to power tails, the identity for weights (1, 0, 0); elementwise.

    $$T(z) = w_0 z + \sqrt{\tfrac\pi2}\left(w_+ P_{\lambda_+}(z) - w_- P_{\lambda_-}(-z)\right),
      \qquad P_\lambda(z) = \frac{(2\Phi(-z))^{-\lambda} - 1}{\lambda}$$

    Every summand increases and has slope $w$ at zero. $P_\lambda$ grows like a generalised Pareto
    quantile to the right and is bounded to the left, so the tails of $T(Z)$, $Z \sim N(0, 1)$, fall
    like $x^{-1/\lambda_\pm}$; but unlike `heavy_tail_forward` the map is analytic: no kink of the
    density at zero, and a weight on the identity for the body. With $w_0 = 0$ it is the quantile
    function of the generalised lambda distribution. Beyond the point that `heavy_tail_forward`
    documents it goes on as a straight line.

    Cost: about 150 flops and 13 transcendental functions per element.

    Args:
        z: points, any shape.
        lower: $\lambda_- \ge 0$, shape of `z`; zero is an exponential tail.
        upper: $\lambda_+ \ge 0$, shape of `z`.
        log_weights: $\log(w_0, w_-, w_+)$ along the first axis; normalised for slope one at zero.

    Returns:
        `(x, log_derivative)` of the shape of `z`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import smooth_tail_forward
        >>> one, weights = jnp.ones(1), jnp.log(jnp.array([[0.5], [0.25], [0.25]]))
        >>> x, log_derivative = smooth_tail_forward(3 * one, one, one, weights)
        >>> print(f"{x[0]:.2f} {log_derivative[0]:.4f}")
        117.40 5.9442

    Source:
        The generalised lambda distribution: Freimer, Kollia, Mudholkar & Lin 1988, A study of the
        generalized Tukey lambda family.
    """
    inner = jnp.clip(z, -_edge(lower), _edge(upper))
    # both sides as one array: half the program to compile
    sides, tails = jnp.stack([-inner, inner]), jnp.stack([lower, upper])
    survival = _survival(sides)
    weights = jnp.exp(log_weights)
    left, right = weights[1:] * _power(survival, tails)
    log_slopes = log_weights[1:] + tails * survival + _log_hazard(sides) - _LOG_SLOPE
    log_slope = jnp.logaddexp(log_weights[0], jnp.logaddexp(*log_slopes))
    x = weights[0] * inner + (right - left) / _SLOPE + jnp.exp(log_slope) * (z - inner)
    return x, log_slope


def _log_smooth_tail(z: Array, parameters: tuple) -> Array:
    return jnp.arcsinh(smooth_tail_forward(z, *parameters)[0])


def smooth_tail_inverse(
    x: Float[Array, "*s"],
    lower: Float[Array, "*s"],
    upper: Float[Array, "*s"],
    log_weights: Float[Array, "3 *s"],
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    r"""The inverse of `smooth_tail_forward` by a bracketed scalar root, elementwise.

    The root of $\operatorname{arcsinh} T(z) = \operatorname{arcsinh} x$, on whose scale the tails
    are close to parabolas; derivatives are implicit.

    Cost: 5 to 10 evaluations of the forward map and its derivative.

    Args:
        x: points, any shape.
        lower: $\lambda_- \ge 0$, shape of `x`.
        upper: $\lambda_+ \ge 0$, shape of `x`.
        log_weights: $\log(w_0, w_-, w_+)$ along the first axis.

    Returns:
        `(z, log_derivative)` of the shape of `x`; the second is that of the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import smooth_tail_inverse
        >>> one, weights = jnp.ones(1), jnp.log(jnp.array([[0.5], [0.25], [0.25]]))
        >>> print(f"{smooth_tail_inverse(117.4 * one, one, one, weights)[0][0]:.4f}")
        3.0000
    """
    parameters = (lower, upper, log_weights)
    ends = jnp.stack([-_edge(lower), _edge(upper)])
    bottom, top = jax.vmap(lambda end: smooth_tail_forward(end, *parameters)[0])(ends)
    inner = jnp.clip(x, bottom, top)
    root = monotone_root(_log_smooth_tail, parameters, jnp.arcsinh(inner), *ends)
    log_slope = smooth_tail_forward(root, *parameters)[1]
    return root + (x - inner) * jnp.exp(-log_slope), -log_slope
