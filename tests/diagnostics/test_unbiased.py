"""The audit of unbiasedness: it passes what is right and catches a bias of one per cent."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf

PARAMS = {"t": jnp.array(0.7), "u": jnp.array([0.2, 0.4])}


def objective(p, strategy):
    a = vf.sample("a", dist.Bernoulli(probs=p["t"]), strategy)
    b = vf.sample("b", dist.Bernoulli(probs=p["u"][1]), strategy)
    return a + 2.0 * b * (a + 1) + p["u"][0] ** 2


def by(strategy):
    return vf.expect(lambda p: objective(p, strategy))


def test_an_unbiased_estimate_passes_and_the_power_is_stated(key):
    report = vf.check_unbiased(by(vf.measure_valued()), key, PARAMS, reference=by(vf.enum()))
    assert report.unbiased, report
    assert report.detectable <= 0.01
    assert abs(report.value_z) < 4.5
    assert jax.tree.structure(report.z) == jax.tree.structure(PARAMS)
    assert report.z["u"].shape == (2,)
    assert "unbiased" in str(report)


@pytest.mark.parametrize("bias", [1.01, 0.99])
def test_a_bias_of_one_per_cent_is_caught(key, bias):
    def twin(key, p):
        value = by(vf.measure_valued())(key, p)
        return bias * value + (1 - bias) * jax.lax.stop_gradient(value)

    report = vf.check_unbiased(twin, key, PARAMS, reference=by(vf.enum()), detectable=0.008)
    assert not report.unbiased
    assert "BIASED" in str(report)


def test_a_true_gradient_as_the_reference(key):
    truth = {"t": jnp.array(1.8), "u": jnp.array([0.4, 3.4])}
    report = vf.check_unbiased(by(vf.reinforce()), key, PARAMS, reference=truth, detectable=0.05)
    assert report.unbiased, report
    assert np.isnan(report.value_z)
    wrong = {"t": jnp.array(2.2), "u": jnp.array([0.4, 3.4])}
    report = vf.check_unbiased(by(vf.reinforce()), key, PARAMS, reference=wrong, detectable=0.05)
    assert not report.unbiased


def test_the_bound_on_draws_is_kept_and_the_power_told(key):
    report = vf.check_unbiased(by(vf.reinforce()), key, PARAMS, reference=by(vf.enum()), most=4096)
    assert report.num_draws == 4096
    assert report.detectable > 0.05


def test_references_that_do_not_fit(key):
    with pytest.raises(ValueError, match="structure"):
        vf.check_unbiased(by(vf.enum()), key, PARAMS, reference={"t": jnp.array(1.0)})

    def broken(key, p):
        return p["t"] * jnp.nan

    with pytest.raises(ValueError, match="not finite"):
        vf.check_unbiased(broken, key, PARAMS, reference=by(vf.enum()))
