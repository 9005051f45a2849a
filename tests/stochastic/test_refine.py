"""Posterior.refine: chains that start from a fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from vflow.fit._draws import Drawer
from vflow.fit._posterior import Posterior
from vflow.fit._refine import judged
from vflow.fit._verdict import judge


def posterior_of(flow, log_density):
    target = vf.Target(log_density, dim=flow.shape[0])
    _, log_w = Drawer(target, "float64").weighted(flow, jax.random.key(7), 4096)
    return Posterior(flow, target, judge(log_w), np.zeros(1), {"dtype": "float64"})


def affine_flow(loc, scale):
    affine = vf.bijections.Affine(jnp.asarray(loc), jnp.asarray(scale))
    return vf.distributions.Flow(vf.distributions.Normal(len(loc)), affine)


def banana(x):
    """x0 ~ N(1, 2^2), x1 given x0 ~ N(x0^2 / 8, .3^2); E x1 = (4 + 1) / 8."""
    return -0.5 * ((x[0] - 1.0) / 2.0) ** 2 - 0.5 * ((x[1] - x[0] ** 2 / 8) / 0.3) ** 2


def two_modes(x):
    """Two normals of sd 0.25 at -1 and 1, the right one with 0.7 of the mass."""
    left, right = (-8 * jnp.sum((x - m) ** 2) for m in (-1.0, 1.0))
    return jnp.logaddexp(jnp.log(0.3) + left, jnp.log(0.7) + right)


@pytest.fixture(scope="module")
def poor():
    """A fit of the banana with independent normals: suspect."""
    return posterior_of(affine_flow([1.0, 0.4], [1.5, 0.4]), banana)


def test_a_poor_fit_becomes_exact_draws(poor):
    assert poor.status != "ok"
    refined = poor.refine(jax.random.key(0), "auto", 8000, num_rounds=1)
    assert refined.warnings == (), refined.warnings
    assert refined.rhat < 1.01 and refined.method == "neutra"
    x = np.asarray(refined.draws["x"])
    assert x.shape == (8000, 2)
    sd = np.array([2.0, np.sqrt((4 * 1 * 4 + 2 * 16) / 64 + 0.09)])  # Var x0^2 = 4 m^2 s^2 + 2 s^4
    error = sd / np.sqrt(refined.ess)
    assert np.all(np.abs(x.mean(axis=0) - [1.0, 5 / 8]) < 4.5 * error)
    assert np.all(np.abs(x.mean(axis=0) - [1.0, 5 / 8]) < 0.1 * sd)
    np.testing.assert_allclose(x.std(axis=0), sd, rtol=0.12)
    assert "by neutra" in str(refined)


@pytest.mark.slow
def test_independent_proposals_from_a_poor_fit_stall_and_the_report_says_so(poor):
    refined = poor.refine(jax.random.key(0), "imh", 8000, num_rounds=1)
    assert "the chains disagree" in str(refined)


def test_independent_proposals_cross_between_modes_and_local_chains_do_not():
    wide = posterior_of(affine_flow([0.0], [1.5]), two_modes)
    refined = wide.refine(jax.random.key(1), "auto", 8000)
    assert refined.method == "imh" and refined.warnings == ()
    right = np.asarray(refined.draws["x"])[:, 0] > 0
    assert abs(right.mean() - 0.7) < 4.5 * np.sqrt(0.21 / refined.ess)
    assert refined.ess > 2000


@pytest.mark.slow
def test_a_chain_behind_a_one_to_one_map_stays_in_its_mode():
    far = lambda x: jnp.logaddexp(-8 * jnp.sum((x - 4.0) ** 2), -8 * jnp.sum((x + 4.0) ** 2))
    wide = posterior_of(affine_flow([0.0], [4.0]), far)
    refined = wide.refine(jax.random.key(2), "neutra", 2000, num_chains=6, num_rounds=2)
    assert refined.rhat > 1.1
    assert "the chains disagree" in str(refined)


@pytest.mark.slow
def test_through_the_exact_map_nuts_meets_a_standard_normal():
    loc, sd = np.array([3.0, -100.0]), np.array([1e-3, 50.0])
    normal = lambda x: -0.5 * jnp.sum(((x - loc) / sd) ** 2)
    exact = posterior_of(affine_flow(loc, sd), normal)
    refined = exact.refine(jax.random.key(3), "neutra", 4000)
    z = (np.asarray(refined.draws["x"]) - loc) / sd
    assert refined.warnings == () and refined.divergences == 0
    assert refined.ess > 2000
    assert np.all(np.abs(z.mean(axis=0)) < 4.5 / np.sqrt(refined.ess))
    np.testing.assert_allclose(z.std(axis=0), 1.0, rtol=0.06)


def test_the_rule_and_its_refusals(poor):
    mixture = vf.distributions.Mixture([affine_flow([m], [0.25]) for m in (-1.0, 1.0)])
    both = posterior_of(mixture, two_modes)
    with pytest.raises(ValueError, match="imh"):
        both.refine(jax.random.key(0), "neutra")
    with pytest.raises(ValueError, match="method"):
        poor.refine(jax.random.key(0), "nuts")
    with pytest.raises(ValueError, match="num_chains"):
        poor.refine(jax.random.key(0), num_chains=1)
    refined = both.refine(jax.random.key(4), num_samples=2000)  # no map: whole draws by weight
    right = np.asarray(refined.draws["x"])[:, 0] > 0
    assert abs(right.mean() - 0.7) < 4.5 * np.sqrt(0.21 / refined.ess)


@pytest.mark.slow
def test_a_funnel_is_straightened_by_maps_learned_from_the_draws():
    """x0 ~ N(0, 3^2), x1..x4 given x0 ~ N(0, e^x0): one round of chains does not get into the neck."""

    def funnel(x):
        return -(x[0] ** 2) / 18 - 0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) - 2 * x[0]

    poor = posterior_of(affine_flow(np.zeros(5), np.ones(5)), funnel)
    once = poor.refine(jax.random.key(0), "neutra", 4000, num_rounds=1)
    assert once.rounds == 1 and once.warnings
    refined = poor.refine(jax.random.key(0), "neutra", 4000)
    assert refined.rounds > 1 and refined.warnings == (), refined
    first = np.asarray(refined.draws["x"])[:, 0]
    assert abs(first.mean()) < 4.5 * 3 / np.sqrt(refined.ess)
    np.testing.assert_allclose(first.std(), 3.0, rtol=0.1)


@pytest.mark.slow
def test_chains_are_carried_on_until_their_draws_suffice():
    """Eight times as many as asked for, thinned; of a map there is no question with a mixture."""
    parts = [affine_flow([m], [0.2]) for m in (-1.3, 1.3)]
    both = posterior_of(vf.distributions.Mixture(parts), two_modes)
    short = both.refine(jax.random.key(5), num_samples=200, num_warmup=20, num_rounds=1)
    longer = both.refine(jax.random.key(5), num_samples=200, num_warmup=20)
    assert short.warnings and longer.rounds > 1 and longer.draws["x"].shape == (200, 1)
    assert longer.ess > 1.5 * short.ess


def test_divergent_transitions_are_told():
    noise = np.random.default_rng(0).normal(size=(4, 1000, 2))
    assert judged(noise, 40)[2] == ()
    assert "41 transitions diverged" in judged(noise, 41)[2][0]


def test_short_chains_are_not_judged():
    rhat, ess, warnings = judged(np.zeros((4, 3, 2)))
    assert np.isnan(rhat) and ess == 0.0 and "chains of 3 draws cannot be judged" in warnings[0]
