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

    @eqx.filter_jit
    def run(layer, x, score):
        def forward(layer, x):
            y, log_det = layer.forward_and_log_det(x, C)
            return jnp.append(y, log_det)

        out, pull = jax.vjp(forward, layer, x)
        slopes, jacobian = jax.vmap(pull)(jnp.eye(3))
        back, inverse_log_det = layer.inverse_and_log_det(out[:2], C)
        return {
            "y": out[:2],
            "log_det": out[2],
            "back": back,
            "inverse_log_det": inverse_log_det,
            "jacobian": jacobian[:2],
            "slope": jacobian[2],
            "slope_in_layer": jax.tree.map(lambda a: a[2], slopes),
            "push": layer.push_score(x, score, C),
        }

    return {**run(layer, X, SCORE), "run": run}


def _linear(**options):
    weight = jnp.concatenate([jnp.asarray(A.T), jnp.zeros((1, 2))])
    layer = _layer(hidden=(), **options)
    return eqx.tree_at(lambda layer: layer.velocity.weights, layer, (weight,))


def test_linear_field_has_the_matrix_exponential():
    """v = A x: x(1) = expm(A) x(0), log-det = tr A, score = expm(-A') s."""
    y, log_det, score = eqx.filter_jit(_linear().push_score)(X, SCORE)
    np.testing.assert_allclose(y, scipy.linalg.expm(A) @ X, rtol=1e-8)
    np.testing.assert_allclose(log_det, np.trace(A), rtol=1e-12)
    np.testing.assert_allclose(score, scipy.linalg.expm(-A.T) @ SCORE, rtol=1e-8)


def test_one_probe_estimates_the_trace_without_bias():
    """e'Ae for signs e: two values, whose mean is tr A, and no path gradient."""
    layer = _linear(trace="hutchinson")
    run = eqx.filter_jit(lambda keys: jax.vmap(lambda k: layer.forward_and_estimate(k, X))(keys))
    y, estimates = run(jax.random.split(jax.random.key(3), 8))
    np.testing.assert_allclose(y, np.tile(scipy.linalg.expm(A) @ X, (8, 1)), rtol=1e-8)
    low, high = np.trace(A) - (A[0, 1] + A[1, 0]), np.trace(A) + (A[0, 1] + A[1, 0])
    np.testing.assert_allclose(np.unique(np.round(estimates, 9)), [low, high], atol=1e-9)
    flow = vf.distributions.Flow(vf.distributions.Normal(2), vf.bijections.Chain([layer]))
    assert "hutchinson" in flow.path_refusal()


def test_log_det_is_that_of_the_jacobian(results):
    truth = np.linalg.slogdet(results["jacobian"])[1]
    assert abs(truth) > 0.05
    np.testing.assert_allclose(results["log_det"], truth, atol=1e-7)


def test_round_trip(results):
    np.testing.assert_allclose(results["back"], X, atol=1e-7)
    np.testing.assert_allclose(results["inverse_log_det"], -results["log_det"], atol=1e-7)


def test_score_solves_the_dense_system(results):
    truth = np.linalg.solve(results["jacobian"].T, SCORE - results["slope"])
    y, log_det, score = results["push"]
    np.testing.assert_allclose(y, results["y"], atol=1e-7)
    np.testing.assert_allclose(log_det, results["log_det"], atol=1e-7)
    np.testing.assert_allclose(score, truth, atol=1e-6)


def test_gradients_reach_the_network(results, layer):
    """Backwards through the solver, against a central difference along one direction."""
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), layer)
    step = 1e-4
    ends = [
        results["run"](jax.tree.map(lambda a, b, h=h: a + h * b, layer, direction), X, SCORE)
        for h in (step, -step)
    ]
    pairs = zip(jax.tree.leaves(results["slope_in_layer"]), jax.tree.leaves(direction), strict=True)
    along = sum(jnp.vdot(a, b) for a, b in pairs)
    np.testing.assert_allclose(
        (ends[0]["log_det"] - ends[1]["log_det"]) / (2 * step), along, rtol=1e-5
    )


@pytest.mark.slow
def test_direct_adjoint_allows_forward_mode(results, layer):
    direct = _layer(hidden=(5,), condition_dim=1, adjoint="direct")
    direct = jax.tree.unflatten(jax.tree.structure(direct), jax.tree.leaves(layer))
    jacobian = eqx.filter_jit(jax.jacfwd(lambda x: direct.forward_and_log_det(x, C)[0]))(X)
    np.testing.assert_allclose(jacobian, results["jacobian"], atol=1e-7)


def test_float32(results, layer):
    with jax.enable_x64(False):
        small, x, c = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (layer, X, C))
        loose = vf.bijections.Continuous(jax.random.key(0), 2, hidden=(5,), condition_dim=1)
        small = jax.tree.unflatten(jax.tree.structure(loose), jax.tree.leaves(small))
        y, log_det = eqx.filter_jit(small.forward_and_log_det)(x, c)
    assert y.dtype == log_det.dtype == jnp.float32
    np.testing.assert_allclose(y, results["y"], atol=1e-4)
    np.testing.assert_allclose(log_det, results["log_det"], atol=1e-4)


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
