"""A mixture that covers a target: it finds what a fit from one place misses, and says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

import vflow as vf
from tests.programs.test_marginal import cone
from vflow.fit._cover import find_cover
from vflow.fit._draws import Drawer
from vflow.fit._verdict import judge

LOG_Z = -5.3232  # of the cone, by quadrature in tests/programs


def ring(x):
    """Mass 1 around the circle of radius 2, sixty times as long as wide."""
    radius = np.sqrt((x**2).sum(axis=1))
    with np.errstate(divide="ignore"):
        along = -np.log(2 * np.pi * radius)
    return along - 0.5 * ((radius - 2.0) / 0.04) ** 2 - np.log(0.04 * np.sqrt(2 * np.pi))


def test_a_thin_ring_is_covered_from_one_arc():
    arc = np.array([2.0, 0.0]), np.diag([0.05, 0.3])
    cover = find_cover(ring, [arc], np.random.default_rng(1))
    assert cover.trusted and cover.evidence.standard_error < 0.03
    assert abs(cover.evidence.value) < 4.5 * cover.evidence.standard_error
    assert cover.outside(*arc) > 0.7
    loc, tril = cover.moments()
    np.testing.assert_allclose(loc, 0.0, atol=0.1)
    np.testing.assert_allclose(tril @ tril.T, 2.0 * np.eye(2), atol=0.15)
    points = cover.resample(np.random.default_rng(0), 1000)
    assert np.abs(np.sqrt((points**2).sum(axis=1)) - 2.0).max() < 0.3
    quadrants = np.unique(np.sign(points), axis=0, return_counts=True)[1]
    assert len(quadrants) == 4 and quadrants.min() > 180


def test_a_badly_scaled_gaussian_needs_two_rounds():
    scales = np.array([1e-6, 1.0, 1e5])
    calls = []

    def log_prob(x):
        calls.append(len(x))
        return norm(scale=scales).logpdf(x).sum(axis=1)

    part = np.zeros(3), np.diag(scales)
    cover = find_cover(log_prob, [part], np.random.default_rng(0))
    assert len(calls) == 3  # and the draws that count
    assert cover.trusted and abs(cover.evidence.value) < 4.5 * cover.evidence.standard_error
    assert cover.outside(*part) < 0.01


def test_what_cannot_be_covered_is_not_trusted():
    part = np.zeros(2), np.eye(2)
    nothing = find_cover(lambda x: np.full(len(x), np.nan), [part], np.random.default_rng(0))
    assert nothing is None
    flat = find_cover(lambda x: np.zeros(len(x)), [part], np.random.default_rng(0))
    assert flat is None or not flat.trusted


def two_modes(x):
    """Seven tenths of the mass here, three tenths there."""
    here = jnp.log(0.7) - 0.5 * jnp.sum((x - 6.0) ** 2)
    there = jnp.log(0.3) - 0.5 * jnp.sum((x + 6.0) ** 2)
    return jnp.logaddexp(here, there) - jnp.log(2 * jnp.pi)


def test_a_fit_that_sits_on_one_of_two_modes_is_not_ok():
    target = vf.Target(two_modes, dim=2)
    flow = vf.flows.gaussian(jax.random.key(0), 2)
    posterior = vf.fit(jax.random.key(0), target, flow=flow, num_steps=100, progress=False)
    _, log_w = Drawer(target, "float64").weighted(posterior.flow, jax.random.key(1), 4096)
    assert judge(log_w).status == "ok"  # the weights alone see nothing
    assert posterior.status == "suspect"
    assert "misses about 30%" in posterior.reasons[0]
    assert abs(logsumexp(log_w) - np.log(4096 * 0.7)) < 0.05


def test_the_witness_objects_only_where_it_is_sure():
    log_w = 0.3 * np.random.default_rng(0).standard_normal(4096)
    alone = judge(log_w)
    missed = alone.log_evidence.value + 0.25
    assert judge(log_w, vf.Estimate(missed, 0.02)).status == "suspect"
    for cover in (
        vf.Estimate(missed, 0.07),
        vf.Estimate(alone.log_evidence.value + 0.09, 1e-4),
        vf.Estimate(missed, np.nan),
        vf.Estimate(alone.log_evidence.value - 5.0, 0.01),
    ):
        heard = judge(log_w, cover)
        assert heard.status == "ok" and heard.reasons == ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_default_call_finds_the_ring_of_the_cone(seed):
    with jax.enable_x64(False):
        posterior = vf.fit(jax.random.key(seed), vf.from_numpyro(cone), progress=False)
    assert posterior.status == "ok", posterior.reasons
    assert LOG_Z - 0.06 < posterior.elbo.value < LOG_Z + 0.02
    assert abs(posterior.log_evidence.value - LOG_Z) < 0.02
