"""The derivative of a von Mises draw in its concentration."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, i1e
from jaxtyping import Array, Float

_NODES = 64
_TAIL = 40.0  # what lies beyond exp(-40) of the density at the draw is left out


@functools.cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(_NODES)


def von_mises_slope(angle: Float[Array, "*n"], concentration: Float[Array, "*n"]) -> Array:
    r"""$\partial_\kappa \theta$ at fixed cumulative probability, for a draw centred at 0.

    With $f \propto e^{\kappa \cos t}$, $A = I_1(\kappa)/I_0(\kappa)$ and $F(0) = 1/2$ whatever $\kappa$,
    $$-\frac{\partial_\kappa F(\theta)}{f(\theta)}
      = -\int_0^\theta (\cos t - A)\, e^{\kappa(\cos t - \cos\theta)}\, dt
      = \int_\theta^\pi (\cos t - A)\, e^{\kappa(\cos t - \cos\theta)}\, dt, \quad \theta \ge 0,$$
    and it is odd. The first form where $\cos\theta > A$, else the second: then the integrand has one
    sign and the exponent is at most $\kappa(1 - A) < 1$. Gauss-Legendre with 64 nodes.

    Args:
        angle: draws in $[-\pi, \pi]$.
        concentration: $\kappa > 0$, of the same shape.
    """
    nodes, weights = (jnp.expand_dims(x, range(angle.ndim)).astype(angle.dtype) for x in _rule())
    size, kappa = jnp.abs(angle)[..., None], concentration[..., None]
    # 1 - A and 1 - cos without cancellation at large kappa.
    series = 0.5 + (0.125 + (0.125 + (25 / 128 + 13 / 32 / kappa) / kappa) / kappa) / kappa
    rest = jnp.where(kappa > 100.0, series / kappa, 1.0 - i1e(kappa) / i0e(kappa))
    half = jnp.sin(0.5 * size) ** 2
    inside = 2.0 * half < rest
    far = 2.0 * jnp.arcsin(jnp.sqrt(jnp.minimum(half + 0.5 * _TAIL / kappa, 1.0)))
    low, high = jnp.where(inside, 0.0, size), jnp.where(inside, size, far)
    t = low + 0.5 * (high - low) * (1.0 + nodes)
    at = jnp.sin(0.5 * t) ** 2
    integral = jnp.sum(weights * (rest - 2.0 * at) * jnp.exp(2.0 * kappa * (half - at)), axis=-1)
    integral = 0.5 * (high - low)[..., 0] * integral
    return jnp.sign(angle) * jnp.where(inside[..., 0], -integral, integral)


def wrapped(angle: Array) -> Array:
    r"""The angle modulo $2\pi$, in $[-\pi, \pi)$."""
    return (angle + math.pi) % (2.0 * math.pi) - math.pi
