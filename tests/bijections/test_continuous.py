"""Continuous flows: closed forms for linear fields, autodiff for others, at the tolerance."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import vflow as vf

TOLERANCE = 1e-9
A = np.array([[0.3, 0.9], [-0.7, -0.5]])
C = jnp.array([0.4])
X, SCORE = jnp.array([0.7, -1.2]), jnp.array([0.3, 0.8])


def _layer(**options):
    return vf.bijections.Continuous(jax.random.key(0), 2, tolerance=TOLERANCE, **options)


@pytest.fixture(scope="module")
def layer():
    layer = _layer(hidden=(5,), condition_dim=1)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(0.7 * rng.normal(size=a.shape)), layer)


@pytest.fixture(scope="module")
def results(layer):
    """All quantities at one point, in one compilation."""

    def run(layer, x, score):
        y, log_det = layer.forward_and_log_det(x, C)
        back, inverse_log_det = layer.inverse_and_log_det(y, C)
        return {
            "y": y,
            "log_det": log_det,
            "back": back,
            "inverse_log_det": inverse_log_det,
            "jacobian": jax.jacrev(lambda x: layer.forward_and_log_det(x, C)[0])(x),
            "slope": jax.grad(lambda x: layer.forward_and_log_det(x, C)[1])(x),
            "push": layer.push_score(x, score, C),
            "path": layer.forward_with_score(x, score, C),
        }

    return eqx.filter_jit(run)(layer, X, SCORE)


def test_linear_field_has_the_matrix_exponential():
    """v = A x: x(1) = expm(A) x(0), log-det = tr A, score = expm(-A') s."""
    layer = _layer(hidden=())
    weight = jnp.concatenate([jnp.asarray(A.T), jnp.zeros((1, 2))])
    layer = eqx.tree_at(lambda layer: layer.velocity.weights, layer, (weight,))
    y, log_det, score = eqx.filter_jit(layer.push_score)(X, SCORE)
    np.testing.assert_allclose(y, scipy.linalg.expm(A) @ X, rtol=1e-8)
    np.testing.assert_allclose(log_det, np.trace(A), rtol=1e-12)
    np.testing.assert_allclose(score, scipy.linalg.expm(-A.T) @ SCORE, rtol=1e-8)


def test_log_det_is_that_of_the_jacobian(results):
    truth = np.linalg.slogdet(results["jacobian"])[1]
    assert abs(truth) > 0.05
    np.testing.assert_allclose(results["log_det"], truth, atol=1e-7)


def test_one_probe_estimates_the_trace_without_bias(layer):
    """The mean over all probes, two up to sign, is the exact log-det; so is that of the gradients."""
    layer = jax.tree.unflatten(
        jax.tree.structure(_layer(hidden=(5,), condition_dim=1, trace="hutchinson")),
        jax.tree.leaves(layer),
    )
    keys = jax.random.split(jax.random.key(3), 8)
    signs = jnp.prod(jax.vmap(lambda key: jax.random.rademacher(key, (2,)))(keys), axis=1)
    keys = keys[jnp.array([jnp.argmax(signs), jnp.argmin(signs)])]

    @eqx.filter_jit
    def run(layer, keys):
        value_and_slope = eqx.filter_value_and_grad(
            lambda layer, key: layer.forward_and_estimate(key, X, C)[1]
        )
        exact = eqx.filter_value_and_grad(lambda layer: layer.forward_and_log_det(X, C)[1])
        return jax.vmap(value_and_slope, (None, 0))(layer, keys), exact(layer)

    estimates, exact = run(layer, keys)
    assert abs(jnp.diff(estimates[0])[0]) > 0.1
    for draws, truth in zip(jax.tree.leaves(estimates), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(jnp.mean(draws, axis=0), truth, atol=1e-6)
    flow = vf.distributions.Flow(vf.distributions.Normal(2), vf.bijections.Chain([layer]))
    assert "hutchinson" in flow.path_refusal()


def test_round_trip(results):
    np.testing.assert_allclose(results["back"], X, atol=1e-7)
    np.testing.assert_allclose(results["inverse_log_det"], -results["log_det"], atol=1e-7)


def test_score_solves_the_dense_system(results):
    truth = np.linalg.solve(results["jacobian"].T, SCORE - results["slope"])
    for y, log_det, score in (results["push"], results["path"]):
        np.testing.assert_allclose(y, results["y"], atol=1e-7)
        np.testing.assert_allclose(log_det, results["log_det"], atol=1e-7)
        np.testing.assert_allclose(score, truth, atol=1e-6)


def test_gradients_reach_the_network(layer):
    """Backwards through the solver, against a central difference along one direction."""

    def loss(layer):
        y, log_det = layer.forward_and_log_det(X, C)
        return jnp.sum(y**2) + log_det

    value_and_slope = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    _, slope = value_and_slope(layer)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), layer)
    step = 1e-4
    ends = [
        value_and_slope(jax.tree.map(lambda a, b, h=h: a + h * b, layer, direction))[0]
        for h in (step, -step)
    ]
    pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True)
    along = sum(jnp.vdot(a, b) for a, b in pairs)
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), along, rtol=1e-5)


def test_direct_adjoint_allows_forward_mode(results, layer):
    direct = _layer(hidden=(5,), condition_dim=1, adjoint="direct")
    direct = jax.tree.unflatten(jax.tree.structure(direct), jax.tree.leaves(layer))
    jacobian = eqx.filter_jit(jax.jacfwd(lambda x: direct.forward_and_log_det(x, C)[0]))(X)
    np.testing.assert_allclose(jacobian, results["jacobian"], atol=1e-7)


def test_float32():
    with jax.enable_x64(False):
        flow = vf.flows.continuous(jax.random.key(0), 1, hidden=(4,))
        rng = np.random.default_rng(2)
        flow = jax.tree.map(
            lambda a: a + 0.5 * jnp.asarray(rng.normal(size=a.shape), a.dtype), flow
        )
        x, log_q = eqx.filter_jit(flow.sample_and_log_prob)(jax.random.key(1))
        again = eqx.filter_jit(flow.log_prob)(x)
    assert x.dtype == log_q.dtype == again.dtype == jnp.float32
    np.testing.assert_allclose(again, log_q, atol=1e-3)


def test_bad_arguments_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="tolerance"):
        vf.bijections.Continuous(key, 2, tolerance=0.0)
    with pytest.raises(ValueError, match="adjoint"):
        vf.bijections.Continuous(key, 2, adjoint="backsolve")
    with pytest.raises(ValueError, match="trace"):
        vf.bijections.Continuous(key, 2, trace="guess")
    with pytest.raises(ValueError, match="max_steps"):
        vf.bijections.Continuous(key, 2, max_steps=0)
