"""A stochastic flow inside vf.marginal: the density is unbiased in the sense each side needs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf

S = vf.flows.stochastic
LOC = jnp.array([0.5, -1.0])


@vf.program
def model():
    """x ~ N(loc, 1 + 0.25): the sum of two normals."""
    u = vf.sample("u", dist.Normal(LOC, 1.0).to_event(1))
    vf.sample("x", dist.Normal(u, 0.5).to_event(1))


def density(x):
    return jnp.exp(dist.Normal(LOC, np.sqrt(1.25)).to_event(1).log_prob(x))


def proposal(given):
    log_joint = lambda u: -0.5 * jnp.sum((u - LOC) ** 2) - 2.0 * jnp.sum((given["x"] - u) ** 2)
    blocks = [S.UnderdampedLangevin(num_steps=4, step_size=0.25)] * 3
    return S.Proposal(vf.flows.stochastic_flow(jax.random.key(0), 2, blocks), "u", log_joint)


class Careless(S.Proposal):
    """Forgets, in reverse, where the layers were moving to."""

    def log_prob(self, values):
        forgetful = S.Proposal(self.flow, self.site, lambda u: -0.5 * jnp.sum(u**2))
        return forgetful.log_prob(values)


def careless(given):
    right = proposal(given)
    return Careless(right.flow, right.site, right.log_density)


def mean(estimate, seed):
    n = 40_000
    values = np.asarray(
        jax.jit(jax.vmap(vf.expect(estimate)))(jax.random.split(jax.random.key(seed), n))
    )
    return values.mean(), values.std() / np.sqrt(n)


@pytest.mark.slow
def test_the_density_of_a_model_is_unbiased():
    x, p = jnp.array([1.0, 0.3]), vf.marginal(model, ("x",), vf.importance(3, proposal))
    value, error = mean(lambda: jnp.exp(p.log_prob({"x": x})), 1)
    assert abs(value - density(x)) < 4.5 * error
    assert error < 0.01 * density(x)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["proposal", "careless"])
def test_the_reciprocal_density_of_a_guide_is_unbiased(inner):
    """E over x of t(x) / q_hat is the integral of t, here one."""
    q = vf.marginal(
        model, ("x",), vf.importance(4, {"proposal": proposal, "careless": careless}[inner])
    )

    def ratio():
        values, log_q = q.simulate()
        return jnp.exp(dist.Normal(LOC, 0.7).to_event(1).log_prob(values["x"]) - log_q)

    value, error = mean(ratio, 2)
    if inner == "careless":
        assert abs(value - 1) > 6 * error
        return
    assert abs(value - 1) < 4.5 * error
    assert error < 0.02


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="stochastic flow"):
        S.Proposal(vf.flows.gaussian(jax.random.key(0), 2), "u", density)
    with pytest.raises(vf.ProgramError, match="'u'"):
        proposal({"x": LOC}).log_prob({"z": LOC})
