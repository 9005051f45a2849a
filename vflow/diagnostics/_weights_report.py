"""Importance weights of a family, and what they cannot see: modes without draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from vflow._core import Estimate
from vflow._core._numerics import as_float
from vflow.bijections import Affine
from vflow.diagnostics._psis import khat as khat_of
from vflow.diagnostics._weights import ess_fraction, log_evidence
from vflow.distributions import AbstractDistribution, sample_and_log_prob
from vflow.flows import stochastic_flow
from vflow.flows.stochastic import HMC

_PROBE_STEPS = (0.2, 0.1, 0.05, 0.02)  # in units of the probe's width
_PROBE_ROUNDS = 8
_WIDTH = 4.0
_SHARE = 0.02  # a label with less mass than this is not missed
_SIGMAS = 4.5


class LabelMass(NamedTuple):
    """Mass of one value of the label.

    Attributes:
        raw: share of the draws.
        weighted: share of their weight, with its standard error.
        elsewhere: share by the reference draws, or by the weighted probe, with its standard error.
    """

    raw: float
    weighted: Estimate
    elsewhere: Estimate


class WeightsReport(NamedTuple):
    """What importance weights say about a family, and what independent witnesses say.

    Attributes:
        log_evidence: of the draws of q, unbiased for Z on average.
        elbo: mean log weight.
        ess_fraction: importance effective sample size over the number of draws.
        khat: Pareto k-hat of the weights.
        num_zero: draws with weight zero or not finite.
        eubo: mean of log p - log q over the reference draws, an upper bound of log Z; or None.
        reverse_log_evidence: log Z from the reference draws; or None.
        probe_log_evidence: log Z by annealed importance sampling from a wide start.
        labels: value of the label -> its masses.
        warnings: what is wrong, one sentence each.
    """

    log_evidence: Estimate
    elbo: Estimate
    ess_fraction: float
    khat: float
    num_zero: int
    eubo: Estimate | None
    reverse_log_evidence: Estimate | None
    probe_log_evidence: Estimate
    labels: dict[Any, LabelMass]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"log evidence {self.log_evidence}, ELBO {self.elbo} (nats)",
            f"importance ESS fraction {self.ess_fraction:.3f}, k-hat {self.khat:.2f}, "
            f"{self.num_zero} draws of weight zero",
        ]
        if self.eubo is not None:
            lines.append(
                f"from the reference: log evidence {self.reverse_log_evidence}, EUBO {self.eubo}"
            )
        lines.append(f"from the probe: log evidence {self.probe_log_evidence}")
        if self.labels:
            lines.append("label        raw   weighted            witness")
        for value, mass in self.labels.items():
            lines.append(f"{value!s:8} {mass.raw:7.3f}   {mass.weighted}   {mass.elsewhere}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def weights_report(
    key: PRNGKeyArray,
    q: Any,
    log_density: Callable[[Array], Array],
    *,
    label: Callable[[Array], Any] | None = None,
    reference: ArrayLike | None = None,
    num_draws: int = 20_000,
    num_probes: int = 2000,
    num_paths: int = 16,
) -> WeightsReport:
    r"""Log evidence from both directions, mass by label, and a search for modes that q lost.

    A family that lost a mode has an excellent ELBO, ESS and standard error: its weights estimate the
    evidence of the modes it has. So two witnesses that do not draw from q are heard.

    * Reference draws y of the target, where there are any: $\mathrm{EUBO} = \mathbb{E}[\log p(y) - \log
      \hat q(y)] \ge \log Z$ and $-\log\mathbb{E}[\hat q(y)/p(y)]$.
    * A probe: annealed importance sampling by HMC from a Gaussian four times as wide as q.

    It cannot see a mode that neither the reference nor the probe visits: one far outside of q's
    surroundings, or narrow in many dimensions. No warning is no proof.

    Args:
        key: PRNG key.
        q: a flow or a stochastic flow on `(dim,)`.
        log_density: the target, unnormalised.
        label: of a point: a boolean or an integer, whose masses are compared.
        reference: draws of the target, (n, dim), n of at least 2.
        num_draws: draws of q.
        num_probes: paths of the probe.
        num_paths: reversed paths behind the density at a reference draw, for stochastic flows.

    Returns:
        A `WeightsReport`; it prints.

    Raises:
        ValueError: reference draws of a wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> two_modes = lambda x: jnp.sum(jnp.logaddexp(-8 * (x - 1) ** 2, -8 * (x + 1) ** 2))
        >>> lost = vf.distributions.Flow(vf.distributions.Normal(1), vf.bijections.Affine(
        ...     jnp.ones(1), 0.25 * jnp.ones(1)))
        >>> report = vf.diagnostics.weights_report(
        ...     jax.random.key(0), lost, two_modes, label=lambda x: x[0] > 0)
        >>> print(report.ess_fraction > 0.9, len(report.warnings) > 0)
        True True

    Source:
        Blessing, Jia, Esslinger, Vargas & Neumann 2024, Beyond ELBOs (arXiv 2406.07423), for the
        EUBO; Neal 2001 for annealed importance sampling.
    """
    key_draw, key_probe, key_paths = jax.random.split(key, 3)
    x, log_w = _weighted(key_draw, q, log_density, num_draws)
    finite = np.isfinite(log_w)
    usable = np.where(finite, log_w, -np.inf)
    evidence = log_evidence(usable)
    elbo = _mean(log_w)
    warnings = []
    if not finite.all():
        warnings.append(f"{int((~finite).sum())} of {num_draws} draws have weight zero.")

    probe = _probe(q.shape[0], x[finite])
    witness, log_v = _weighted(key_probe, probe, log_density, num_probes)
    log_v = np.where(np.isfinite(log_v), log_v, -np.inf)
    found = log_evidence(log_v)
    _compare(warnings, evidence, found, "the probe", int(ess_fraction(log_v) * num_probes))

    eubo = backwards = None
    if reference is not None:
        witness = np.asarray(as_float(reference))
        if witness.ndim != 2 or witness.shape[1:] != q.shape or len(witness) < 2:
            raise ValueError(f"reference must have shape (n, {q.shape[0]}), got {witness.shape}.")
        ratios = _at_reference(key_paths, q, log_density, jnp.asarray(witness), num_paths)
        eubo, log_v = _mean(ratios), np.zeros(len(witness))
        inverse = log_evidence(-ratios)
        backwards = Estimate(-inverse.value, inverse.standard_error)
        loose, gap = evidence.value - elbo.value, eubo.value - evidence.value
        if gap > 1.0 + 4.0 * abs(loose):
            warnings.append(
                f"the upper bound lies {gap:.1f} nats above the log evidence, the lower one {loose:.1f} "
                "below: q has next to no density where the reference has draws."
            )

    labels = {} if label is None else _labels(label, x, usable, witness, log_v)
    for value, mass in labels.items():
        share, error = mass.elsewhere
        if share > max(_SHARE, _SIGMAS * error) and mass.weighted.value < 0.2 * share:
            warnings.append(
                f"label {value}: {share:.2f} of the witness's mass, {mass.weighted.value:.3f} of q's: "
                "a mode was lost."
            )
    return WeightsReport(
        evidence,
        elbo,
        float(ess_fraction(usable)),
        float(khat_of(usable)),
        int((~finite).sum()),
        eubo,
        backwards,
        found,
        labels,
        tuple(warnings),
    )


def _weighted(key: Any, q: Any, log_density: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    @jax.jit
    def draw(key):
        x, log_q = sample_and_log_prob(key, q, n, log_density=log_density)
        return x, jax.vmap(log_density)(x) - log_q

    x, log_w = draw(key)
    return np.asarray(x), np.asarray(log_w, np.float64)


def _probe(dim: int, x: np.ndarray) -> Any:
    """Annealed importance sampling from a Gaussian wider than the draws."""
    scale = _WIDTH * np.maximum(x.std(axis=0), 1e-6)
    steps = [HMC(num_steps=1, num_leapfrog=5, step_size=size) for size in _PROBE_STEPS]
    chain = stochastic_flow(jax.random.key(0), dim, steps * _PROBE_ROUNDS)
    return chain.through(Affine(jnp.asarray(x.mean(axis=0)), jnp.asarray(scale)))


def _compare(warnings: list[str], own: Estimate, other: Estimate, who: str, size: int) -> None:
    error = np.hypot(own.standard_error, other.standard_error)
    if size >= 20 and other.value - own.value > max(0.05, _SIGMAS * error):
        warnings.append(
            f"{who} finds a log evidence of {other}, the draws of q {own}: q misses part of the target."
        )


def _at_reference(key: Any, q: Any, log_density: Any, y: Array, num_paths: int) -> np.ndarray:
    """log p - log q at the reference draws."""

    def log_q(key, y):
        if isinstance(q, AbstractDistribution):
            return q.log_prob(y)
        return q.estimate_log_q(key, y, log_density, num_paths)

    keys = jax.random.split(key, len(y))
    ratios = jax.jit(jax.vmap(lambda key, y: log_density(y) - log_q(key, y)))(keys, y)
    return np.asarray(ratios, np.float64)


def _mean(values: np.ndarray) -> Estimate:
    if not np.isfinite(values).all():
        return Estimate(float(values.mean()), float("nan"))
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size)))


def _labels(
    label: Callable, x: np.ndarray, log_w: np.ndarray, y: np.ndarray, log_v: np.ndarray
) -> dict[Any, LabelMass]:
    of_draws, of_witness = (np.asarray(jax.vmap(label)(jnp.asarray(v))) for v in (x, y))
    found = {}
    for value in np.unique(np.concatenate([of_draws, of_witness])):
        here, there = of_draws == value, of_witness == value
        found[value.item()] = LabelMass(
            float(here.mean()), _share(here, log_w), _share(there, log_v)
        )
    return found


def _share(inside: np.ndarray, log_w: np.ndarray) -> Estimate:
    """The self-normalised share of the weight, with its delta-method standard error."""
    w = np.exp(log_w - log_w.max()) if np.isfinite(log_w.max()) else np.ones_like(log_w)
    w = w / w.sum()
    share = w @ inside
    return Estimate(float(share), float(np.sqrt(np.sum((w * (inside - share)) ** 2))))
