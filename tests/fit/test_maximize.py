"""vf.maximize against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import vflow as vf


def cross_entropy(params):
    x = vf.sample("x", dist.Normal(params["loc"], jnp.exp(params["log_scale"])))
    q = dist.Normal(params["loc"], jnp.exp(params["log_scale"])).log_prob(x)
    return dist.Normal(2.0, 0.5).log_prob(x) - q


PARAMS = {"loc": jnp.zeros, "log_scale": jnp.zeros}


def params():
    return {name: make(()) for name, make in PARAMS.items()}


def test_it_finds_the_maximum_and_evaluates_it_afresh():
    estimate = vf.expect(cross_entropy, num_samples=64)
    result = vf.maximize(jax.random.key(0), estimate, params(), num_steps=1000)
    assert abs(float(result.params["loc"]) - 2.0) < 0.05
    assert abs(float(result.params["log_scale"]) - np.log(0.5)) < 0.05
    assert abs(result.value.value) < 4.5 * result.value.standard_error + 5e-3  # -KL = 0
    assert result.value.standard_error < 0.01
    assert result.history.shape == (1000,)
    assert result.value.value != result.history[-1]


def test_the_history_is_the_objective_at_every_step():
    estimate = vf.expect(cross_entropy, num_samples=4)
    result = vf.maximize(
        jax.random.key(1), estimate, params(), num_steps=3, optimizer=optax.sgd(0.0)
    )
    train_key, _ = jax.random.split(jax.random.key(1))
    by_hand = [estimate(jax.random.fold_in(train_key, i), params()) for i in range(3)]
    np.testing.assert_allclose(result.history, by_hand, rtol=1e-12)
    np.testing.assert_array_equal(result.params["loc"], 0.0)


def test_frozen_leaves_stay():
    flow = vf.distributions.Flow(
        vf.distributions.Normal(1),
        vf.bijections.Chain(
            [
                vf.bijections.Freeze(vf.bijections.Affine(jnp.full(1, 3.0))),
                vf.bijections.Affine(jnp.zeros(1)),
            ]
        ),
    )
    target = vf.Target(lambda x: -0.5 * jnp.sum((x - 5.0) ** 2), dim=1)
    estimate = vf.expect(lambda q: vf.objectives.elbo()(q, target), num_samples=16)
    result = vf.maximize(jax.random.key(2), estimate, flow, num_steps=800)
    draws, _ = vf.sample_and_log_prob(jax.random.key(3), result.params, 2000)
    assert abs(float(draws.mean()) - 5.0) < 0.3
    frozen = result.params.bijection.layers[0].bijection.loc
    np.testing.assert_array_equal(frozen, 3.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": 2.5}, TypeError, "num_steps"),
        ({"optimizer": 1e-3}, TypeError, "optimizer"),
        ({"estimate": 3}, TypeError, "estimate"),
        ({"params": {"n": jnp.arange(2)}}, ValueError, "trainable"),
        ({"key": 0}, TypeError, "key"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {
        "key": jax.random.key(0),
        "estimate": vf.expect(cross_entropy),
        "params": params(),
        "num_steps": 1,
    } | change
    with pytest.raises(error, match=match):
        vf.maximize(**arguments)
