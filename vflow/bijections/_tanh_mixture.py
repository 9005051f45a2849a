"""A monotone mixture of hyperbolic tangents, inverted implicitly."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from vflow_kernels import monotone_root, soft_clamp

from vflow.bijections._transformer import AbstractTransformer

_SHIFT = math.log(math.expm1(1.0))


def _coefficients(params: Array) -> tuple[Array, Array, Array, Array]:
    weights, log_rates, centres = params[1:].reshape(3, -1)
    slope = jnp.exp(soft_clamp(params[0], -2.0, 2.0))
    size = jax.nn.softplus(weights + _SHIFT) / weights.size
    rate = jnp.exp(soft_clamp(log_rates, -2.0, 2.0))
    spread = jnp.linspace(-2.0, 2.0, weights.size, dtype=params.dtype)
    return slope, size, rate, spread + centres


def _map(x: Array, params: Array) -> Array:
    slope, size, rate, centre = _coefficients(params)
    bent = jnp.sum(size * (jnp.tanh(rate * (x - centre)) + jnp.tanh(rate * centre)))
    return slope * x + bent


class TanhMixture(AbstractTransformer):
    r"""A line and a sum of K hyperbolic tangents, all increasing.

    $$y = e^{a}x + \sum_{k=1}^K w_k\big(\tanh(b_k(x - c_k)) + \tanh(b_k c_k)\big), \qquad
      \tau' = e^{a} + \sum_k w_k b_k \operatorname{sech}^2(b_k(x - c_k))$$

    Smooth (all derivatives exist) and unbounded, its tails those of $e^a x$. There is no closed
    inverse: it is a monotone scalar root with implicit derivatives. Samples, their densities and path
    gradients need none; `log_prob` at given points does. $a$ and $\log b_k$ are soft clamps to
    $(-2, 2)$, $w_k$ softplus values over K, the $c_k$ start spread over $[-2, 2]$.
    Unlike the other transformers it is not the identity at $\phi = 0$, but a gentle bend of it.

    Args:
        num_terms: K, at least 1.

    Raises:
        ValueError: a number of terms below 1.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> transformer = vf.bijections.TanhMixture(num_terms=2)
        >>> y, _ = transformer.forward(jnp.ones(()), jnp.zeros(7))
        >>> print(f"{transformer.inverse(y, jnp.zeros(7))[0]:.4f}")
        1.0000

    Source:
        Huang, Krueger, Lacoste & Courville 2018 (arXiv 1804.00779), section 3, with tanh.
    """

    num_terms: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        if not isinstance(self.num_terms, int) or self.num_terms < 1:
            raise ValueError(
                f"TanhMixture: num_terms must be a positive integer, got {self.num_terms!r}."
            )

    @property
    def num_params(self) -> int:
        """One slope, and K weights, rates and centres."""
        return 3 * self.num_terms + 1

    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau(x; \phi), \log\tau'(x; \phi))$; shapes () and ()."""
        slope, size, rate, centre = _coefficients(params)
        bends = jnp.tanh(rate * (x - centre))
        y = slope * x + jnp.sum(size * (bends + jnp.tanh(rate * centre)))
        return y, jnp.log(slope + jnp.sum(size * rate * (1 - bends) * (1 + bends)))

    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau^{-1}(y; \phi), \log(\tau^{-1})'(y; \phi))$; shapes () and ()."""
        slope, size, rate, centre = _coefficients(params)
        middle = y - jnp.sum(size * jnp.tanh(rate * centre))
        reach = jnp.sum(size)
        x = monotone_root(_map, params, y, (middle - reach) / slope, (middle + reach) / slope)
        return x, -self.forward(x, params)[1]
