"""Hierarchical models in decentred coordinates, against the Jacobian and NumPyro's own density."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

import vflow as vf
from vflow.targets import decentre, funnels

L = jnp.array([[1.0, 0.0], [0.6, 0.8]])


def model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    rows, columns = numpyro.plate("rows", 3, dim=-2), numpyro.plate("columns", 2, dim=-1)
    with columns:
        spread = numpyro.sample("spread", dist.LogNormal(mu, tau))
        with rows:
            theta = numpyro.sample("theta", dist.StudentT(5.0, mu, spread))
    with numpyro.plate("groups", 4):
        slopes = numpyro.sample("slopes", dist.MultivariateNormal(jnp.ones(2), scale_tril=tau * L))
    flat = numpyro.sample("flat", dist.Laplace(mu, 1.0).expand([2]).to_event(1))
    with numpyro.handlers.scale(scale=2.0):
        level = numpyro.sample("level", dist.Normal(0.0, tau).expand([2]).to_event(1))
    loc = jnp.sum(theta) + jnp.sum(slopes) + jnp.sum(flat) + jnp.sum(level)
    numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.fixture(scope="module")
def pair():
    plain = vf.target(vf.from_numpyro(model, y=0.3))
    names = funnels(plain, jax.random.key(0))
    return plain, decentre(plain, names), names


def test_funnels_are_the_sites_whose_scale_depends_on_others(pair):
    assert pair[2] == ("spread", "theta", "slopes", "level")  # "flat": its location only


def test_the_density_is_the_same_one_in_other_coordinates(pair):
    plain, other, _ = pair
    assert [s.name for s in other.sites] == [s.name for s in plain.sites]
    assert other.dim == plain.dim

    @jax.jit
    def everything(z):
        move = lambda z: plain.unconstrain(
            {s.name: other.constrain(z)[s.name] for s in plain.sites}
        )
        values = other.constrain(z)
        there = plain.log_prob(move(z)), jnp.linalg.slogdet(jax.jacfwd(move)(z))[1]
        back = other.unconstrain({s.name: values[s.name] for s in other.sites})
        terms = sum(jnp.sum(term) for term in other.terms(z).values())
        return other.log_prob(z), *there, back, terms, values

    for seed in range(3):
        z = jax.random.normal(jax.random.key(seed), (other.dim,))
        log_p, log_p_there, log_det, back, terms, values = everything(z)
        np.testing.assert_allclose(log_p, log_p_there + log_det, rtol=1e-11)
        np.testing.assert_allclose(back, z, atol=1e-11)
        np.testing.assert_allclose(terms, log_p, rtol=1e-12)
        x = plain.unconstrain({s.name: values[s.name] for s in plain.sites})
        with jax.numpy_rank_promotion("allow"):
            reference = log_density(
                model, (), {"y": 0.3}, {s.name: values[s.name] for s in plain.sites}
            )[0]
        own = sum(jnp.sum(v) for k, v in plain.terms(x).items() if not k.startswith("jacobian"))
        np.testing.assert_allclose(own, reference, rtol=1e-12)


def test_prior_draws_of_decentred_sites_are_free_of_location_and_scale(pair):
    _, other, _ = pair
    draws = other.prior_draws(jax.random.key(1), 4000)
    where = {site.name: site.slice for site in other.sites}
    for name in ("spread", "slopes", "level"):
        z = np.asarray(draws[:, where[name]])
        np.testing.assert_allclose(z.mean(0), 0, atol=4.5 / 4000**0.5)
        np.testing.assert_allclose(np.cov(z.T), np.eye(z.shape[1]), atol=0.12)
    tau = np.log(np.asarray(draws[:, where["tau"]]) ** 2 + 1)[:, 0]
    assert abs(np.corrcoef(tau, np.abs(draws[:, where["level"]][:, 0]))[0, 1]) < 4.5 / 4000**0.5


def test_targets_without_a_funnel_stay_as_they_are():
    bare = vf.Target(lambda x: -jnp.sum(x**2), 2)
    assert funnels(bare, jax.random.key(0)) == ()
    assert decentre(bare, ()) is bare


def test_a_site_in_a_scan_is_left_alone():
    def walk(y=None):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))

        def step(state, _):
            state = numpyro.sample("state", dist.Normal(state, tau))
            return state, None

        last, _ = numpyro.contrib.control_flow.scan(step, 0.0, jnp.arange(3))
        numpyro.sample("y", dist.Normal(last, 1.0), obs=y)

    import numpyro.contrib.control_flow

    assert funnels(vf.target(vf.from_numpyro(walk, y=0.1)), jax.random.key(0)) == ()
