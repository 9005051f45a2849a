"""Can the fit be trusted: the rule and its witnesses."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import chi2

from vflow._core import Estimate
from vflow.diagnostics import log_evidence, psis
from vflow.fit._cover import effective_fraction

MIN_ESS_FRACTION = 0.1
_MISSED = 0.1  # nats of log evidence that another proposal finds beyond the fit's
_SIGMAS = 4.0
_MAX_GAP = 2.5  # nats between evidence and bound; normal log weights of ESS fraction 0.1: 1.2
_SHARE = 0.05  # of the posterior in a mode from which on it must not be missed
_FAR_MEAN, _FAR_LOG_SD = 0.19, 0.24  # by which weights may move plain draws, beyond their noise
_NEARLY_EQUAL = 0.99  # ESS fraction from which on k-hat tells the shape of a tail of small excesses
_SEEN = 0.2  # of a mode's share that the fit must at least give it


class Witness(NamedTuple):
    """One piece of evidence about a fit.

    Attributes:
        name: what was looked at.
        says: what was seen, in words and numbers.
        agrees: whether it speaks for the fit; None where it could not be heard.
    """

    name: str
    says: str
    agrees: bool | None


class SiteShift(NamedTuple):
    """How far importance weights move a site's unconstrained coordinates, at worst.

    Attributes:
        site: its name.
        mean: shift of the mean, in standard deviations of the fit.
        log_sd: log ratio of the standard deviations, weighted over plain.
    """

    site: str
    mean: float
    log_sd: float


class Verdict(NamedTuple):
    """What importance weights on fresh draws, and other witnesses, say about a fit.

    Attributes:
        status: "ok", "suspect" or "failed".
        reasons: why it is not "ok", one sentence each; empty if it is.
        khat: Pareto k-hat of the importance weights.
        khat_threshold: the largest k-hat that is still trusted at this number of draws.
        ess_fraction: importance effective sample size over the number of draws, in (0, 1].
        elbo: the evidence lower bound with its standard error, in nats.
        log_evidence: the importance sampling estimate of log Z with its standard error, in nats.
        num_draws: how many fresh draws it rests on.
        witnesses: all that was looked at, whether it objects or not.
        sites: by site, how far the weights move it.
    """

    status: str
    reasons: tuple[str, ...]
    khat: float
    khat_threshold: float
    ess_fraction: float
    elbo: Estimate
    log_evidence: Estimate
    num_draws: int
    witnesses: tuple[Witness, ...] = ()
    sites: tuple[SiteShift, ...] = ()


def misses(verdict: Verdict) -> bool:
    """Whether another proposal has found mass that the fit has not."""
    return any(w.name == "other starts" and w.agrees is False for w in verdict.witnesses)


def judge(
    log_w: np.ndarray,
    cover: Estimate | None = None,
    *,
    draws: np.ndarray | None = None,
    modes: Sequence[Any] = (),
    sites: Sequence[Any] = (),
) -> Verdict:
    """The verdict on log importance weights of fresh draws, shape (n,).

    "ok" needs k-hat below its threshold, an effective sample size of at least a tenth of the
    draws, and no other witness that objects. "failed" means that the weights have no mean (k-hat of
    1 or more, and not nearly equal), are not finite, or leave next to no effective draw; what lies
    between is "suspect".

    Weights of the fit's own draws cannot see a part of the posterior where it draws nothing. With
    `cover`, the evidence that draws of another proposal found, the fit is "suspect" too if that is
    larger by more than a tenth and more than `_SIGMAS` standard errors: an unbiased estimate of the
    evidence can be too low by chance or for want of draws, but hardly that much too high. With
    `modes`, Gaussians found from other starts, it is suspect if one of them holds, by its bound, a
    share of the posterior that the fit's draws do not give it.

    Args:
        log_w: log p - log q of fresh draws, shape (n,).
        cover: log evidence by another proposal.
        draws: the draws, shape (n, dim); for modes and sites.
        modes: with `origin`, `elbo`, `loc`, `tril`.
        sites: with `name`, `start`, `stop`.
    """
    log_w = np.asarray(log_w, np.float64)
    n = log_w.size
    smoothed = psis(log_w)
    broken = np.isnan(log_w) | np.isposinf(log_w)
    whole = not broken.any()
    reasons, witnesses = [], []

    def heard(name: str, says: str, objection: str | None, *, agrees: bool | None = None) -> None:
        witnesses.append(Witness(name, says, objection is None if agrees is None else agrees))
        reasons.extend([] if objection is None else [objection])

    if smoothed.reason is not None:
        reasons.append(smoothed.reason + ".")
    outside = int(np.isneginf(log_w).sum())
    if outside > 0.01 * n and smoothed.reason is None:
        reasons.append(
            f"{outside} of {n} draws have log density -inf under the model: the fit puts mass "
            "where the model has none."
        )
    usable = np.where(broken, -np.inf, log_w)
    fraction = effective_fraction(usable)
    large = whole and math.isfinite(smoothed.khat) and smoothed.khat >= smoothed.threshold
    heard(
        "k-hat",
        f"{smoothed.khat:.2f}, trusted below {smoothed.threshold:.2f}",
        f"k-hat {smoothed.khat:.2f} is not below {smoothed.threshold:.2f}: the fit's tails are "
        "too light somewhere, averages over weighted draws are unreliable."
        if large
        else None,
        agrees=bool(whole and smoothed.khat < smoothed.threshold),
    )
    few = whole and fraction < MIN_ESS_FRACTION
    heard(
        "ESS fraction",
        f"{fraction:.3g}, wanted {MIN_ESS_FRACTION}",
        f"importance ESS fraction {fraction:.3g} is below {MIN_ESS_FRACTION}: few draws carry "
        "the weight, the fit differs from the posterior in its bulk."
        if few
        else None,
        agrees=bool(whole and not few),
    )
    boundless = not smoothed.khat < 1.0 and fraction < _NEARLY_EQUAL
    hopeless = not whole or boundless or fraction * n < 10
    finite = log_w[np.isfinite(log_w)]
    elbo = Estimate(math.nan, math.nan)
    if finite.size > 1:
        elbo = Estimate(float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(finite.size)))
        if outside:
            elbo = Estimate(-math.inf, math.nan)
    evidence = Estimate(-math.inf, math.nan) if fraction == 0.0 else log_evidence(usable)
    if whole and fraction > 0.0:
        heard("evidence and bound", *_gap(elbo, evidence, outside))
        if n >= 200:
            heard("two halves of the draws", *_halves(usable))
        if cover is not None:
            heard("other starts", *_covered(evidence, cover))
        if draws is not None and modes:
            heard("modes of other starts", *_modes(evidence, draws, modes))
        if draws is not None and sites:
            heard("plain and weighted draws", *_displaced(draws, usable, sites))
    status = "ok" if not reasons else "failed" if hopeless else "suspect"
    table = ()
    if draws is not None and sites and whole and fraction > 0.0:
        table = _shifts(draws, usable, sites)
        worst = max(table, key=lambda row: max(row.mean, abs(row.log_sd)))
        if reasons and len(table) > 1 and max(worst.mean, abs(worst.log_sd)) > 0.1:
            reasons.append(
                f"The weights move site {worst.site!r} most: its mean by {worst.mean:.2f} sd, its sd "
                f"by a factor of {math.exp(worst.log_sd):.2f}."
            )
    return Verdict(
        status,
        tuple(reasons),
        float(smoothed.khat),
        float(smoothed.threshold),
        fraction,
        elbo,
        evidence,
        n,
        tuple(witnesses),
        table,
    )


def _gap(elbo: Estimate, evidence: Estimate, outside: int) -> tuple[str, str | None]:
    gap = evidence.value - elbo.value
    says = f"{gap:.3g} nats apart" + (", as draws fall outside the support" if outside else "")
    if gap <= _MAX_GAP or outside:
        return says, None
    return says, (
        f"evidence and bound are {gap:.2g} nats apart, by which the fit's Kullback-Leibler divergence "
        "from the posterior is estimated."
    )


def _halves(log_w: np.ndarray) -> tuple[str, str | None]:
    halves = [log_w[::2], log_w[1::2]]
    if any(np.isneginf(half).all() for half in halves):
        return "one has no weight", "all weight is in one half of the draws."
    first, second = (log_evidence(half) for half in halves)
    apart = abs(first.value - second.value)
    error = math.hypot(first.standard_error, second.standard_error)
    says = f"log evidence {first} and {second}"
    if apart <= max(_MISSED, _SIGMAS * error):
        return says, None
    return says, (
        f"two halves of the draws disagree about the log evidence, {first} and {second}: single draws "
        "carry it."
    )


def _covered(evidence: Estimate, cover: Estimate) -> tuple[str, str | None]:
    missed = cover.value - evidence.value
    error = math.hypot(cover.standard_error, evidence.standard_error)
    says = f"log evidence {cover} from a mixture found from several starts, {evidence} from the fit"
    if not (missed > _MISSED and missed > _SIGMAS * error):
        return says, None
    return says, (
        f"the fit misses about {-100 * math.expm1(-missed):.0f}% of the posterior: draws of a "
        f"mixture found from several starts put the log evidence at {cover}, the fit's own at "
        f"{evidence}."
    )


def _modes(evidence: Estimate, draws: np.ndarray, modes: Sequence[Any]) -> tuple[str, str | None]:
    """Whether the draws lie in modes from other starts as often as their bounds ask for, at least."""
    found, objection = [], None
    edge = chi2.isf(0.01, draws.shape[1])
    for mode in modes:
        white = np.linalg.solve(mode.tril, (draws - mode.loc).T)
        seen = float(((white**2).sum(axis=0) < edge).mean())
        due = math.exp(min(mode.elbo - np.logaddexp(mode.elbo, evidence.value), 0.0))
        found.append(f"{mode.origin} {mode.elbo:.4g} nats")
        if objection is None and due > _SHARE and seen < _SEEN * due:
            objection = (
                f"{mode.origin} leads to another mode with a log evidence of at least "
                f"{mode.elbo:.4g} ({evidence} by the fit), about {100 * due:.0f}% of the posterior or "
                f"more; of the fit's draws {100 * seen:.2g}% lie there."
            )
    return "; ".join(found), objection


def _shifts(draws: np.ndarray, log_w: np.ndarray, sites: Sequence[Any]) -> tuple[SiteShift, ...]:
    weights = np.exp(log_w - log_w.max())
    weights /= weights.sum()
    mean, sd = draws.mean(axis=0), draws.std(axis=0)
    moved = weights @ draws
    log_sd = 0.5 * np.log(np.maximum(weights @ (draws - moved) ** 2, 1e-300)) - np.log(sd)
    shift = np.abs(moved - mean) / sd
    return tuple(
        SiteShift(
            site.name,
            float(shift[site.start : site.stop].max()),
            float(max(log_sd[site.start : site.stop], key=abs)),
        )
        for site in sites
        if site.stop > site.start
    )


def _displaced(
    draws: np.ndarray, log_w: np.ndarray, sites: Sequence[Any]
) -> tuple[str, str | None]:
    """Whether weights move means or spreads of the draws: k-hat and ESS bear much of that in low dim.

    Standard errors are those of self-normalised averages, so that a moment that hangs on a few
    draws proves nothing.
    """
    weights = np.exp(log_w - log_w.max())
    weights /= weights.sum()
    n = len(draws)
    mean, moved = draws.mean(axis=0), weights @ draws
    plain, weighted = (draws - mean) ** 2, (draws - moved) ** 2
    var, var_moved = plain.mean(axis=0), weights @ weighted
    with np.errstate(all="ignore"):
        shift = np.abs(moved - mean) / np.sqrt(var)
        shift_error = np.sqrt((weights**2 @ weighted) / var + 1 / n)
        log_sd = 0.5 * np.log(var_moved / var)
        log_sd_error = 0.5 * np.sqrt(
            (weights**2 @ (weighted / var_moved - 1) ** 2)
            + ((plain / var - 1) ** 2).mean(axis=0) / n
        )
        excess = np.maximum(
            (shift - _SIGMAS * shift_error) / _FAR_MEAN,
            (np.abs(log_sd) - _SIGMAS * log_sd_error) / _FAR_LOG_SD,
        )
    worst = int(np.argmax(np.where(np.isnan(excess), -np.inf, excess)))
    name = next((s.name for s in sites if s.start <= worst < s.stop), "?")
    says = (
        f"the weights move the mean of a coordinate of {name!r} by {shift[worst]:.2f} sd and its sd by "
        f"a factor of {math.exp(log_sd[worst]):.2f}"
    )
    if not excess[worst] > 1:
        return says, None
    return says, f"plain draws are off: {says}. Those of resample are corrected for it."
