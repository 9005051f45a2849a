"""Each family against its formula, written down again in numpy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow.bijections as vb
from vflow._core import params

DIM = 3


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def _randomised(bijection, rng):
    """Every floating-point leaf moved by a standard normal."""
    return jax.tree.map(
        lambda a: a + rng.normal(size=a.shape) if eqx.is_inexact_array(a) else a, bijection
    )


def _check(bijection, x, y, log_det, condition=None):
    out, out_log_det = bijection.forward_and_log_det(x, condition)
    np.testing.assert_allclose(out, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out_log_det, log_det, rtol=1e-12, atol=1e-12)


def test_identity(rng):
    x = rng.normal(size=(2, 3))
    _check(vb.Identity((2, 3)), x, x, 0.0)


def test_affine(rng):
    loc, scale, x = rng.normal(size=DIM), np.exp(rng.normal(size=DIM)), rng.normal(size=DIM)
    _check(vb.Affine(loc, scale), x, scale * x + loc, np.log(scale).sum())
    matrix = rng.normal(size=(2, DIM))  # any event shape; the scale is broadcast
    _check(vb.Affine(matrix, 3.0), 0 * matrix, matrix, 2 * DIM * np.log(3.0))


def test_affine_keeps_scales_of_any_size():
    scale = np.array([1e-30, 1.0, 1e30])
    affine = vb.Affine(np.zeros(3), scale)
    np.testing.assert_allclose(affine.forward_and_log_det(np.ones(3))[0], scale, rtol=1e-13)


def test_triangular_affine_is_the_gaussian(rng):
    tril = np.tril(rng.normal(size=(DIM, DIM)), -1) + np.diag(np.exp(rng.normal(size=DIM)))
    loc, x = rng.normal(size=DIM), rng.normal(size=DIM)
    upper_is_ignored = tril + np.triu(np.ones((DIM, DIM)), 1)
    affine = vb.TriangularAffine.from_loc_tril(loc, upper_is_ignored)
    y, log_det = tril @ x + loc, np.log(np.diag(tril)).sum()
    _check(affine, x, y, log_det)
    np.testing.assert_allclose(affine.tril, tril, rtol=1e-14)
    # the score of N(0, I) becomes that of N(loc, tril tril^T)
    expected = -np.linalg.solve(tril @ tril.T, y - loc)
    np.testing.assert_allclose(affine.push_score(x, -x)[2], expected, rtol=1e-10)


def test_lu_linear(rng):
    layer = _randomised(vb.LULinear(DIM), rng)
    lower = np.tril(layer.factors, -1) + np.eye(DIM)
    upper = np.triu(layer.factors, 1) + np.diag(np.exp(layer.log_diagonal))
    x = rng.normal(size=DIM)
    _check(layer, x, lower @ upper @ x + layer.bias, np.sum(layer.log_diagonal))


def test_low_rank_affine(rng):
    rank = 2
    layer = _randomised(vb.LowRankAffine(jax.random.key(0), DIM, rank), rng)
    v = np.asarray(layer.directions) / np.linalg.norm(layer.directions, axis=0)
    shift = np.log(np.expm1(1 / rank))
    c = np.log1p(np.exp(np.asarray(layer.weights) + shift)) - 1 / rank
    matrix = np.diag(np.exp(layer.log_scale)) @ (np.eye(DIM) + v @ np.diag(c) @ v.T)
    x = rng.normal(size=DIM)
    _check(layer, x, matrix @ x + layer.loc, np.linalg.slogdet(matrix)[1])


def test_low_rank_affine_contains_the_low_rank_gaussians(rng):
    """D (I + F F^T) D for an arbitrary F: V its left singular vectors, 1 + c = sqrt(1 + s^2)."""
    factor, scale = rng.normal(size=(DIM, 2)), np.exp(rng.normal(size=DIM))
    v, s, _ = np.linalg.svd(factor, full_matrices=False)
    weights = np.log(np.expm1(np.sqrt(1 + s**2) - 1 + 0.5)) - np.log(np.expm1(0.5))
    layer = eqx.tree_at(
        lambda b: (b.log_scale, b.directions, b.weights),
        vb.LowRankAffine(jax.random.key(0), DIM, 2),
        tuple(jnp.asarray(a) for a in (np.log(scale), 3 * v, weights)),
    )
    matrix = jax.jacfwd(lambda x: layer.forward_and_log_det(x)[0])(jnp.zeros(DIM))
    expected = scale[:, None] * (np.eye(DIM) + factor @ factor.T) * scale
    np.testing.assert_allclose(matrix @ matrix.T, expected, rtol=1e-10)


@pytest.mark.parametrize("weight", [-30.0, 30.0, 1e4])
def test_low_rank_affine_is_invertible_for_all_weights(weight):
    layer = vb.LowRankAffine(jax.random.key(0), DIM, DIM)
    layer = eqx.tree_at(lambda b: b.weights, layer, jnp.full(DIM, weight))
    matrix = jax.jacfwd(lambda x: layer.forward_and_log_det(x)[0])(jnp.zeros(DIM))
    assert np.linalg.eigvalsh(matrix).min() > 0


def test_permute_and_flip(rng):
    x, order = rng.normal(size=4), np.array([2, 0, 3, 1])
    _check(vb.Permute(order), x, x[order], 0.0)
    _check(vb.Flip(4), x, x[::-1], 0.0)


def test_householder(rng):
    """One reflection after the other, the last first; a vector of zeros reflects nothing."""
    layer = _randomised(vb.Householder(jax.random.key(0), DIM, num_reflections=4), rng)
    layer = eqx.tree_at(lambda b: b.vectors, layer, layer.vectors.at[2].set(0.0))
    x = y = rng.normal(size=DIM)
    for v in np.asarray(layer.vectors)[[3, 1, 0]]:
        y = y - 2 * v * (v @ y) / (v @ v)
    _check(layer, x, y, 0.0)
    gradient = jax.jacrev(lambda b: b.forward_and_log_det(x)[0])(layer).vectors
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="num_reflections must be an even integer"):
        vb.Householder(jax.random.key(0), DIM, num_reflections=3)


def test_act_norm(rng):
    layer = _randomised(vb.ActNorm(DIM), rng)
    x, scale = rng.normal(size=DIM), np.exp(layer.log_scale)
    _check(layer, x, (x - layer.loc) * scale, np.log(scale).sum())


def test_act_norm_whitens_the_draws_that_reach_it(rng):
    """Through chains and scans, one after the other, each seeing what those before it made."""
    affine = vb.Affine(jnp.array([1.0, -2.0, 0.0]), jnp.array([3.0, 1.0, 0.1]))
    inner = vb.Chain([affine, vb.ActNorm(DIM)])
    scan = vb.Scan.stack([inner, inner])
    draws = rng.standard_t(1.5, size=(200, DIM))  # no variance
    draws[:, 2] = 0.1  # no spread but the rounding of its quartiles: the scale stays
    out = vb.ActNorm.whiten(vb.Chain([vb.ActNorm(DIM), scan]), jnp.asarray(draws))
    first = out.layers[0]
    low, middle, high = np.quantile(draws, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(first.loc, middle, rtol=1e-12)
    normal = 2 * scipy.stats.norm.ppf(0.75)
    spread = [*(high - low)[:2] / normal, 1.0]
    np.testing.assert_allclose(first.log_scale, -np.log(spread), rtol=1e-9)
    norms = out.layers[1].layers.layers[1]
    np.testing.assert_allclose(norms.loc, np.tile(affine.loc, (2, 1)), atol=1e-12)
    np.testing.assert_allclose(norms.log_scale[:, :2], -np.log([[3.0, 1.0]] * 2), atol=1e-12)


def _network(mlp, x):
    for weight, bias in zip(mlp.weights[:-1], mlp.biases[:-1], strict=True):
        x = x @ np.asarray(weight) + np.asarray(bias)
        x = x / (1 + np.exp(-x))  # silu
    return x @ np.asarray(mlp.weights[-1]) + np.asarray(mlp.biases[-1])


def _clamp(s, low, high):
    alpha = np.where(s >= 0, high, -low)
    return 2 * alpha / np.pi * np.arctan(s / alpha)


def test_coupling(rng):
    transformer = vb.AffineTransformer(min_log_scale=-2.0, max_log_scale=0.1)
    layer = vb.Coupling(
        jax.random.key(0), 5, transformer=transformer, hidden=(4, 3), condition_dim=2
    )
    layer = _randomised(layer, rng)
    x, condition = rng.normal(size=5), rng.normal(size=2)
    parameters = _network(layer.conditioner, np.concatenate([x[:2], condition])).reshape(2, 3).T
    log_scale = _clamp(parameters[:, 1], -2.0, 0.1)
    y = np.concatenate([x[:2], x[2:] * np.exp(log_scale) + parameters[:, 0]])
    _check(layer, x, y, log_scale.sum(), condition)


def test_sinh_arcsinh_transformer(rng):
    """Jones & Pewsey 2009, with the bounded log-scale and log-tail."""
    transformer = vb.SinhArcsinhTransformer(max_log_scale=1.5, max_log_tail=0.5, max_skew=3.0)
    layer = _randomised(vb.Elementwise(jax.random.key(0), DIM, transformer=transformer), rng)
    loc, raw_scale, raw_skew, raw_tail = np.asarray(layer.params).T
    scale, tail = np.exp(_clamp(raw_scale, -1.5, 1.5)), np.exp(_clamp(raw_tail, -0.5, 0.5))
    skew, x = _clamp(raw_skew, -3.0, 3.0), rng.normal(size=DIM)
    y = scale * np.sinh(tail * np.arcsinh(x) + skew) + loc
    slope = scale * tail * np.cosh(tail * np.arcsinh(x) + skew) / np.sqrt(1 + x**2)
    _check(layer, x, y, np.log(slope).sum())


def test_coupling_scale_is_bounded(rng):
    layer = jax.tree.map(lambda a: 1e6 * a, _randomised(vb.Coupling(jax.random.key(0), 4), rng))
    for _ in range(5):
        log_det = layer.forward_and_log_det(1e6 * rng.normal(size=4))[1]
        assert abs(log_det) <= 2 * 2.0


def test_elementwise(rng):
    free = _randomised(vb.Elementwise(jax.random.key(0), DIM), rng)
    x, condition = rng.normal(size=DIM), rng.normal(size=2)
    log_scale = _clamp(np.asarray(free.params)[:, 1], -2.0, 2.0)
    _check(free, x, x * np.exp(log_scale) + np.asarray(free.params)[:, 0], log_scale.sum())
    layer = vb.Elementwise(jax.random.key(0), DIM, hidden=(4,), condition_dim=2)
    layer = _randomised(layer, rng)
    parameters = _network(layer.params, condition).reshape(DIM, 2)
    log_scale = _clamp(parameters[:, 1], -2.0, 2.0)
    _check(layer, x, x * np.exp(log_scale) + parameters[:, 0], log_scale.sum(), condition)


def test_chain_and_scan_apply_the_first_layer_first():
    """2(x + 1) and not 2x + 1; the scan equals the chain."""
    layers = [vb.Affine(np.ones(1), 1.0), vb.Affine(np.zeros(1), 2.0)]
    for bijection in (vb.Chain(layers), vb.Scan.stack(layers)):
        _check(bijection, np.array([3.0]), np.array([8.0]), np.log(2.0))
        x, log_det = bijection.inverse_and_log_det(np.array([8.0]))
        np.testing.assert_allclose((x[0], log_det), (3.0, -np.log(2.0)), rtol=1e-14)


def test_invert_pushes_the_score_of_the_pullback():
    """T^-1 of N(1, 4) under T(x) = 2x + 1 is N(0, 1)."""
    bijection = vb.Invert(vb.Affine(np.ones(1), 2.0))
    y = np.array([3.7])
    x, log_det, score = bijection.push_score(y, -(y - 1) / 4)
    np.testing.assert_allclose(x, (y - 1) / 2, rtol=1e-14)
    np.testing.assert_allclose(log_det, -np.log(2.0), rtol=1e-14)
    np.testing.assert_allclose(score, -x, rtol=1e-14)


def test_freeze_trains_nothing():
    frozen = vb.Freeze(vb.Affine(np.ones(2), 2.0))
    assert jax.tree.leaves(params(frozen)) == []
    gradient = eqx.filter_grad(lambda b: b.forward_and_log_det(jnp.ones(2))[0].sum())(frozen)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    _check(frozen, np.ones(2), 3 * np.ones(2), 2 * np.log(2.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda key: vb.Coupling(key, 4),
        lambda key: vb.Coupling(key, 4, condition_dim=2),
        lambda key: vb.Elementwise(key, 4),
        lambda key: vb.Elementwise(key, 4, transformer="spline"),
        lambda key: vb.Elementwise(key, 4, transformer=vb.TanhMixture()),
        lambda key: vb.Householder(key, 4),
        lambda key: vb.LowRankAffine(key, 4, 2),
        lambda key: vb.LULinear(4),
        lambda key: vb.TriangularAffine(4),
    ],
)
def test_start_is_the_identity_with_a_gradient(make, rng):
    """At the start y = x, and moving some parameter of every kind changes y."""
    bijection = make(jax.random.key(3))
    x = rng.normal(size=4)
    condition = None if bijection.condition_shape is None else rng.normal(size=2)
    _check(bijection, x, x, 0.0, condition)

    def loss(bijection):
        y, log_det = bijection.forward_and_log_det(x, condition)
        return jnp.sum(y**3) + 0.7 * log_det

    gradient = jax.tree.leaves(eqx.filter_grad(loss)(bijection))
    assert sum(float(jnp.abs(leaf).sum()) for leaf in gradient) > 0.1


def test_loft_is_the_papers_formula():
    """g(z) = sign z (log(max(|z| - tau, 0) + 1) + min(|z|, tau)), and its exact inverse."""
    x = np.array([-1e4, -100.0, -3.0, 0.0, 99.0, 100.5, 1e6])
    beyond = np.maximum(np.abs(x) - 100, 0)
    y = np.sign(x) * (np.log1p(beyond) + np.minimum(np.abs(x), 100))
    loft = vb.LOFT(7)
    _check(loft, x, y, -np.log1p(beyond).sum())
    np.testing.assert_allclose(loft.inverse_and_log_det(y)[0], x, rtol=1e-12)


def test_tanh_mixture(rng):
    layer = _randomised(vb.Elementwise(jax.random.key(0), 1, transformer=vb.TanhMixture(3)), rng)
    raw = np.asarray(layer.params)[0]
    scale, rate = np.exp(_clamp(raw[1], -2.0, 2.0)), np.exp(_clamp(raw[5:8], -2.0, 2.0))
    height = 0.999 / 3 * (np.log1p(np.exp(raw[2:5] + np.log(np.e - 1))) - 1)
    centre = np.array([-2.0, 0.0, 2.0]) + raw[8:]
    x = 0.7
    y = raw[0] + scale * (x + np.sum(height / rate * np.tanh(rate * (x - centre))))
    slope = scale * (1 + np.sum(height / np.cosh(rate * (x - centre)) ** 2))
    _check(layer, np.array([x]), np.array([y]), np.log(slope))


def test_tanh_mixture_increases_for_all_heights():
    """All bends as deep as they get, and at one place: the slope there is a thousandth."""
    raw = jnp.zeros(11).at[2:5].set(-1e4).at[8:].set(jnp.array([2.0, 0.0, -2.0]))
    transformer = vb.TanhMixture(3)
    y, log_slope = transformer.forward(jnp.zeros(()), raw)
    np.testing.assert_allclose(np.exp(log_slope), 1e-3, rtol=1e-9)
    back = np.asarray(transformer.inverse(y + 1e-4, raw)[0])
    np.testing.assert_allclose(back - 0.999 * np.tanh(back), 1e-4, rtol=1e-9)
