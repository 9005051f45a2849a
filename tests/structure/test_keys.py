"""No key is used twice: not by constructors, not by draws, not inside objectives."""

import jax
import numpyro.distributions as dist
import pytest

import vflow as vf


def test_the_check_is_at_work(no_key_reuse, key):
    jax.random.normal(key)
    with pytest.raises(jax.errors.KeyReuseError):
        jax.random.normal(key)


def test_flows_and_objectives_use_each_key_once(no_key_reuse, key):
    for_flow, for_draws, for_objective = jax.random.split(key, 3)
    flow = vf.flows.coupling(for_flow, 2, num_layers=2, hidden=(4,))
    vf.sample_and_log_prob(for_draws, flow, 3)

    def objective(q):
        x, log_q = q.simulate()
        noise = vf.sample("noise", dist.Normal(0.0, 1.0))
        return -(x**2).sum() - log_q + noise

    vf.expect(objective, num_samples=2)(for_objective, flow)
