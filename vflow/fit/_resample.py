"""Draws from a fit corrected by Pareto-smoothed importance resampling."""

import math
import warnings
from collections.abc import Callable

import numpy as np

from vflow._core import FitError
from vflow.diagnostics import psis
from vflow.fit._draws import BATCH

# At most this many proposals for each draw that is asked for, and never fewer than BATCH.
MAX_PROPOSALS = 64
# Draws whose effective size is below this share of their number are announced.
_LOW = 0.5
_ENOUGH = 0.9


def resample(
    propose: Callable[[int], tuple[np.ndarray, np.ndarray]], n: int, ess_fraction: float, u: float
) -> np.ndarray:
    r"""`n` draws from the target by systematic resampling of weighted proposals.

    With smoothed weights $w_i$ summing to one, proposal i is taken $\lfloor n w_i \rfloor$ times or
    once more, $n w_i$ times on average. As the proposals are independent, a mean over the draws
    has the variance of one over m independent draws,
    $$\frac1m = \sum_i w_i^2 + \frac1{n^2}\sum_i r_i(1 - r_i), \qquad r_i = n w_i \bmod 1,$$
    which is 1/n as long as no weight exceeds 1/n. Proposals are added until m is near n, or there
    are `MAX_PROPOSALS` for each draw.

    Args:
        propose: number of proposals -> (points (k, dim), log weights (k,)); fresh ones each time.
        n: number of draws.
        ess_fraction: what to expect of the weights; decides the first number of proposals.
        u: uniform on [0, 1).

    Returns:
        Points of shape (n, dim).

    Raises:
        FitError: the weights are not usable at all.

    Source:
        Vehtari, Simpson, Gelman, Yao & Gabry 2024 (arXiv 1507.02646) for the weights; Kitagawa 1996
        for systematic resampling.
    """
    cap = max(MAX_PROPOSALS * n, BATCH)
    count = max(math.ceil(n / max(ess_fraction, 1.0 / MAX_PROPOSALS)), BATCH)
    points, log_w = propose(count)
    while True:
        smoothed = psis(log_w)
        if smoothed.reason is not None:
            raise FitError(
                f"resample: the importance weights are not usable: {smoothed.reason}. Draw with "
                "sample(), and do not trust it.",
                reasons=(smoothed.reason,),
            )
        weights = np.exp(np.asarray(smoothed.log_weights, np.float64))
        weights /= weights.sum()
        rest = n * weights % 1.0
        size = 1.0 / (np.sum(weights**2) + np.sum(rest * (1.0 - rest)) / n**2)
        if size >= _ENOUGH * n or len(log_w) >= cap:
            break
        more_points, more_log_w = propose(min(len(log_w), cap - len(log_w)))
        points = np.concatenate([points, more_points])
        log_w = np.concatenate([log_w, more_log_w])
    _warn(n, size, smoothed.khat, smoothed.threshold, len(log_w))
    edges = np.cumsum(weights)
    chosen = np.searchsorted(edges / edges[-1], (u + np.arange(n)) / n, side="right")
    return points[np.minimum(chosen, len(points) - 1)]


def _warn(n: int, size: float, khat: float, threshold: float, proposals: int) -> None:
    if khat >= threshold:
        warnings.warn(
            f"resample: k-hat {khat:.2f} is not below {threshold:.2f}, so even the weighted "
            "proposals miss part of the posterior: the draws are better than those of sample(), "
            "but not to be trusted.",
            UserWarning,
            stacklevel=5,
        )
    elif size < _LOW * n:
        warnings.warn(
            f"resample: the {n} draws have an effective size of about {size:.0f}, although "
            f"{proposals} proposals were drawn: some draws are repeated often.",
            UserWarning,
            stacklevel=5,
        )
