"""Programs of flips with every draw forced: gradients are sums over cells, without noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf

MEASURE, ENUM = vf.measure_valued(), vf.enum()
SCORE = [vf.reinforce(), vf.reinforce(baseline=0.7)]


class BernoulliProbs(dist.BernoulliProbs):
    """A flip whose noise is given: 1[u < p]."""

    def __init__(self, probs, u):
        super().__init__(probs)
        self.u = u

    def sample(self, key, sample_shape=()):
        return jnp.where(self.u < self.probs, 1, 0)


def over_cells(objective, params, cuts, num_flips):
    """Value and gradient, summed over the cells of the unit cube between all cuts."""
    edges = np.concatenate([[0.0], np.sort(cuts), [1.0]])
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    cells = list(itertools.product(range(len(widths)), repeat=num_flips))
    noise = jnp.array([[middles[i] for i in cell] for cell in cells])
    weight = jnp.array([np.prod([widths[i] for i in cell]) for cell in cells])
    estimate = vf.expect(objective)
    run = jax.jit(
        jax.vmap(jax.value_and_grad(estimate, argnums=1), in_axes=(None, None, 0)),
    )
    values, grads = run(jax.random.key(0), params, noise)
    return (weight * values).sum(), jax.tree.map(lambda g: jnp.tensordot(weight, g, 1), grads)


def close(found, value, gradient):
    np.testing.assert_allclose(found[0], value, rtol=1e-10)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-10)


@pytest.mark.parametrize("strategy", [ENUM, MEASURE, *SCORE], ids=repr)
def test_one_flip(strategy):
    def objective(t, u):
        return (1 - vf.sample("b", BernoulliProbs(t, u[0]), strategy)) * (-t / 2)

    close(over_cells(objective, 0.7, [0.7], 1), -0.105, 0.2)


@pytest.mark.parametrize("second", [ENUM, MEASURE, *SCORE], ids=repr)
@pytest.mark.parametrize("first", [ENUM, MEASURE, *SCORE], ids=repr)
def test_two_flips(first, second):
    def objective(t, u):
        a = vf.sample("a", BernoulliProbs(t, u[0]), first)
        b = vf.sample("b", BernoulliProbs(jnp.where(a == 1, t, t / 2), u[1]), second)
        return a + 2.0 * b * jnp.where(a == 1, 1, 2)

    close(over_cells(objective, 0.7, [0.35, 0.7], 2), 2.1, 3.0)


@pytest.mark.parametrize("strategy", [MEASURE, *SCORE], ids=repr)
def test_markov_flips(strategy):
    def objective(t, u):
        def step(b, u):
            probs = jnp.where(b == 1, t, t / 2)
            b = vf.sample("b", BernoulliProbs(probs, u), strategy)
            vf.cost(1.0 * b)
            return b, None

        vf.scan(step, 1, u)

    close(over_cells(objective, 0.7, [0.35, 0.7], 3), 1.85325, 3.4175)


@pytest.mark.parametrize("strategy", [MEASURE, vf.reinforce()], ids=repr)
def test_scan_inside_vmap(strategy):
    def objective(t, u):
        def lane(u):
            def step(count, u):
                return count + vf.sample("b", BernoulliProbs(t, u), strategy), None

            return vf.scan(step, 0, u)[0] ** 2

        return 1.0 * vf.vmap(lane, 2, u.reshape(2, 2)).sum()

    close(over_cells(objective, 0.6, [0.6], 4), 3.84, 8.8)


@pytest.mark.parametrize("strategy", [MEASURE, vf.reinforce()], ids=repr)
def test_vector_of_flips(strategy):
    def objective(p, u):
        return 1.0 * vf.sample("b", BernoulliProbs(p, u), strategy).sum() ** 2

    p = jnp.array([0.2, 0.5, 0.7])
    value = p.sum() + p.sum() ** 2 - (p**2).sum()
    close(over_cells(objective, p, [0.2, 0.5, 0.7], 3), value, [3.4, 2.8, 2.4])


@pytest.mark.parametrize("control", [None, "vimco"])
@pytest.mark.parametrize("strategy", [MEASURE, vf.reinforce()], ids=repr)
def test_discrete_importance_weighted_bound(strategy, control):
    def exact(q):
        total = 0.0
        for bits in itertools.product((0, 1), repeat=3):
            prob = [q if b else 1 - q for b in bits]
            log_w = jnp.stack(
                [jnp.log((0.1 if b else 0.3) / p) for b, p in zip(bits, prob, strict=True)]
            )
            total = total + jnp.prod(jnp.stack(prob)) * (jax.nn.logsumexp(log_w) - jnp.log(3))
        return total

    def objective(q, u):
        def log_weight(u):
            z = vf.sample("z", BernoulliProbs(q, u), strategy)
            return jnp.where(z == 1, jnp.log(0.1 / q), jnp.log(0.3 / (1 - q)))

        return jax.nn.logsumexp(vf.vmap(log_weight, 3, u, control=control)) - jnp.log(3)

    truth, slope = jax.value_and_grad(exact)(0.6)
    assert abs(truth + 1.01474) < 1e-5
    assert abs(slope + 0.67327) < 1e-5
    close(over_cells(objective, 0.6, [0.6], 3), truth, slope)


def test_baselines_that_need_other_samples():
    """With the same draw in both samples leave-one-out removes the score term altogether."""

    def objective(t, u):
        a = vf.sample("a", BernoulliProbs(t, u), vf.reinforce(baseline="loo"))
        b = vf.sample("b", dist.Bernoulli(probs=jnp.where(a == 1, t, t / 2)), ENUM)
        return a + 2.0 * b * jnp.where(a == 1, 1, 2)

    estimate = vf.expect(objective, num_samples=2)
    run = jax.jit(jax.value_and_grad(estimate, argnums=1))
    value, slope = run(jax.random.key(0), 0.7, 0.5)
    # a = 1 in both: value 1 + 2 t; slope: 2 + score (1/t) * (F - mean of the others) = 2
    np.testing.assert_allclose(value, 2.4, rtol=1e-10)
    np.testing.assert_allclose(slope, 2.0, rtol=1e-10)


@pytest.mark.parametrize("strategy", [ENUM, MEASURE, vf.reinforce()], ids=repr)
def test_single_precision(strategy):
    with jax.enable_x64(False):

        def objective(t, u):
            a = vf.sample("a", BernoulliProbs(t, u[0]), strategy)
            b = vf.sample("b", BernoulliProbs(jnp.where(a == 1, t, t / 2), u[1]), strategy)
            return a + 2.0 * b * jnp.where(a == 1, 1, 2)

        value, slope = over_cells(objective, jnp.float32(0.7), [0.35, 0.7], 2)
        assert value.dtype == slope.dtype == jnp.float32
        np.testing.assert_allclose((value, slope), (2.1, 3.0), rtol=1e-5)
