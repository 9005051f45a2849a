"""The residual layer: its certified bound, its formula, its inverse at the edge of the bound."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vflow_kernels import spectral_bound

import vflow.bijections as vb
from vflow._core._mlp import _ACTIVATIONS
from vflow.bijections._residual import _LIPSCHITZ


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (64, 64), (64, 3)], ids=str)
def test_spectral_bound_is_above_the_norm_and_close(shape):
    rng = np.random.default_rng(0)
    bound = jax.jit(spectral_bound)
    for size in (1e-6, 1.0, 1e6):
        matrix = size * rng.normal(size=shape)
        exact = np.linalg.norm(matrix, 2)
        value = bound(jnp.asarray(matrix))
        assert exact * (1 - 1e-12) <= value <= exact * min(shape) ** (1 / 256) * (1 + 1e-12)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(max(shape), max(shape))))
    assert bound(jnp.asarray(orthogonal)) >= 1 - 1e-12  # all singular values equal: the worst case
    gradient = jax.grad(spectral_bound)(jnp.zeros(shape))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS))
def test_the_slopes_of_the_activations_are_bounded(name):
    slope = jax.vmap(jax.grad(_ACTIVATIONS[name]))(jnp.linspace(-10.0, 10.0, 20_001))
    assert jnp.max(jnp.abs(slope)) <= _LIPSCHITZ.get(name, 1.0)


def _layer(scale, **options):
    layer = vb.Residual(jax.random.key(0), 3, hidden=(6, 5), **options)
    rng = np.random.default_rng(1)
    moved = lambda a: a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(lambda a: moved(a) if eqx.is_inexact_array(a) else a, layer)


def test_formula():
    """x + W3 s(W2 s(W1 x + b1) + b2) + b3, s(z) = z / (1 + e^-z) / 1.1; small weights are left alone."""
    layer = _layer(0.0)
    rng = np.random.default_rng(2)
    weights = [0.2 * rng.normal(size=w.shape) for w in layer.network.weights]
    biases = [rng.normal(size=b.shape) for b in layer.network.biases]
    layer = eqx.tree_at(
        lambda b: (b.network.weights, b.network.biases),
        layer,
        jax.tree.map(jnp.asarray, (tuple(weights), tuple(biases))),
    )
    at = np.array([0.5, -1.0, 2.0])
    h = at
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        h = h @ w + b
        h = h / (1 + np.exp(-h)) / 1.1
    y, _ = eqx.filter_jit(vb.Residual.forward_and_log_det)(layer, jnp.asarray(at))
    np.testing.assert_allclose(y, at + h @ weights[-1] + biases[-1], rtol=1e-12)


@pytest.mark.parametrize("lipschitz", [0.5, 0.97])
def test_the_bound_holds_for_any_weights(lipschitz):
    layer = _layer(30.0, lipschitz=lipschitz)
    points = jax.random.normal(jax.random.key(3), (200, 3))
    contraction = lambda x: layer.forward_and_log_det(x)[0] - x
    jacobians = jax.jit(jax.vmap(jax.jacfwd(contraction)))(points)
    assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() <= lipschitz
    run = jax.jit(jax.vmap(lambda y: layer.inverse_and_log_det(y)))
    back, log_det = run(1e3 * points)
    again, minus = jax.jit(jax.vmap(lambda x: layer.forward_and_log_det(x)))(back)
    np.testing.assert_allclose(again, 1e3 * points, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(log_det, -minus, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "Residual: dim"),
        ({"lipschitz": 1.0}, "Residual: lipschitz"),
        ({"condition_dim": 0}, "Residual: condition_dim"),
        ({"activation": "swoosh"}, "activation must be"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        vb.Residual(jax.random.key(0), **{"dim": 2, **options})
