"""Many small fits in one program: against closed forms, one by one, and k-hat against arviz-stats."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf
from vflow.fit._pareto import khat

RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 12, 2)) * np.array([1.0, 30.0])
Y = np.einsum("bnk,bk->bn", X, RNG.standard_normal((8, 2)) / [1.0, 30.0])
Y += 0.5 * RNG.standard_normal((8, 12))


def log_density(w, x, y):
    """Regression with known noise 0.5 and standard normal coefficients, normalised."""
    prior = -0.5 * jnp.sum(w**2) - jnp.log(2 * jnp.pi)
    residual = (y - x @ w) / 0.5
    return prior - 0.5 * jnp.sum(residual**2) - 12 * (jnp.log(0.5) + 0.5 * jnp.log(2 * jnp.pi))


def closed_form(x, y):
    """Posterior mean and covariance, and log evidence."""
    precision = np.eye(2) + x.T @ x / 0.25
    covariance = np.linalg.inv(precision)
    marginal = 0.25 * np.eye(12) + x @ x.T
    log_z = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    return covariance @ (x.T @ y / 0.25), covariance, log_z


def small(key):
    return vf.flows.coupling(key, 2, num_layers=2, hidden=(4,))


FIT = vf.fit_fn(log_density, dim=2, make_flow=small, num_steps=20, num_samples=16, num_draws=512)


@pytest.fixture(scope="module")
def batch():
    return jax.jit(jax.vmap(FIT))(jax.random.split(jax.random.key(0), 8), X, Y)


@pytest.mark.slow
def test_eight_regressions_at_once_have_their_closed_forms(batch):
    draw = jax.jit(
        jax.vmap(lambda f: jax.vmap(f.sample)(jax.random.split(jax.random.key(1), 4000)))
    )
    draws = np.asarray(draw(batch.flow))
    assert batch.history.shape == (8, 20) and np.isfinite(batch.history).all()
    assert (batch.ess_fraction > 0.99).all() and (batch.khat < 1.0).all()
    for i in range(8):
        mean, covariance, log_z = closed_form(X[i], Y[i])
        assert abs(batch.log_evidence[i] - log_z) < 5e-3
        assert batch.elbo[i] < batch.log_evidence[i] + 1e-9
        sd = np.sqrt(np.diag(covariance))
        assert (np.abs(draws[i].mean(axis=0) - mean) < 4.5 * sd / np.sqrt(4000)).all()
        assert np.abs(np.log(draws[i].std(axis=0) / sd)).max() < 0.06
        assert not (np.abs(draws[i].mean(axis=0) - mean - 0.2 * sd) < 4.5 * sd / 63).any()


@pytest.mark.slow
def test_a_batch_equals_its_fits_one_by_one(batch):
    one = jax.jit(FIT)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 8)):
        alone = one(key, X[i], Y[i])
        of_batch = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(of_batch), strict=True):
            assert np.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_numpyro_model_whose_posterior_is_no_gaussian():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        with numpyro.plate("n", 10):
            numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    data = RNG.standard_normal((4, 10)) * np.array([0.3, 1.0, 3.0, 10.0])[:, None]
    run = vf.fit_fn(vf.from_numpyro(model, data[0]), num_steps=300)
    fits = jax.jit(jax.vmap(run, (None, 0)))(jax.random.key(0), data)
    assert (fits.ess_fraction > 0.95).all() and (fits.khat < 0.7).all()
    grid = np.linspace(1e-3, 60.0, 200_001)
    for y, value in zip(data, fits.log_evidence, strict=True):
        log_p = -10 * np.log(grid) - 0.5 * (y**2).sum() / grid**2 - 5 * np.log(2 * np.pi)
        log_p += np.log(2) - 0.5 * (grid / 2) ** 2 - np.log(2) - 0.5 * np.log(2 * np.pi)
        exact = np.log(np.trapezoid(np.exp(log_p - log_p.max()), grid)) + log_p.max()
        assert abs(value - exact) < 0.02


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_khat_is_that_of_the_library(scale):
    log_w = scale * RNG.standard_exponential(2000) + 700.0
    assert abs(khat(jnp.asarray(log_w)) - vf.diagnostics.khat(log_w)) < 1e-3


def test_khat_of_broken_and_of_equal_weights():
    log_w = jnp.asarray(RNG.standard_normal(200))
    assert khat(log_w.at[3].set(jnp.nan)) == jnp.inf
    assert khat(log_w.at[3].set(jnp.inf)) == jnp.inf
    assert khat(jnp.full(200, -jnp.inf)) == jnp.inf
    assert khat(jnp.zeros(200)) <= 0.0
    assert jnp.isfinite(khat(log_w.at[:20].set(-jnp.inf)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"dim": None}, TypeError, "dim"),
        ({"dim": 0}, ValueError, "dim"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_draws": 10}, ValueError, "num_draws"),
        ({"make_flow": lambda key: vf.flows.gaussian(key, 3)}, ValueError, "make_flow"),
        ({"make_flow": 3}, TypeError, "make_flow"),
        ({"program_or_density": 3}, TypeError, "log_density"),
    ],
    ids=["no dim", "zero dim", "no steps", "few draws", "flow of 3", "no function", "no density"],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {"program_or_density": log_density, "dim": 2} | change
    with pytest.raises(error, match=match):
        vf.fit_fn(arguments.pop("program_or_density"), **arguments)
