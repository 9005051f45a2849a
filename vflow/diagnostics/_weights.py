"""Effective sample size and evidence from importance weights."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from vflow._core import Estimate
from vflow._core._numerics import as_float
from vflow.diagnostics._psis import host_log_weights


def ess_fraction(log_w: ArrayLike) -> Array:
    r"""The effective share of weighted draws, $(\sum_i w_i)^2 / (n \sum_i w_i^2)$, in [1/n, 1].

    One for equal weights, 1/n when one draw has all the weight, 0 when no draw has any, NaN if a
    log weight is NaN or plus infinity. Works under jit.

    Args:
        log_w: log importance weights $\log p(x_i) - \log q(x_i)$, shape (n,); not normalised.

    Returns:
        The fraction, a scalar.

    Raises:
        ValueError: not a vector, or empty.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> print(vf.diagnostics.ess_fraction(jnp.log(jnp.array([1.0, 1.0, 1e-30, 1e-30]))))
        0.5

    Source:
        Kong 1992, A note on importance sampling using standardized weights.
    """
    log_w = as_float(log_w)
    if log_w.ndim != 1 or log_w.size == 0:
        raise ValueError(
            f"ess_fraction: log_w must be a vector with entries, got shape {log_w.shape}."
        )
    top = jnp.max(log_w)
    weights = jnp.exp(log_w - jnp.where(jnp.isneginf(top), 0.0, top))
    squares = jnp.sum(weights**2)
    none = squares == 0
    return jnp.where(
        none, 0.0, jnp.sum(weights) ** 2 / (log_w.size * jnp.where(none, 1.0, squares))
    )


def log_evidence(log_w: ArrayLike) -> Estimate:
    r"""The log evidence with a delta-method standard error.

    $$\log Z \approx \log \bar w, \qquad \mathrm{se} = \frac{\operatorname{sd}(w)}{\sqrt n\,\bar w}$$

    The mean of the weights is unbiased for $Z$; its logarithm is low by about $\mathrm{se}^2/2$.
    The standard error means something only where the variance of the weights does: see `khat`.

    Args:
        log_w: log importance weights $\log p(x_i) - \log q(x_i)$ with p unnormalised, shape (n,),
            n of at least 2.

    Returns:
        The estimate, in nats; NaN with a NaN error if a log weight is NaN, minus infinity with
        an infinite error if all weights are zero.

    Raises:
        ValueError: not a vector, or fewer than 2 draws.
        TypeError: called under jit.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> print(vf.diagnostics.log_evidence(jnp.log(jnp.array([1.0, 2.0, 3.0]))))
        0.693 +- 0.289
    """
    values = host_log_weights("log_evidence", log_w)
    n = values.size
    if n < 2:
        raise ValueError(f"log_evidence: log_w must hold at least 2 draws, got {n}.")
    top = float(np.max(values))
    if math.isnan(top) or top == math.inf:
        return Estimate(top, math.nan)
    if top == -math.inf:
        return Estimate(-math.inf, math.inf)
    weights = np.exp(values - top)
    mean = weights.mean()
    error = weights.std(ddof=1) / (math.sqrt(n) * mean)
    return Estimate(top + math.log(mean), float(error))
