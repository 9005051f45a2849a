"""Can the fit be trusted: the rule and its witnesses."""

import math
from typing import NamedTuple

import numpy as np

from vflow._core import Estimate
from vflow.diagnostics import ess_fraction, log_evidence, psis

MIN_ESS_FRACTION = 0.1
_MISSED = 0.1  # nats of log evidence that another proposal finds beyond the fit's
_SIGMAS = 4.0


class Verdict(NamedTuple):
    """What importance weights on fresh draws say about a fit.

    Attributes:
        status: "ok", "suspect" or "failed".
        reasons: why it is not "ok", one sentence each; empty if it is.
        khat: Pareto k-hat of the importance weights.
        khat_threshold: the largest k-hat that is still trusted at this number of draws.
        ess_fraction: importance effective sample size over the number of draws, in (0, 1].
        elbo: the evidence lower bound with its standard error, in nats.
        log_evidence: the importance sampling estimate of log Z with its standard error, in nats.
        num_draws: how many fresh draws it rests on.
    """

    status: str
    reasons: tuple[str, ...]
    khat: float
    khat_threshold: float
    ess_fraction: float
    elbo: Estimate
    log_evidence: Estimate
    num_draws: int


def judge(log_w: np.ndarray, cover: Estimate | None = None) -> Verdict:
    """The verdict on log importance weights of fresh draws, shape (n,).

    "ok" needs k-hat below its threshold and an effective sample size of at least a tenth of the
    draws. "failed" means that the weights have no mean (k-hat of 1 or more), are not finite, or
    leave next to no effective draw; what lies between is "suspect".

    Weights of the fit's own draws cannot see a part of the posterior where it draws nothing. With
    `cover`, the evidence that draws of another proposal found, the fit is "suspect" too if that is
    larger by more than a tenth and more than `_SIGMAS` standard errors: an unbiased estimate of the
    evidence can be too low by chance or for want of draws, but hardly that much too high.
    """
    log_w = np.asarray(log_w, np.float64)
    n = log_w.size
    smoothed = psis(log_w)
    broken = np.isnan(log_w) | np.isposinf(log_w)
    reasons = []
    if smoothed.reason is not None:
        reasons.append(smoothed.reason + ".")
    outside = int(np.isneginf(log_w).sum())
    if outside > 0.01 * n and smoothed.reason is None:
        reasons.append(
            f"{outside} of {n} draws have log density -inf under the model: the fit puts mass "
            "where the model has none."
        )
    usable = np.where(broken, -np.inf, log_w)
    fraction = 0.0 if np.isneginf(usable).all() else float(ess_fraction(usable))
    if not broken.any() and math.isfinite(smoothed.khat) and smoothed.khat >= smoothed.threshold:
        reasons.append(
            f"k-hat {smoothed.khat:.2f} is not below {smoothed.threshold:.2f}: the fit's tails are "
            "too light somewhere, averages over weighted draws are unreliable."
        )
    if not broken.any() and fraction < MIN_ESS_FRACTION:
        reasons.append(
            f"importance ESS fraction {fraction:.3g} is below {MIN_ESS_FRACTION}: few draws carry "
            "the weight, the fit differs from the posterior in its bulk."
        )
    hopeless = broken.any() or not smoothed.khat < 1.0 or fraction * n < 10
    finite = log_w[np.isfinite(log_w)]
    elbo = Estimate(math.nan, math.nan)
    if finite.size > 1:
        elbo = Estimate(float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(finite.size)))
        if outside:
            elbo = Estimate(-math.inf, math.nan)
    evidence = Estimate(-math.inf, math.nan) if fraction == 0.0 else log_evidence(usable)
    if cover is not None and not broken.any() and fraction > 0.0:
        missed = cover.value - evidence.value
        error = math.hypot(cover.standard_error, evidence.standard_error)
        if missed > _MISSED and missed > _SIGMAS * error:
            reasons.append(
                f"the fit misses about {-100 * math.expm1(-missed):.0f}% of the posterior: draws of a "
                f"mixture found from several starts put the log evidence at {cover}, the fit's own at "
                f"{evidence}."
            )
    status = "ok" if not reasons else "failed" if hopeless else "suspect"
    return Verdict(
        status,
        tuple(reasons),
        float(smoothed.khat),
        float(smoothed.threshold),
        fraction,
        elbo,
        evidence,
        n,
    )
