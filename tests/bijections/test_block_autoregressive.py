"""The block neural autoregressive layer against another library, its bounds and extreme inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow.bijections as vb


def _layer(dim, scale=0.5, **options):
    layer = vb.BlockAutoregressive(jax.random.key(0), dim, **options)
    rng = np.random.default_rng(1)
    moved = lambda a: a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(lambda a: moved(a) if eqx.is_inexact_array(a) else a, layer)


def test_numpyro_with_the_same_weights():
    """Their network with the paper's tanh and gated residual; one gate for all coordinates."""
    from numpyro.nn.block_neural_arn import BlockNeuralAutoregressiveNN, Tanh

    dim, hidden = 3, (4, 2)
    layer = _layer(dim, hidden=hidden)
    layer = eqx.tree_at(lambda b: b.gate, layer, jnp.full(dim, -0.4))
    _, apply = BlockNeuralAutoregressiveNN(dim, list(hidden), residual="gated", activation=Tanh())
    dense = list(zip(layer.weights, layer.log_norms, layer.biases, strict=True))
    params = [(), [[dense[0], (), dense[1], (), dense[2]], ()], layer.gate[0]]
    x = jnp.array([0.4, -1.3, 0.8])
    with jax.numpy_rank_promotion("allow"):
        expected, log_slope = apply(params, x)
    y, log_det = eqx.filter_jit(vb.BlockAutoregressive.forward_and_log_det)(layer, x)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(log_det, np.sum(log_slope), rtol=1e-12)


def test_triangular_increasing_and_onto():
    """Far out the slope is that of the residual: tails are kept, and every point has an inverse."""
    layer = _layer(3, hidden=(4,))
    x = jnp.array([0.4, -1.3, 0.8])
    jacobian = jax.jit(jax.jacfwd(lambda x: layer.forward_and_log_det(x)[0]))(x)
    assert (np.triu(jacobian, 1) == 0).all()
    assert (np.diag(jacobian) > 1 / (1 + np.exp(layer.gate))).all()
    assert (np.asarray(jacobian)[np.tril_indices(3)] != 0).all()
    both = eqx.filter_jit(lambda layer, y: (layer.inverse_and_log_det(y), layer.push_score(y, y)))
    forward = eqx.filter_jit(vb.BlockAutoregressive.forward_and_log_det)
    for size in (1e-3, 1.0, 1e4, 1e12):
        y = size * jnp.array([1.0, -1.0, 0.5])
        (back, log_det), pushed = both(layer, y)
        again, minus = forward(layer, back)
        np.testing.assert_allclose(again / size, y / size, atol=1e-10)
        np.testing.assert_allclose(log_det, -minus, atol=1e-10)
        assert all(np.isfinite(a).all() for a in pushed)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "BlockAutoregressive: dim"),
        ({"hidden": ()}, "BlockAutoregressive: hidden"),
        ({"hidden": (0,)}, "BlockAutoregressive: hidden"),
        ({"condition_dim": 0}, "BlockAutoregressive: condition_dim"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        vb.BlockAutoregressive(jax.random.key(0), **{"dim": 2, **options})
