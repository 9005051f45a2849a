"""The real posteriors: each is a target of the stated dimension, finite where fits start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import vflow as vf
from tests.data.posteriors import POSTERIORS, acceptable, errors
from vflow.targets import preflight


def target_of(name):
    posterior = POSTERIORS[name]
    return vf.target(vf.from_numpyro(posterior.model, **posterior.data))


@pytest.mark.parametrize("name", POSTERIORS)
def test_target_is_finite_and_names_every_reference_quantity(name):
    posterior, target = POSTERIORS[name], target_of(name)
    assert target.dim == posterior.dim
    assert preflight(target, np.zeros(target.dim))
    constrained = jax.eval_shape(target.constrain, jnp.zeros(target.dim))
    for quantity in posterior.reference["names"]:
        site, _, index = quantity.partition("[")
        assert site in constrained
        if index:
            assert int(index.rstrip("]")) < constrained[site].shape[0]


def test_eight_schools_models_agree_with_scipy():
    data, x = POSTERIORS["eight_schools_centered"].data, np.linspace(-1, 1, 10)
    mu, tau, rest = x[0], np.exp(x[1]), x[2:]
    scales = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, 0, 5) + x[1]
    centred = stats.norm.logpdf(rest, mu, tau).sum()
    centred += stats.norm.logpdf(data["y"], rest, data["sigma"]).sum()
    assert jax.jit(target_of("eight_schools_centered").log_prob)(x) == pytest.approx(
        scales + centred
    )
    free = stats.norm.logpdf(rest).sum()
    free += stats.norm.logpdf(data["y"], mu + tau * rest, data["sigma"]).sum()
    assert jax.jit(target_of("eight_schools_noncentered").log_prob)(x) == pytest.approx(
        scales + free
    )


def test_garch_and_hidden_markov_agree_with_plain_loops():
    data, x = POSTERIORS["garch11"].data, np.array([4.0, 0.5, 0.3, -0.2])
    mu, alpha0, alpha1 = x[0], np.exp(x[1]), 1 / (1 + np.exp(-x[2]))
    fraction = 1 / (1 + np.exp(-x[3]))
    beta1 = (1 - alpha1) * fraction
    scale = [data["sigma1"]]
    for previous in data["y"][:-1]:
        shock = alpha0 + alpha1 * (previous - mu) ** 2
        scale.append(np.sqrt(shock + beta1 * scale[-1] ** 2))
    jacobian = x[1] + np.log(alpha1 * (1 - alpha1)) + np.log(beta1 * (1 - fraction))
    expected = stats.norm.logpdf(data["y"], mu, scale).sum() + jacobian
    assert jax.jit(target_of("garch11").log_prob)(x) == pytest.approx(expected, rel=1e-12)

    target, y = target_of("hmm_example"), POSTERIORS["hmm_example"].data["y"]
    x = np.array([0.4, -0.3, 1.0, 1.5])
    values, terms = jax.jit(lambda x: (target.constrain(x), target.terms(x)))(x)
    transition = np.stack([values["theta1"], values["theta2"]])
    emission = stats.norm.pdf(y[:, None], np.asarray(values["mu"]), 1)
    weights, log_norm = emission[0], 0.0
    for row in emission[1:]:
        weights = (weights @ transition) * row
        log_norm, weights = log_norm + np.log(weights.sum()), weights / weights.sum()
    expected = log_norm + np.log(weights.sum())
    assert terms["likelihood"] == pytest.approx(expected, rel=1e-10)


def test_gp_pois_regr_breaks_down_in_float32():
    target = target_of("gp_pois_regr")
    x = np.asarray(target.prior_draws(jax.random.key(0), 20))
    assert preflight(target, x).all()
    with jax.enable_x64(False):
        usable = np.asarray(jax.jit(jax.vmap(target.log_prob))(np.float32(x)))
        assert not np.isfinite(usable).all()


def test_the_rule_by_which_draws_are_judged():
    reference = POSTERIORS["eight_schools_centered"].reference | {"names": ["mu", "theta[1]"]}
    reference |= {
        "mean": np.array([1.0, 2.0]),
        "sd": np.array([1.0, 3.0]),
        "quantiles": np.array([[1.0], [1.0], [1.0], [1.0]])
        + stats.norm.ppf([0.1, 0.25, 0.5, 0.75])[:, None] * np.array([1.0, 3.0])
        + np.array([0.0, 1.0]),
    }
    z = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    exact = {"mu": 1 + z, "theta": np.stack([0 * z, 2 + 3 * z], axis=-1)}
    assert max(errors(reference, exact)) < 1e-3
    moved = exact | {"theta": exact["theta"] + 0.6}
    assert errors(reference, moved)[0] == pytest.approx(0.2, abs=1e-3)
    wide = exact | {"mu": 1 + 1.5 * z}
    assert errors(reference, wide)[1] == pytest.approx(np.log(1.5), abs=1e-3)
    broken = exact | {"mu": np.full_like(z, np.nan)}
    assert np.isnan(errors(reference, broken)[0])
    heavy = reference | {"sd": np.array([2.0, 3.0])}  # now mu is judged by its quantiles
    assert max(errors(heavy, exact)) < 1e-3
    assert errors(heavy, wide)[0] == pytest.approx(0.5 * stats.norm.ppf(0.9), abs=1e-3)
    assert acceptable(0.6, 0.2, 0.1, 0.1)
    for worse in ((0.8, 0.2, 0.1, 0.1), (0.6, 0.05, 0.1, 0.1), (0.6, 0.2, 0.13, 0.1)):
        assert not acceptable(*worse)
    assert acceptable(0.6, 0.2, 0.13, 0.2, slack=1.6)
    assert not acceptable(0.6, 0.2, np.nan, 0.1)
