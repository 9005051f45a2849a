"""The training loop: against a loop by hand, resumed, interrupted, broken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vflow as vf
from vflow.fit._loop import Ascent

CENTRE = np.array([1.0, -2.0])


def noisy(key, params):
    def objective(params):
        noise = 0.1 * jax.random.normal(key, (2,))
        return -jnp.sum((params["x"] - CENTRE + noise) ** 2)

    return jax.value_and_grad(objective)(params)


@pytest.fixture(scope="module")
def ascent():
    return Ascent(noisy, optax.adam(0.05))


def start():
    return {"x": jnp.zeros(2)}


def test_it_is_the_loop_one_would_write_by_hand(ascent):
    outcome = ascent.run(jax.random.key(0), start(), 130)
    optimizer = optax.adam(0.05)
    params, values = start(), []
    state = optimizer.init(params)
    step = jax.jit(noisy)
    for i in range(130):
        value, grad = step(jax.random.fold_in(jax.random.key(0), i), params)
        updates, state = optimizer.update(jax.tree.map(jnp.negative, grad), state, params)
        params = optax.apply_updates(params, updates)
        values.append(value)
    np.testing.assert_allclose(outcome.params["x"], params["x"], rtol=1e-12)
    np.testing.assert_allclose(outcome.values, np.array(values), rtol=1e-9)
    assert outcome.stopped is None and outcome.values.shape == (130,)


def test_the_objective_is_traced_once_whatever_the_number_of_runs():
    """Tracing a step is a tenth of a small fit; a change of programs for long runs costs another one."""
    traces = []

    def counted(key, params):
        traces.append(key)
        return noisy(key, params)

    ascent = Ascent(counted, optax.adam(0.05))
    for num_steps in (3, 120):
        ascent.run(jax.random.key(0), start(), num_steps)
    assert len(traces) == 1
    ascent.run(jax.random.key(0), start(), 5001, callback=lambda progress: True)
    assert len(traces) <= 2


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(ascent):
    states = []
    whole = ascent.run(jax.random.key(1), start(), 250, save=states.append)
    rest = ascent.run(jax.random.key(1), start(), 250, resume=states[0])
    assert [s.step for s in states] == [100, 200, 250]
    np.testing.assert_array_equal(whole.params["x"], rest.params["x"])
    np.testing.assert_array_equal(whole.values, rest.values)


def test_ctrl_c_keeps_what_there_is(ascent):
    def press(progress):
        assert progress.num_steps == 300 and np.isfinite(progress.value)
        if progress.step == 200:
            raise KeyboardInterrupt

    outcome = ascent.run(jax.random.key(2), start(), 300, callback=press)
    assert outcome.stopped == "interrupted" and len(outcome.values) == 200
    assert np.abs(outcome.params["x"] - CENTRE).max() < 0.5


def test_a_callback_and_a_rule_can_stop(ascent):
    outcome = ascent.run(jax.random.key(3), start(), 300, callback=lambda p: p.step == 100)
    assert outcome.stopped == "callback" and len(outcome.values) == 100
    outcome = ascent.run(jax.random.key(3), start(), 300, converged=lambda v: len(v) >= 200)
    assert outcome.stopped == "converged" and len(outcome.values) == 200


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where):
    def sometimes(key, params):
        value, grad = noisy(key, params)
        bad = jax.random.uniform(key) < 0.1
        if where == "value":
            return jnp.where(bad, jnp.nan, value), grad
        return value, {"x": jnp.where(bad, jnp.inf, grad["x"])}

    outcome = Ascent(sometimes, optax.adam(0.05)).run(jax.random.key(4), start(), 200)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(200))
    bad = np.asarray(jax.vmap(jax.random.uniform)(keys) < 0.1)
    assert 5 < bad.sum() < 50
    np.testing.assert_array_equal(np.isnan(outcome.values), bad)
    assert np.abs(outcome.params["x"] - CENTRE).max() < 0.3


def test_what_stays_broken_raises_with_step_and_last_good_parameters():
    def breaks(key, params):
        value, grad = noisy(key, params)
        return jnp.where(params["x"][0] > 0.5, jnp.nan, value), grad

    with pytest.raises(vf.FitError, match="not finite.*first at step") as caught:
        Ascent(breaks, optax.adam(0.05)).run(
            jax.random.key(5), start(), 500, explain=lambda params: f"at {params['x'][0]:.0f}"
        )
    assert 0 < caught.value.step < 200
    # the chunk before the break: its parameters are finite
    assert np.isfinite(caught.value.last_good["x"]).all()
