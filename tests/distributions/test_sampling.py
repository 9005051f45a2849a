"""Batches of draws: keys, counts, conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.flows.registry import perturb
from vflow.bijections import Affine, Elementwise
from vflow.distributions import Flow, Normal


def _flow():
    return Flow(Normal(2), Affine(jnp.ones(2), 2.0))


def _conditional():
    layer = Elementwise(jax.random.key(0), 2, hidden=(3,), condition_dim=3)
    return perturb(Flow(Normal(2), layer), jax.random.key(1))


def test_draws_are_those_of_split_keys():
    x, log_q = vf.sample_and_log_prob(jax.random.key(3), _flow(), np.int64(4))
    assert x.shape == (4, 2)
    assert log_q.shape == (4,)
    again = [_flow().sample_and_log_prob(k) for k in jax.random.split(jax.random.key(3), 4)]
    np.testing.assert_allclose(x, [a for a, _ in again], rtol=1e-12)
    np.testing.assert_allclose(log_q, [b for _, b in again], rtol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (5,), (10,), (3, 7), (16,)], ids=str)
def test_normal_draws_are_those_of_jax(shape):
    """Whatever number is drawn for the compiler's sake."""
    key = jax.random.key(4)
    x, _ = vf.distributions.Normal(shape).sample_and_log_prob(key)
    np.testing.assert_array_equal(x, jax.random.normal(key, shape))


def test_legacy_keys_draw_the_same():
    new = vf.sample_and_log_prob(jax.random.key(3), _flow(), 4)
    old = vf.sample_and_log_prob(jax.random.PRNGKey(3), _flow(), 4)
    np.testing.assert_array_equal(new[0], old[0])


def test_one_condition_or_one_per_draw():
    flow, key = _conditional(), jax.random.key(0)
    conditions = jnp.array([[0.0, 1.0, -1.0], [2.0, 0.5, 0.0]])
    each, log_q = vf.sample_and_log_prob(key, flow, 2, condition=conditions)
    for i in range(2):
        same, log_q_same = vf.sample_and_log_prob(key, flow, 2, condition=conditions[i])
        np.testing.assert_allclose(each[i], same[i], rtol=1e-12)
        np.testing.assert_allclose(log_q[i], log_q_same[i], rtol=1e-12)


def test_the_target_reaches_families_that_ask_for_it():
    class Annealed:
        def sample_and_log_prob(self, key, condition, *, log_density):
            return jnp.zeros(2), log_density(jnp.ones(2))

    target = lambda x: 3.0 * jnp.sum(x)
    _, log_q = vf.sample_and_log_prob(jax.random.key(0), Annealed(), 3, log_density=target)
    np.testing.assert_allclose(log_q, [6.0, 6.0, 6.0])
    vf.sample_and_log_prob(jax.random.key(0), _flow(), 3, log_density=target)


@pytest.mark.parametrize("n", [0, -1])
def test_counts_below_one_are_refused(n):
    with pytest.raises(ValueError, match="n must be a positive integer"):
        vf.sample_and_log_prob(jax.random.key(0), _flow(), n)


@pytest.mark.parametrize("n", [True, 2.5])
def test_counts_that_are_no_integers_are_refused(n):
    with pytest.raises(TypeError):
        vf.sample_and_log_prob(jax.random.key(0), _flow(), n)


@pytest.mark.parametrize(
    ("flow", "condition", "match"),
    [
        (_flow, jnp.zeros(3), "unconditional"),
        (_conditional, None, "condition is missing"),
        (_conditional, jnp.zeros(2), "neither"),
        (_conditional, jnp.zeros((3, 3)), "neither"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(flow, condition, match):
    with pytest.raises(ValueError, match=match):
        vf.sample_and_log_prob(jax.random.key(0), flow(), 2, condition=condition)


def test_batches_of_keys_are_refused():
    with pytest.raises(TypeError, match="key"):
        vf.sample_and_log_prob(jax.random.split(jax.random.key(0)), _flow(), 2)


def test_things_that_are_no_distribution_are_refused():
    with pytest.raises(TypeError, match="flow must be a distribution"):
        vf.sample_and_log_prob(jax.random.key(0), "flow", 2)
