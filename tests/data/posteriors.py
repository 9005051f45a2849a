"""Thirteen real posteriors: models, data, reference numbers, and how draws are judged by them."""
# pyright: reportIndexIssue=false

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

FLAT = functools.partial(dist.ImproperUniform, batch_shape=(), event_shape=())
POSITIVE = constraints.positive


@dataclasses.dataclass(frozen=True)
class RealPosterior:
    """A model, its data, and what is known about its posterior."""

    name: str
    model: Callable[..., None]
    dim: int  # unconstrained coordinates

    @functools.cached_property
    def _file(self) -> dict[str, Any]:
        return json.loads((Path(__file__).parent / "posteriors" / f"{self.name}.json").read_text())

    @property
    def data(self) -> dict[str, Any]:
        """Keyword arguments of the model; lists become float64 arrays."""
        return {
            k: np.asarray(v, float) if isinstance(v, list) else v
            for k, v in self._file["data"].items()
        }

    @property
    def reference(self) -> dict[str, Any]:
        """names, and arrays: mean (k,), sd (k,), quantiles (4, k) at .1, .25, .5, .75."""
        reference = dict(self._file["reference"])
        return reference | {k: np.asarray(reference[k]) for k in ("mean", "sd", "quantiles")}


def pick(draws: dict[str, Any], name: str) -> np.ndarray:
    """The draws of `site` or `site[i]`, shape (n,), float64."""
    site, _, index = name.partition("[")
    values = np.asarray(draws[site], np.float64)
    return values[:, *map(int, index.rstrip("]").split(","))] if index else values


def errors(reference: dict[str, Any], draws: dict[str, Any]) -> tuple[float, float]:
    """How far draws are from the reference.

    Where the sd is dominated by the tail (above 1.5 times the spread of the middle half, as a
    normal would have it), the .1, .5 and .75 quantiles stand in for mean and sd.

    Args:
        reference: of a `RealPosterior`.
        draws: site -> (n, *site shape), constrained, deterministic sites included.

    Returns:
        The worst mean error in units of the reference sd, and the worst |log sd ratio|.
    """
    worst_mean, worst_log_sd = 0.0, 0.0
    low, lower, median, upper = reference["quantiles"]
    spread = (upper - lower) / 1.349
    for j, name in enumerate(reference["names"]):
        values, mean, sd = pick(draws, name), reference["mean"][j], reference["sd"][j]
        if sd > 1.5 * spread[j]:
            found = np.quantile(values, (0.1, 0.5, 0.75))
            error = np.abs(found - (low[j], median[j], upper[j])).max() / spread[j]
        else:
            error = abs(values.mean() - mean) / sd
            worst_log_sd = np.maximum(worst_log_sd, abs(np.log(values.std() / sd)))
        worst_mean = np.maximum(worst_mean, error)  # unlike max(), keeps a NaN
    return float(worst_mean), float(worst_log_sd)


MEAN_ERROR, LOG_SD_ERROR, KHAT, ESS_FRACTION = 0.12, 0.15, 0.7, 0.1


def acceptable(khat, ess_fraction, mean_error, log_sd_error, slack=1.0) -> bool:
    """Whether numbers of a fit (the medians over three seeds) pass.

    With slack=1.6 the errors (not k-hat and ESS) are those that a single run may have and still
    call itself ok.
    """
    return bool(
        khat < KHAT
        and ess_fraction >= ESS_FRACTION
        and mean_error < slack * MEAN_ERROR
        and log_sd_error < slack * LOG_SD_ERROR
    )


def ar_5(y):
    n, order = len(y), 5
    lags = np.column_stack([y[order - lag : n - lag] for lag in range(1, order + 1)])
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    with numpyro.plate("lag", order):
        beta = numpyro.sample("beta", dist.Normal(0, 10))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("time", n - order):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def diamonds(n, ybar, R, q, rss):
    with numpyro.plate("column", len(q)):
        b = numpyro.sample("b", dist.Normal(0, 1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3, 8, 10))
    sigma = numpyro.sample("sigma", FLAT(POSITIVE))
    numpyro.factor("half_student", dist.StudentT(3, 0, 10).log_prob(sigma))
    residual = jnp.append(q - R @ b, jnp.sqrt(n) * (ybar - intercept))
    squares = rss + residual @ residual
    numpyro.factor("likelihood", -n * jnp.log(sigma) - squares / (2 * sigma**2))


def eight_schools_centered(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def garch_1_1(y, sigma1):
    mu = numpyro.sample("mu", FLAT(constraints.real))
    alpha0 = numpyro.sample("alpha0", FLAT(POSITIVE))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0, 1))
    # stationary: flat on (0, 1 - alpha1), a support that depends on another site
    beta1 = numpyro.sample("beta1", FLAT(constraints.interval(0.0, 1 - alpha1)))
    shocks = alpha0 + alpha1 * (y[:-1] - mu) ** 2

    def step(variance, shock):
        variance = shock + beta1 * variance
        return variance, variance

    first = jnp.full_like(mu, sigma1**2)
    _, rest = jax.lax.scan(step, first, shocks, unroll=10)
    scale = jnp.sqrt(jnp.append(first, rest))
    with numpyro.plate("time", len(y)):
        numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def gp_poisson(x, k, jitter=1e-10):
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    with numpyro.plate("point", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
    distance = (x[:, None] - x) / rho
    gram = alpha**2 * jnp.exp(-0.5 * distance**2) + jitter * np.eye(len(x))
    f = numpyro.deterministic("f", jnp.linalg.cholesky(gram) @ z)
    with numpyro.plate("point", len(x)):
        numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


def hidden_markov(log_transition, log_emission):
    """Log likelihood with the states summed out; the first state has weight one, whichever it is.

    The product of the (state, state) matrices is taken pairwise, in log2(n) rounds.
    """

    def times(a, b):
        return jax.nn.logsumexp(a[:, :, :, None] + b[:, None, :, :], axis=2)

    factors = log_transition + log_emission[1:, None, :]
    while len(factors) > 1:
        even = len(factors) - len(factors) % 2
        paired = times(factors[0:even:2], factors[1:even:2])
        factors = jnp.concatenate([paired, factors[even:]])
    return jax.nn.logsumexp(log_emission[0][:, None] + factors[0])


def hmm_drive(u, v, alpha):
    rows = [numpyro.sample(f"theta{i + 1}", dist.Dirichlet(alpha[i])) for i in range(2)]
    ordered = dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,))
    prior = dist.Normal(np.array([0.0, 3.0]), 1.0).to_event(1)
    phi = numpyro.sample("phi", ordered)
    lam = numpyro.sample("lambda", ordered)
    numpyro.factor("prior", prior.log_prob(phi) + prior.log_prob(lam))
    log_emission = dist.Exponential(phi).log_prob(u[:, None])
    log_emission += dist.Exponential(lam).log_prob(v[:, None])
    numpyro.factor("likelihood", hidden_markov(jnp.log(jnp.stack(rows)), log_emission))


def hmm_gaussian(y):
    rows = [numpyro.sample(f"theta{i + 1}", dist.Dirichlet(np.ones(2))) for i in range(2)]
    ordered = dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,))
    mu = numpyro.sample("mu", ordered)
    numpyro.factor("prior", dist.Normal(np.array([3.0, 10.0]), 1.0).to_event(1).log_prob(mu))
    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    numpyro.factor("likelihood", hidden_markov(jnp.log(jnp.stack(rows)), log_emission))


def item_response(y):
    num_items, num_persons = y.shape
    items = numpyro.plate("item", num_items, dim=-2)
    persons = numpyro.plate("person", num_persons, dim=-1)
    sigma_theta = numpyro.sample("sigma_theta", dist.HalfCauchy(2))
    sigma_a = numpyro.sample("sigma_a", dist.HalfCauchy(2))
    mu_b = numpyro.sample("mu_b", dist.Normal(0, 5))
    sigma_b = numpyro.sample("sigma_b", dist.HalfCauchy(2))
    with persons:
        theta = numpyro.sample("theta", dist.Normal(0, sigma_theta))
    a = numpyro.sample("a", dist.LogNormal(0, sigma_a).expand([num_items]).to_event(1))
    b = numpyro.sample("b", dist.Normal(mu_b, sigma_b).expand([num_items]).to_event(1))
    with items, persons:
        logits = a[:, None] * (theta - b[:, None])
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def kidscore_interaction(kid_score, mom_iq, mom_hs):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), (4,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    with numpyro.plate("child", len(kid_score)):
        numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def kilpisjarvi(x, y, pmualpha, psalpha, pmubeta, psbeta):
    alpha = numpyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = numpyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = numpyro.sample("sigma", FLAT(POSITIVE))
    with numpyro.plate("year", len(y)):
        numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def nes_2000(partyid7, real_ideo, race_adj, educ1, gender, income, age_discrete):
    ages = [age_discrete == group for group in (2, 3, 4)]
    columns = [np.ones_like(partyid7), real_ideo, race_adj, *ages, educ1, gender, income]
    design = np.column_stack(columns).astype(float)
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), (9,)))
    sigma = numpyro.sample("sigma", FLAT(POSITIVE))
    with numpyro.plate("person", len(partyid7)):
        numpyro.sample("partyid7", dist.Normal(design @ beta, sigma), obs=partyid7)


def rats(rat, x, y, xbar):
    which, age = rat.astype(int) - 1, x - xbar
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0, 100))
    mu_beta = numpyro.sample("mu_beta", dist.Normal(0, 100))
    sigma_y = numpyro.sample("sigma_y", FLAT(POSITIVE))
    sigma_alpha = numpyro.sample("sigma_alpha", FLAT(POSITIVE))
    sigma_beta = numpyro.sample("sigma_beta", FLAT(POSITIVE))
    with numpyro.plate("rat", which.max() + 1):
        alpha = numpyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = numpyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with numpyro.plate("weighing", len(y)):
        numpyro.sample("y", dist.Normal(alpha[which] + beta[which] * age, sigma_y), obs=y)


POSTERIORS = {
    name: RealPosterior(name, model, dim)
    for name, model, dim in (
        ("arK", ar_5, 7),
        ("diamonds", diamonds, 26),
        ("eight_schools_centered", eight_schools_centered, 10),
        ("eight_schools_noncentered", eight_schools_noncentered, 10),
        ("garch11", garch_1_1, 4),
        ("gp_pois_regr", gp_poisson, 13),
        ("hmm_drive_0", hmm_drive, 6),
        ("hmm_example", hmm_gaussian, 4),
        ("irt_2pl", item_response, 144),
        ("kidscore_interaction", kidscore_interaction, 5),
        ("kilpisjarvi", kilpisjarvi, 3),
        ("nes2000", nes_2000, 10),
        ("rats", rats, 65),
    )
}
