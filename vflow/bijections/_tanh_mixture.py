"""A monotone mixture of hyperbolic tangents, inverted implicitly."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from vflow_kernels import monotone_root, soft_clamp

from vflow.bijections._transformer import AbstractTransformer

_SHIFT = math.log(math.expm1(1.0))
_MOST = 1 - 1e-3  # the slope of the bends is above -_MOST


def _softplus(x: Array) -> Array:
    """`jax.nn.softplus` without an array of zeros, which would be in the way of path gradients."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _coefficients(params: Array) -> tuple[Array, Array, Array, Array, Array]:
    weights, log_rates, centres = params[2:].reshape(3, -1)
    scale = jnp.exp(soft_clamp(params[1], -2.0, 2.0))
    height = _MOST / weights.size * (_softplus(weights + _SHIFT) - 1)
    rate = jnp.exp(soft_clamp(log_rates, -2.0, 2.0))
    spread = np.linspace(-2.0, 2.0, weights.size, dtype=params.dtype)
    return params[0], scale, height, rate, spread + centres


def _map(x: Array, params: Array) -> Array:
    shift, scale, height, rate, centre = _coefficients(params)
    return shift + scale * (x + jnp.sum(height / rate * jnp.tanh(rate * (x - centre))))


class TanhMixture(AbstractTransformer):
    r"""A line bent by K hyperbolic tangents, increasing.

    $$y = m + e^{a}\Big(x + \sum_{k=1}^K \frac{h_k}{b_k}\tanh(b_k(x - c_k))\Big), \qquad
      \tau' = e^{a}\Big(1 + \sum_k h_k \operatorname{sech}^2(b_k(x - c_k))\Big)$$

    Bend k raises ($h_k > 0$) or lowers ($h_k < 0$) the slope near $c_k$, over a width $1/b_k$; with
    $h_k > -0.999/K$ the slope is positive for all parameters. Smooth (all derivatives exist) and
    unbounded, its tails those of $e^a x$. There is no closed inverse: it is a monotone scalar root with
    implicit derivatives. Samples, their densities and path gradients need none; `log_prob` at given
    points does. $a$ and $\log b_k$ are soft clamps to $(-2, 2)$, $h_k$ is a shifted softplus; at
    $\phi = 0$ all $h_k$ are zero, the map the identity, and the $c_k$ spread over $[-2, 2]$.

    Args:
        num_terms: K, at least 1.

    Raises:
        ValueError: a number of terms below 1.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> transformer = vf.bijections.TanhMixture(num_terms=2)
        >>> y, _ = transformer.forward(jnp.ones(()), jnp.arange(8.0))
        >>> print(f"{y:.4f} {transformer.inverse(y, jnp.arange(8.0))[0]:.4f}")
        0.9397 1.0000

    Source:
        Huang, Krueger, Lacoste & Courville 2018 (arXiv 1804.00779), section 3, with tanh, a line
        beside it, and heights of both signs.
    """

    num_terms: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        if not isinstance(self.num_terms, int) or self.num_terms < 1:
            raise ValueError(
                f"TanhMixture: num_terms must be a positive integer, got {self.num_terms!r}."
            )

    @property
    def num_params(self) -> int:
        """A shift, a scale, and K heights, rates and centres."""
        return 3 * self.num_terms + 2

    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau(x; \phi), \log\tau'(x; \phi))$; shapes () and ()."""
        shift, scale, height, rate, centre = _coefficients(params)
        bends = jnp.tanh(rate * (x - centre))
        slope = 1 + jnp.sum(height * (1 - bends) * (1 + bends))
        return shift + scale * (x + jnp.sum(height / rate * bends)), jnp.log(scale * slope)

    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau^{-1}(y; \phi), \log(\tau^{-1})'(y; \phi))$; shapes () and ()."""
        shift, scale, height, rate, _ = _coefficients(params)
        middle, reach = (y - shift) / scale, jnp.sum(jnp.abs(height) / rate)
        x = monotone_root(_map, params, y, middle - reach, middle + reach)
        return x, -self.forward(x, params)[1]
