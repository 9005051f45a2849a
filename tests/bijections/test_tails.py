"""Layers for heavy tails: exact laws, both ends of the range, the order light before heavy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import vflow_kernels as vk

import vflow as vf
import vflow.bijections as vb
from tests.flows.registry import perturb

dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
TAILS = np.array([0.01, 0.2, 0.5, 1.0, 2.0])


@dtypes
def test_output_of_a_normal_is_generalised_pareto(dtype):
    r"""$\log q(x) = -\log 2 - (1 + 1/\lambda)\log(1 + \lambda|x|)$, exactly."""
    with jax.enable_x64(dtype == "float64"):
        layer = vb.HeavyTail(5, df=1 / TAILS, scale=1.0)
        flow = vf.distributions.Flow(vf.distributions.Normal(5), layer)
        z = np.linspace(-6, 6, 121)[:, None] * np.ones(5)
        x, _ = jax.jit(jax.vmap(layer.forward_and_log_det))(jnp.asarray(z, dtype))
        log_q = jax.jit(jax.vmap(flow.log_prob))(x)
        tail = np.asarray(layer.tail, np.float64)[0]
    assert x.dtype == log_q.dtype == jnp.dtype(dtype)
    x = np.asarray(x, np.float64)
    expected = np.sum(-np.log(2) - (1 + 1 / tail) * np.log1p(tail * np.abs(x)), axis=1)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(
        (log_q - expected) / np.maximum(1, np.abs(expected)), 0, atol=tolerance
    )


def _erfc_map(z, tail):
    return np.sign(z) / tail * (scipy.special.erfc(np.abs(z) / np.sqrt(2)) ** -tail - 1)


def _lambda_map(z, lower, upper, weights):
    def power(z, tail):
        return ((2 * scipy.stats.norm.sf(z)) ** -tail - 1) / tail

    heavy = weights[2] * power(z, upper) - weights[1] * power(-z, lower)
    return weights[0] * z + np.sqrt(np.pi / 2) * heavy


def test_layers_are_their_formulas():
    z = np.array([-5.0, -1.0, -1e-3, 0.0, 0.3, 2.0, 7.0])
    df = np.stack([np.linspace(0.5, 4, 7), np.linspace(3, 0.7, 7)])
    layer = vb.HeavyTail(7, df=df, loc=1.0, scale=2.0)
    expected = 1 + 2 * _erfc_map(z, np.where(z < 0, 1 / df[0], 1 / df[1]))
    y, _ = layer.forward_and_log_det(z)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    smooth = perturb(
        vb.SmoothHeavyTail(7, df=df, loc=1.0, scale=2.0, weight=0.3), jax.random.key(0)
    )
    expected = smooth.loc + np.exp(smooth.log_scale) * _lambda_map(
        z, *smooth.tail, np.asarray(smooth.weights)
    )
    np.testing.assert_allclose(smooth.forward_and_log_det(z)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(layer.df, df, rtol=1e-12)


SMOOTH = (vk.smooth_tail_forward, vk.smooth_tail_inverse)
PARETO = (vk.heavy_tail_forward, vk.heavy_tail_inverse)


@dtypes
@pytest.mark.parametrize("smooth", [False, True], ids=["pareto", "smooth"])
def test_stable_at_both_ends(dtype, smooth):
    """Values and every derivative finite from zero to far beyond the range; the way back exact."""
    forward, inverse = SMOOTH if smooth else PARETO

    def arguments(z):
        weights = (jnp.log(jnp.full((3, *z.shape), 1 / 3, dtype)),) if smooth else ()
        return jnp.full_like(z, 2.0), jnp.full_like(z, 2.0), *weights

    @jax.jit
    @jax.vmap
    def run(z):
        x, log_slope = forward(z, *arguments(z))
        slopes = jax.grad(lambda z, rest: sum(forward(z, *rest)), (0, 1))(z, arguments(z))
        slope = jax.grad(lambda z: forward(z, *arguments(z))[0])(z)
        return x, log_slope, slope, slopes, *inverse(x, *arguments(z))

    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray([0.0, 1e-30, 1e-6, -1e-6, 3.0, -8.0, 40.0, -1e4, 1e6], dtype)
        x, log_slope, slope, slopes, back, log_inverse = run(z)
    for leaf in (x, log_slope, *jax.tree.leaves(slopes)):
        assert np.isfinite(leaf).all()
    np.testing.assert_allclose(back, z, rtol=1e-4 if dtype == "float32" else 1e-10)
    np.testing.assert_allclose(log_inverse, -log_slope, rtol=1e-3, atol=1e-4)
    # at zero jnp.abs would lose one half of the slope, jnp.sign all of it
    np.testing.assert_allclose(slope[0], 1 if smooth else np.sqrt(2 / np.pi), rtol=1e-6)


def test_light_coordinates_pass_and_have_no_leaf():
    for kind in (vb.HeavyTail, vb.SmoothHeavyTail):
        layer = kind(3, df=jnp.array([jnp.inf, 2.0, jnp.inf]))
        z = jnp.array([-20.0, 0.5, 1e3])
        y, _ = layer.forward_and_log_det(z)
        np.testing.assert_array_equal(y[::2], z[::2])
        assert layer.raw_tail.shape == (2, 1)
        assert (
            len(jax.tree.leaves(vf.params(kind(3, trainable_df=False))))
            == len(jax.tree.leaves(vf.params(kind(3)))) - 1
        )


def _jacobian(bijection, method, x):
    return jax.jit(jax.jacfwd(lambda x: getattr(bijection, method)(x)[0]))(x)


def test_heavy_never_feeds_light_in_either_direction():
    x = jnp.array([0.3, -1.0, 2.0, 50.0, -1e6])
    for layer in (
        vb.BlockLU((3, 2), key=jax.random.key(0)),
        vb.TailCoupling(jax.random.key(0), 3, 2),
    ):
        layer = perturb(layer, jax.random.key(1), 1.0)
        for method in ("forward_and_log_det", "inverse_and_log_det"):
            jacobian = _jacobian(layer, method, x)
            assert not jacobian[:3, 3:].any()
            assert jacobian[3:, :3].any()


def test_block_lu_is_the_block_matrix():
    layer = perturb(vb.BlockLU((2, 2)), jax.random.key(2))
    matrix = np.asarray(_jacobian(layer, "forward_and_log_det", jnp.zeros(4)))
    w1, w2, w3 = matrix[:2, :2], matrix[2:, :2], matrix[2:, 2:]
    inverse = np.block(
        [
            [np.linalg.inv(w1), np.zeros((2, 2))],
            [-np.linalg.inv(w3) @ w2 @ np.linalg.inv(w1), np.linalg.inv(w3)],
        ]
    )
    np.testing.assert_allclose(
        _jacobian(layer, "inverse_and_log_det", jnp.zeros(4)), inverse, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 0), (0, 1), (1, 1)])
def test_groups_may_be_empty(sizes):
    layer = perturb(vb.TailCoupling(jax.random.key(0), *sizes, hidden=(4,)), jax.random.key(1))
    x = jnp.linspace(-1.0, 2.0, sum(sizes))
    y, log_det = layer.forward_and_log_det(x)
    np.testing.assert_allclose(layer.inverse_and_log_det(y)[0], x, atol=1e-12)
    expected = np.linalg.slogdet(_jacobian(layer, "forward_and_log_det", x))[1]
    np.testing.assert_allclose(log_det, expected, atol=1e-12)


@pytest.mark.parametrize("kind", [vb.HeavyTail, vb.SmoothHeavyTail], ids=["pareto", "smooth"])
def test_bad_arguments_are_named(kind):
    for options, match in (
        ({"df": 0.0}, "df must be"),
        ({"df": jnp.ones(3)}, "df has shape"),
        ({"df": jnp.array([[1.0, 1.0], [jnp.inf, 1.0]])}, "one side only"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"loc": jnp.ones(3)}, "loc has shape"),
    ):
        with pytest.raises(ValueError, match=match):
            kind(2, **options)
    with pytest.raises(TypeError, match="concrete"):
        jax.jit(lambda df: kind(2, df=df).tail)(jnp.ones(2))
    with pytest.raises(ValueError, match="weight"):
        vb.SmoothHeavyTail(2, weight=1.0)
    with pytest.raises(ValueError, match="sizes"):
        vb.BlockLU((0, 0))
    with pytest.raises(ValueError, match="num_light"):
        vb.TailCoupling(jax.random.key(0), -1, 2)
