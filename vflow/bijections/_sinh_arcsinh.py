"""The sinh-arcsinh transformer: skewness and tail weight."""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array
from vflow_kernels import soft_clamp

from vflow.bijections._transformer import AbstractTransformer


def _log_cosh(x: Array) -> Array:
    return jnp.logaddexp(x, -x) - math.log(2)


class SinhArcsinhTransformer(AbstractTransformer):
    r"""The sinh-arcsinh transformer: it skews a density and changes the weight of its tails.

    $$y = e^{\sigma}\sinh(u) + m, \qquad u = e^{\tau}\operatorname{arcsinh}(x) + \epsilon, \qquad
      \log y' = \sigma + \tau + \log\cosh u - \log\cosh\operatorname{arcsinh} x$$

    Far out $|y| \sim |x|^{e^\tau}$: $\tau > 0$ makes tails heavier, $\tau < 0$ lighter; $\epsilon$
    skews. $\phi = (m, s, e, t)$; $\sigma$, $\epsilon$ and $\tau$ are the soft clamps of $s$, $e$ and
    $t$: an unbounded skew from a conditioner would overflow the hyperbolic sine.

    Args:
        max_log_scale: bound of $|\sigma|$, positive.
        max_log_tail: bound of $|\tau|$, positive.
        max_skew: bound of $|\epsilon|$, positive.

    Raises:
        ValueError: a bound that is not positive.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> transformer = vf.bijections.SinhArcsinhTransformer()
        >>> y, log_derivative = transformer.forward(jnp.ones(()), jnp.array([0.0, 0.0, 1.0, 0.0]))
        >>> print(f"{y:.4f} {log_derivative:.4f}")
        2.1416 0.5136

    Source:
        Jones & Pewsey 2009, Sinh-arcsinh distributions, Biometrika 96(4), equation 1.
    """

    max_log_scale: float = eqx.field(static=True, default=2.0)
    max_log_tail: float = eqx.field(static=True, default=1.0)
    max_skew: float = eqx.field(static=True, default=4.0)
    num_params: int = eqx.field(static=True, default=4, init=False)
    elementwise: ClassVar[bool] = True

    def __check_init__(self):
        bounds = (self.max_log_scale, self.max_log_tail, self.max_skew)
        if not min(bounds) > 0:
            raise ValueError(
                "SinhArcsinhTransformer: max_log_scale, max_log_tail and max_skew must be positive, "
                f"got {bounds}."
            )

    def _split(self, params: Array) -> tuple[Array, Array, Array, Array]:
        log_scale = soft_clamp(params[1], -self.max_log_scale, self.max_log_scale)
        log_tail = soft_clamp(params[3], -self.max_log_tail, self.max_log_tail)
        skew = soft_clamp(params[2], -self.max_skew, self.max_skew)
        return params[0], log_scale, skew, log_tail

    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau(x; \phi), \log\tau'(x; \phi))$; shapes () and ()."""
        loc, log_scale, skew, log_tail = self._split(params)
        inner = jnp.arcsinh(x)
        outer = jnp.exp(log_tail) * inner + skew
        log_derivative = log_scale + log_tail + _log_cosh(outer) - _log_cosh(inner)
        return jnp.exp(log_scale) * jnp.sinh(outer) + loc, log_derivative

    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau^{-1}(y; \phi), \log(\tau^{-1})'(y; \phi))$; shapes () and ()."""
        loc, log_scale, skew, log_tail = self._split(params)
        outer = jnp.arcsinh((y - loc) * jnp.exp(-log_scale))
        inner = (outer - skew) * jnp.exp(-log_tail)
        log_derivative = _log_cosh(inner) - _log_cosh(outer) - log_scale - log_tail
        return jnp.sinh(inner), log_derivative
