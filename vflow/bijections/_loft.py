"""The log soft extension of far tails."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim


class LOFT(AbstractBijection):
    r"""The identity up to $\tau$, logarithmic beyond: no draw of a deep flow is ever huge.

    $$y = \operatorname{sign}(x)\,\big(\min(|x|, \tau) + \log(1 + e)\big), \qquad
      \log|\det J| = -\sum_i\log(1 + e_i), \qquad e = \max(|x| - \tau, 0)$$

    Put it after the last coupling layer, as `tails` of a flow, before or instead of a trainable
    affine map. It has no parameters. Values beyond $\tau + 88$ overflow the inverse in float32:
    the density is zero there for any purpose, and the inverse stops at that point.

    Args:
        dim: number of coordinates.
        threshold: $\tau$, positive.

    Raises:
        ValueError: a threshold that is not positive.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> loft = vf.bijections.LOFT(2)
        >>> y, log_det = loft.forward_and_log_det(jnp.array([3.0, -1e4]))
        >>> print(jnp.round(y, 2), f"{log_det:.4f}")
        [   3.  -109.2] -9.2004

    Source:
        Andrade 2024 (arXiv 2402.16408), section 4.
    """

    threshold: float = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, dim: int, threshold: float = 100.0):
        check_dim("LOFT", dim)
        if not 0 < threshold < float("inf"):
            raise ValueError(f"LOFT: threshold must be positive and finite, got {threshold!r}.")
        self.threshold = float(threshold)
        self.shape = (dim,)
        self.condition_shape = None

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""One logarithm a coordinate."""
        size = jnp.abs(x)
        growth = jnp.log1p(jnp.maximum(size - self.threshold, 0))
        far = jnp.sign(x) * (self.threshold + growth)
        return jnp.where(size > self.threshold, far, x), -jnp.sum(growth)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""One exponential a coordinate."""
        size = jnp.abs(y)
        most = 0.99 * math.log(float(jnp.finfo(y.dtype).max))
        growth = jnp.clip(size - self.threshold, 0, most)
        far = jnp.sign(y) * (self.threshold + jnp.expm1(growth))
        return jnp.where(size > self.threshold, far, y), jnp.sum(growth)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $s(1 + e) + \operatorname{sign}(x)[e > 0]$."""
        y, log_det = self.forward_and_log_det(x)
        excess = jnp.maximum(jnp.abs(x) - self.threshold, 0)
        return y, log_det, score * (1 + excess) + jnp.where(excess > 0, jnp.sign(x), 0)
