"""Pareto-smoothed importance sampling: the one wrapper around the library function."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

_MIN_DRAWS = 25
# Weights whose tail spans less than this (in nats) differ by rounding at most: there is no tail.
_FLAT = 1e-3


class SmoothedWeights(NamedTuple):
    """What Pareto smoothing says about importance weights.

    Attributes:
        log_weights: smoothed, normalised log weights (they sum to one), shape (n,). Where no
            generalised Pareto law could be fitted they are not smoothed; NaN and infinite log
            weights have weight zero.
        khat: shape of the generalised Pareto law fitted to the largest weights; inf if it could
            not be fitted, 0 for weights that are equal up to rounding.
        threshold: the largest khat at which averages over n weighted draws can be trusted.
        reason: why khat is inf, or None.
        num_zero: how many draws have weight zero because their log weight is minus infinity.
    """

    log_weights: Array
    khat: float
    threshold: float
    reason: str | None
    num_zero: int


def khat_threshold(n: int) -> float:
    r"""The largest reliable k-hat for `n` draws, $\min(1 - 1/\log_{10} n, 0.7)$.

    Args:
        n: number of draws, at least 2.

    Returns:
        The threshold.

    Raises:
        ValueError: n below 2.

    Example:
        >>> import vflow as vf
        >>> print(round(vf.diagnostics.khat_threshold(1000), 3))
        0.667

    Source:
        Vehtari, Simpson, Gelman, Yao & Gabry 2024 (arXiv 1507.02646), section 3.2.4.
    """
    if n < 2:
        raise ValueError(f"khat_threshold: n must be at least 2, got {n}.")
    return min(1 - 1 / math.log10(n), 0.7)


def host_log_weights(owner: str, log_w: Any) -> np.ndarray:
    """The log weights as a float64 vector on the host, or an error that says why not."""
    if isinstance(log_w, Tracer):
        raise TypeError(f"{owner}: log_w is traced; call it on concrete arrays, outside jit.")
    log_w = np.asarray(log_w, dtype=np.float64)
    if log_w.ndim != 1:
        raise ValueError(
            f"{owner}: log_w must be a vector, one entry a draw, got shape {log_w.shape}."
        )
    return log_w


def psis(log_w: ArrayLike) -> SmoothedWeights:
    r"""Pareto-smooth importance weights and measure how heavy their tail is.

    The largest $\min(n/5, 3\sqrt n)$ weights are replaced by quantiles of the generalised Pareto
    law fitted to them; its shape is k-hat. The fit is arviz-stats', in float64 on the host. The
    input is checked first, because the library answers NaN and infinite weights, and flipped
    signs, with a reassuring number.

    Args:
        log_w: log importance weights $\log p(x_i) - \log q(x_i)$ of independent draws from q, shape
            (n,) with n of at least 25; they need not be normalised.

    Returns:
        The smoothed weights, k-hat, its threshold, and the reason when there is no fit.

    Raises:
        ValueError: not a vector, or fewer than 25 draws.
        TypeError: called under jit.

    Example:
        >>> import jax, vflow as vf
        >>> result = vf.diagnostics.psis(0.1 * jax.random.normal(jax.random.key(0), (1000,)))
        >>> result.khat < result.threshold
        True

    Source:
        Vehtari, Simpson, Gelman, Yao & Gabry 2024 (arXiv 1507.02646), algorithm 1.
    """
    dtype = jnp.result_type(log_w, float)
    values = host_log_weights("psis", log_w)
    n = values.size
    if n < _MIN_DRAWS:
        raise ValueError(f"psis: log_w must hold at least {_MIN_DRAWS} draws, got {n}.")
    num_nan, num_huge = int(np.isnan(values).sum()), int(np.isposinf(values).sum())
    num_zero = int(np.isneginf(values).sum())
    reason = None
    if num_nan or num_huge:
        reason = f"of {n} log weights {num_nan} are NaN and {num_huge} are infinite"
    elif num_zero == n:
        reason = f"all {n} weights are zero: no draw lies in the support of the target"
    usable = np.where(np.isfinite(values), values, -np.inf)
    khat = math.inf
    smoothed = usable
    if reason is None:
        khat, smoothed, reason = _fit(usable)
    return SmoothedWeights(
        jnp.asarray(_normalise(smoothed), dtype), khat, khat_threshold(n), reason, num_zero
    )


def _fit(log_w: np.ndarray) -> tuple[float, np.ndarray, str | None]:
    """k-hat and smoothed log weights of finite or -inf log weights, not all -inf."""
    from arviz_stats.base import array_stats

    num_tail = int(min(log_w.size / 5, 3 * log_w.size**0.5))
    ordered = np.sort(log_w)
    if ordered[-1] - ordered[-num_tail - 1] < _FLAT:
        return 0.0, log_w, None
    with np.errstate(all="ignore"):
        # psislw expects minus the log weights; with log weights it fits the other tail, silently.
        smoothed, khat = array_stats.psislw(-log_w)
    if np.isfinite(khat) and not np.isnan(smoothed).any():
        return float(khat), smoothed, None
    share = np.exp(np.max(_normalise(log_w)))
    reason = (
        f"no Pareto law fits the {num_tail} largest weights: too few draws carry weight "
        f"(the largest alone has a share of {share:.3g})"
    )
    return math.inf, log_w, reason


def _normalise(log_w: np.ndarray) -> np.ndarray:
    top = np.max(log_w)
    return log_w if np.isneginf(top) else log_w - (top + np.log(np.sum(np.exp(log_w - top))))


def khat(log_w: ArrayLike) -> float:
    r"""The Pareto k-hat of importance weights: can averages over the weighted draws be trusted?

    Below `khat_threshold(n)` (0.7 for n above 2154) yes; above it no; above 1 the weights have no
    mean at all. It sees only the region that q visits: a mode that q misses does not raise it.

    Args:
        log_w: log importance weights $\log p(x_i) - \log q(x_i)$, shape (n,), n of at least 25.

    Returns:
        k-hat; inf where there is no fit (NaN or infinite weights, one draw with all the weight).

    Raises:
        ValueError: not a vector, or fewer than 25 draws.
        TypeError: called under jit.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> print(vf.diagnostics.khat(jnp.zeros(100)))
        0.0

    Source:
        Yao, Vehtari, Simpson & Gelman 2018 (arXiv 1802.02538).
    """
    return psis(log_w).khat
