"""The evidence lower bound against its closed form, and what it accepts."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf
from vflow._core import combine, partition
from vflow.bijections import Affine
from vflow.distributions import Flow, Normal

LOC, SCALE = np.array([0.5, -1.0]), np.array([0.7, 1.5])
P_LOC, P_SCALE, LOG_Z = np.array([0.0, 1.0]), np.array([1.0, 2.0]), 1.25
OBJECTIVES = {"elbo": vf.objectives.elbo()}


def _q():
    return Flow(Normal(2), Affine(jnp.asarray(LOC), jnp.asarray(SCALE)))


def _log_p(x):
    z = (x - P_LOC) / P_SCALE
    return LOG_Z - 0.5 * jnp.sum(z**2) - np.sum(np.log(P_SCALE)) - np.log(2 * np.pi)


def _closed_form(loc, log_scale):
    """log Z minus the Kullback-Leibler divergence of two Gaussians."""
    scale = jnp.exp(log_scale)
    ratio = (scale**2 + (loc - P_LOC) ** 2) / P_SCALE**2
    return LOG_Z - jnp.sum(jnp.log(P_SCALE / scale) + 0.5 * ratio - 0.5)


def test_every_exported_objective_is_tested():
    here = pathlib.Path(__file__).parent
    paths = [*here.glob("*.py"), here.parent / "stochastic" / "test_objectives.py"]
    tests = "".join(path.read_text() for path in paths)
    assert [name for name in vf.objectives.__all__ if f".{name}" not in tests] == []


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_value_and_gradient(name, gradient):
    trained, static = partition(_q())
    estimate = vf.expect(lambda t: OBJECTIVES[name](combine(t, static), _log_p), gradient=gradient)
    keys = jax.random.split(jax.random.key(0), 20_000)
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(estimate, argnums=1), (0, None)))(
        keys, trained
    )
    truth, slopes = jax.value_and_grad(_closed_form, (0, 1))(LOC, np.log(SCALE))
    draws = np.concatenate(
        [values[:, None], grads.bijection.loc, grads.bijection.log_scale], axis=1
    )
    truth = np.concatenate([truth[None], *slopes])
    error = draws.std(0) / np.sqrt(len(draws))
    assert (error < 0.05 * np.abs(truth).max()).all()
    assert (np.abs(draws.mean(0) - truth) < 4.5 * error).all()


def test_the_bound_is_tight_at_the_target():
    q = Flow(Normal(2), Affine(jnp.asarray(P_LOC), jnp.asarray(P_SCALE)))
    estimate = vf.expect(lambda q: vf.objectives.elbo()(q, _log_p), num_samples=5)
    np.testing.assert_allclose(estimate(jax.random.key(0), q), LOG_Z, rtol=1e-12)


class _Recorder:
    def simulate(self, *, gradient, log_density):
        return jnp.ones(2), log_density(jnp.zeros(2))


def test_the_target_is_handed_to_the_family():
    """As a Target, an object with log_prob, or a plain function."""

    class Scored:
        log_prob = staticmethod(_log_p)

    expected = _log_p(jnp.ones(2)) - _log_p(jnp.zeros(2))
    for p in (_log_p, Scored(), vf.Target(_log_p, 2)):
        value = vf.objectives.elbo()(_Recorder(), p)
        np.testing.assert_allclose(value, expected)


def test_things_that_are_no_target_are_refused():
    with pytest.raises(TypeError, match="log_prob"):
        vf.objectives.elbo()(_Recorder(), 3.0)


def test_programs_meet_families_over_the_same_sites():
    def over_sites(loc):
        return vf.program(lambda: vf.sample("x", dist.Normal(loc, 1.0)))

    q, p = over_sites(0.5), over_sites(0.0)
    estimate = vf.expect(lambda: vf.objectives.elbo()(q, p), num_samples=4000)
    assert abs(estimate(jax.random.key(0)) + 0.5**2 / 2) < 4.5 * 0.5 / np.sqrt(4000)
    with pytest.raises(vf.ProgramError, match=r"vf\.target"):
        vf.objectives.elbo()(_Recorder(), p)
