"""k-hat as a compiled function: what `vflow.diagnostics.psis` finds, on traced weights."""

import math

import jax.numpy as jnp
from jaxtyping import Array

_PRIOR_SIZE, _PRIOR_SHAPE = 10, 0.5  # pseudo-observations of the shape, and their value
_FLAT = 1e-12  # excess, relative to the largest weight, below which there is no tail
_QUARTILE = 3  # the grid is scaled by this many times the lower quartile


def khat(log_w: Array) -> Array:
    r"""The shape $k$ of the generalised Pareto distribution of the largest weights.

    The posterior mean of $\theta = -k/\sigma$ over a grid, by the profile likelihood, and
    $k = \frac1M \sum_i \log(1 - \theta x_i)$ of the $M = \min(n/5, 3\sqrt n)$ excesses over the largest
    other weight, shrunk towards 1/2.

    Args:
        log_w: log weights, shape (n,), n of at least 100.

    Returns:
        Scalar; infinite where a weight is NaN or infinite, 0 where the largest are equal.

    Source:
        Zhang & Stephens 2009, A new and efficient estimation method for the generalized Pareto
        distribution; Vehtari, Simpson, Gelman, Yao & Gabry 2024 (arXiv 1507.02646).
    """
    n = log_w.shape[0]
    size = int(min(0.2 * n, 3 * math.sqrt(n)))
    order = jnp.sort(log_w)
    weights = jnp.exp(order[-size - 1 :] - order[-1])
    x = weights[1:] - weights[0]
    num = 30 + int(math.sqrt(size))
    quartile = x[int(size / 4 + 0.5) - 1]
    grid = 1 - jnp.sqrt(num / (jnp.arange(1, num + 1, dtype=x.dtype) - 0.5))
    theta = 1 / x[-1] + grid / (_QUARTILE * quartile)

    k = jnp.mean(jnp.log1p(-theta[:, None] * x[None, :]), axis=1)
    profile = size * (jnp.log(-theta / k) - k - 1)
    mass = jnp.exp(profile - jnp.max(profile))
    found = jnp.mean(jnp.log1p(-jnp.sum(theta * mass) / jnp.sum(mass) * x))
    shrunk = (size * found + _PRIOR_SIZE * _PRIOR_SHAPE) / (size + _PRIOR_SIZE)
    broken = jnp.isnan(log_w).any() | jnp.isposinf(log_w).any() | jnp.isneginf(order[-1])
    broken = broken | (jnp.isnan(shrunk) & (x[-1] > _FLAT))
    return jnp.where(broken, jnp.inf, jnp.where(x[-1] <= _FLAT, 0.0, shrunk))
