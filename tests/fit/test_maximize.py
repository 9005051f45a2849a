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


def amortised(params, rows):
    """Sum of the ELBOs of z ~ N(0, 1), x | z ~ N(z, 1) for some of the rows, as for all of them."""
    x = rows["x"]
    guide = dist.Normal(params["slope"] * x, jnp.exp(params["log_scale"]))
    z = vf.sample("z", guide)
    terms = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    return len(ROWS) / len(x) * (terms - guide.log_prob(z)).sum()


ROWS = np.random.default_rng(0).normal(size=40) * 1.4


def test_minibatches_give_the_objective_of_all_data_on_average():
    at = {"slope": jnp.array(0.2), "log_scale": jnp.array(-0.5)}
    mean, variance = 0.2 * ROWS, np.exp(-1.0)
    squares = mean**2 + (ROWS - mean) ** 2 + 2 * variance
    full = (-np.log(2 * np.pi) - 0.5 * squares + 0.5 * np.log(2 * np.pi * np.e * variance)).sum()
    run = {"num_steps": 4000, "optimizer": optax.sgd(0.0), "data": {"x": jnp.asarray(ROWS)}}
    result = vf.maximize(jax.random.key(1), vf.expect(amortised), at, batch=4, **run)
    error = result.history.std() / 4000**0.5
    assert error < 0.01 * abs(full)
    assert abs(result.history.mean() - full) < 4.5 * error
    # Without the factor n / batch it would be a tenth of that.
    assert abs(result.value.value - full) < 4.5 * result.value.standard_error < 0.2 * abs(full)


def test_training_on_minibatches_finds_the_optimum_of_all_data():
    start = {"slope": jnp.array(0.0), "log_scale": jnp.array(0.0)}
    data = {"x": ROWS}  # NumPy will do
    estimate = vf.expect(amortised, num_samples=4)
    result = vf.maximize(jax.random.key(2), estimate, start, 1000, data=data, batch=8)
    assert abs(result.params["slope"] - 0.5) < 0.05  # E[z | x] = x / 2, whichever the row
    assert abs(result.params["log_scale"] + 0.5 * np.log(2.0)) < 0.03
    log_z = dist.Normal(0.0, 2.0**0.5).log_prob(ROWS).sum()
    assert abs(result.value.value - log_z) < 4.5 * result.value.standard_error


def test_rows_of_one_minibatch_belong_together_and_differ():
    seen = []

    def estimate(key, params, rows):
        jax.debug.callback(lambda *x: seen.append(x), *rows)
        return -(params**2)

    data = (np.arange(6), np.arange(6.0)[:, None] * np.ones((6, 2)))
    vf.maximize(jax.random.key(3), estimate, jnp.ones(()), 5, data=data, batch=3)
    jax.effects_barrier()
    assert len(seen) >= 5
    for a, b in seen:
        assert b.shape == (3, 2) and len(set(a.tolist())) == 3
        np.testing.assert_array_equal(a, b[:, 0])


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
        ({"batch": 3}, ValueError, "data="),
        ({"data": jnp.zeros(3), "batch": 4}, ValueError, "batch=4.*3 rows"),
        ({"data": jnp.zeros(3), "batch": 0}, ValueError, "batch"),
        ({"data": jnp.zeros(3), "batch": 1.5}, TypeError, "batch"),
        ({"data": {"x": jnp.zeros(3), "y": jnp.zeros(4)}, "batch": 2}, ValueError, "leading axis"),
        ({"data": jnp.zeros(()), "batch": 1}, ValueError, "leading axis"),
        ({"data": jnp.zeros((0, 2)), "batch": 1}, ValueError, "at least one"),
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
