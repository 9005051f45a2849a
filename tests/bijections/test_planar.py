"""Planar, radial and Sylvester layers against the papers' formulas and at their traps."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vflow_kernels as vk
from flowjax.bijections import Planar as PeerPlanar

import vflow.bijections as vb
from vflow._core import combine, partition

SCALES = (0.1, 1.0, 5.0, 20.0)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def _planar(u, w, b):
    params = jnp.concatenate([jnp.asarray(u), jnp.asarray(w), jnp.asarray([b])])
    layer = vb.Planar(jax.random.key(0), len(u))
    return eqx.tree_at(lambda layer: layer.params, layer, params)


def _softplus(x):
    return np.logaddexp(0, x)


def _planar_formula(x, u, w, b):
    """Rezende & Mohamed 2015, equations 10 to 12 and appendix A.1, with the margin."""
    inner = w @ u
    u_hat = u + (-1 + 1e-3 + _softplus(inner) - inner) * w / (w @ w)
    h = np.tanh(w @ x + b)
    psi = (1 - h**2) * w
    return x + u_hat * h, np.log(np.abs(1 + u_hat @ psi))


def test_planar_is_the_papers(rng):
    for scale in (0.1, 1.0, 5.0):
        u, w, x = scale * rng.normal(size=(3, 4))
        b = rng.normal()
        y, log_det = _planar(u, w, b).forward_and_log_det(x)
        expected, expected_log_det = _planar_formula(x, u, w, b)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-9, atol=1e-12)


def test_the_constraint_is_the_papers_where_a_peer_takes_another_logarithm():
    """m(50) = 49; with log(1 + softplus) it is 2.93, a map that hardly stretches."""
    w = jnp.array([1.0, 0.0])
    _, c = vk.planar_constrain(50 * w, w)
    np.testing.assert_allclose(c, 49 + 1e-3, rtol=1e-12)
    _, c = vk.planar_constrain(0 * w, w)
    np.testing.assert_allclose(c, np.log(2) - 1 + 1e-3, rtol=1e-12)
    peer = PeerPlanar(jax.random.key(0), dim=2, negative_slope=None)
    peer = eqx.tree_at(lambda p: p.params, peer, jnp.concatenate([w, 50 * w, jnp.zeros(1)]))
    _, log_det = peer.transform_and_log_det(jnp.zeros(2))
    np.testing.assert_allclose(np.expm1(log_det), 2.93, atol=0.01)


def test_planar_equals_flowjax_for_the_same_shift(rng):
    """Its constraint inverted: another u, the same map."""
    u, w, x = rng.normal(size=(3, 3))
    peer = PeerPlanar(jax.random.key(0), dim=3, negative_slope=None)
    peer = eqx.tree_at(lambda p: p.params, peer, jnp.concatenate([w, u, jnp.array([0.4])]))
    c = -1 + np.log1p(_softplus(w @ u))  # its w . u_hat
    inner = np.log(np.expm1(c + 1 - 1e-3))  # ours has the same
    ours = _planar(u + (inner - w @ u) * w / (w @ w), w, 0.4)
    y, log_det = peer.transform_and_log_det(jnp.asarray(x))
    np.testing.assert_allclose(ours.forward_and_log_det(x)[0], y, rtol=1e-12)
    np.testing.assert_allclose(ours.forward_and_log_det(x)[1], log_det, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_planar_never_folds(dtype, rng):
    """w . u_hat > -1 strictly, where the paper's own formula rounds to -1."""
    with jax.enable_x64(dtype == "float64"):
        u, w = jnp.asarray(20 * rng.normal(size=(2, 256, 3)), dtype)
        _, c = jax.vmap(vk.planar_constrain)(u, w)
        assert float(c.min()) >= -1 + 0.99e-3
        assert (-1 + _softplus(np.sum(u * w, 1)) == -1).any()  # the trap
        for size in (1e4, 1e6, 0.0):
            u = -size * w[0]
            u_hat, c = vk.planar_constrain(u, w[0])
            assert np.isfinite(u_hat).all()
            assert c > -1
        u_hat, c = vk.planar_constrain(u, 0 * u)
        assert (u_hat == u).all()
        assert c == 0


def _inverse_errors(layer, reaches, dtype, rng):
    """The residual of the inverse at 16 points, relative to the point; a row for each size of these."""
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    @jax.jit
    def errors(arrays, y):
        layer = eqx.combine(arrays, static)

        def one(y):
            x, inverse_log_det = layer.inverse_and_log_det(y)
            again, log_det = layer.forward_and_log_det(x)
            size = jnp.maximum(1, jnp.max(jnp.abs(y)))
            return jnp.max(jnp.abs(again - y)) / size, log_det + inverse_log_det

        return jax.vmap(one)(y)

    worst = []
    for reach, size in itertools.product(reaches, SCALES):
        noise = jax.tree.map(
            lambda a, s=size: jnp.asarray(s * rng.normal(size=a.shape), dtype), arrays
        )
        y = jnp.asarray(reach * rng.normal(size=(16, *layer.shape)), dtype)
        residual, total = errors(noise, y)
        assert np.isfinite(total).all()
        worst.append(float(residual.max()))
    return np.reshape(worst, (len(reaches), len(SCALES)))


LAYERS = {
    "planar": lambda key: vb.Planar(key, 4),
    "radial": lambda key: vb.Radial(key, 4),
    "sylvester": lambda key: vb.Sylvester(key, 4, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_is_exact_for_parameters_of_any_size(name, rng):
    layer = LAYERS[name](jax.random.key(0))
    assert _inverse_errors(layer, (1.0, 1e4), "float64", rng).max() < 1e-10
    with jax.enable_x64(False):
        layer = LAYERS[name](jax.random.key(0))
        small, one, five, twenty = _inverse_errors(layer, (1.0,), "float32", rng)[0]
        assert max(small, one) < 1e-5
        assert max(five, twenty) < 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_starts_at_the_identity_and_not_at_a_dead_point(name, rng):
    """Neither the shift nor the log-det is constant around the start."""
    layer = LAYERS[name](jax.random.key(1))
    trained, static = partition(layer)
    x, weight = rng.normal(size=(2, 4))
    y, log_det = layer.forward_and_log_det(x)
    np.testing.assert_allclose(y, x, atol=1e-12)
    np.testing.assert_allclose(log_det, 0, atol=1e-12)

    def outputs(trained):
        y, log_det = combine(trained, static).forward_and_log_det(x)
        return weight @ y, log_det

    for gradient in jax.jit(jax.jacrev(outputs))(trained):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-2


def test_conditional_planar_starts_at_the_identity_and_then_listens():
    layer = vb.Planar(jax.random.key(0), 3, condition_dim=2, hidden=(4,))
    x, condition = jnp.array([1.0, -1.0, 0.5]), jnp.array([0.3, 2.0])
    np.testing.assert_allclose(layer.forward_and_log_det(x, condition)[0], x, atol=1e-12)
    moved = eqx.tree_at(lambda b: b.params.weights[-1], layer, jnp.ones((4, 7)))
    shift = [moved.forward_and_log_det(x, c)[0] - x for c in (condition, -condition)]
    assert np.abs(shift[0] - shift[1]).max() > 1e-2
    u, w, b = np.split(np.asarray(moved.params(condition)), [3, 6])
    expected, _ = _planar_formula(np.asarray(x), u, w, b[0])
    np.testing.assert_allclose(moved.forward_and_log_det(x, condition)[0], expected, rtol=1e-10)


def test_radial_is_the_papers(rng):
    for scale in (0.1, 1.0, 5.0):
        x, centre = scale * rng.normal(size=(2, 4))
        raw_alpha, raw_beta = scale * rng.normal(size=2)
        layer = eqx.tree_at(
            lambda b: (b.centre, b.raw_alpha, b.raw_beta),
            vb.Radial(jax.random.key(0), 4),
            tuple(jnp.asarray(a) for a in (centre, raw_alpha, raw_beta)),
        )
        alpha = 1e-3 + _softplus(raw_alpha)
        beta = -(1 - 1e-3) * alpha + _softplus(raw_beta)
        r = np.linalg.norm(x - centre)
        h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
        y = x + beta * h * (x - centre)
        det = (1 + beta * h) ** 3 * (1 + beta * h + beta * slope * r)
        out, log_det = layer.forward_and_log_det(x)
        np.testing.assert_allclose(out, y, rtol=1e-12)
        np.testing.assert_allclose(log_det, np.log(det), rtol=1e-9, atol=1e-12)
        # the inverse is a formula: exact far away, near the centre and at it
        for point in (y, 1e4 * y, centre + 1e-9 * (y - centre), centre):
            back, inverse_log_det = layer.inverse_and_log_det(point)
            again, log_det = layer.forward_and_log_det(back)
            np.testing.assert_allclose(again, point, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(log_det + inverse_log_det, 0, atol=1e-7)


def test_radial_derivatives_at_its_centre_are_finite():
    layer = vb.Radial(jax.random.key(0), 2)
    layer = eqx.tree_at(lambda b: b.raw_beta, layer, jnp.asarray(2.0))

    @jax.jit
    def everything(centre):
        outputs = jax.jacfwd(layer.forward_and_log_det)(centre)
        inverse = jax.jacrev(layer.inverse_and_log_det)(centre)
        return outputs, inverse, layer.push_score(centre, jnp.ones(2))

    outputs, inverse, pushed = everything(layer.centre)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((outputs, inverse, pushed)))
    stretch = (1 + np.log1p(np.exp(2.0)) - 0.999) * np.eye(2)
    np.testing.assert_allclose(outputs[0], stretch, rtol=1e-12)
    np.testing.assert_allclose(pushed[2], 1 / stretch[0, 0], rtol=1e-12)


def test_radial_density_integrates_to_one():
    """In polar coordinates around the centre, where the density has a cone."""
    layer = vb.Radial(jax.random.key(0), 2)
    layer = eqx.tree_at(lambda b: b.raw_beta, layer, jnp.asarray(2.0))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    radius, angle = 7 * (nodes + 1), np.linspace(0, 2 * np.pi, 64, endpoint=False)
    mesh = radius[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.asarray(layer.centre) + mesh.reshape(-1, 2)
    x, log_det = jax.jit(jax.vmap(layer.inverse_and_log_det))(points)
    density = np.exp(-0.5 * np.sum(x**2, 1) + log_det).reshape(60, 64) / (2 * np.pi)
    total = np.sum(density.mean(1) * 2 * np.pi * radius * 7 * weights)
    np.testing.assert_allclose(total, 1, atol=1e-8)


def test_sylvester_is_the_papers(rng):
    layer = vb.Sylvester(jax.random.key(0), 5, 3)
    raw_r1, raw_r2 = jnp.asarray(rng.normal(size=(2, 3, 3)))
    layer = eqx.tree_at(lambda b: (b.raw_r1, b.raw_r2), layer, (raw_r1, raw_r2))
    r1, r2 = (
        np.triu(r, 1) + np.diag(np.sqrt(1 - 1e-3) * np.tanh(np.diag(r))) for r in (raw_r1, raw_r2)
    )
    q, x = np.asarray(layer.columns), rng.normal(size=5)
    h = np.tanh(r2 @ q.T @ x + np.asarray(layer.bias))
    jacobian = np.eye(5) + q @ r1 @ np.diag(1 - h**2) @ r2 @ q.T
    y, log_det = layer.forward_and_log_det(x)
    np.testing.assert_allclose(y, x + q @ r1 @ h, rtol=1e-12)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-11)


def test_sylvester_of_rank_one_is_planar(rng):
    layer = vb.Sylvester(jax.random.key(0), 4)
    layer = eqx.tree_at(lambda b: b.raw_r1, layer, -0.7 * jnp.ones((1, 1)))
    q = layer.columns[:, 0]
    r1, r2 = (np.sqrt(1 - 1e-3) * np.tanh(float(r[0, 0])) for r in (layer.raw_r1, layer.raw_r2))
    x = jnp.asarray(rng.normal(size=4))
    same = (r1 * q, jnp.asarray(r1 * r2), r2 * q, layer.bias[0])
    for ours, planar in (
        (layer.forward_and_log_det(x), vk.planar_forward(x, *same)),
        (layer.inverse_and_log_det(x), vk.planar_inverse(x, *same)),
        (layer.push_score(x, -x), vk.planar_push_score(x, -x, *same)),
    ):
        for a, b in zip(ours, planar, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("variant", ["orthogonal", "householder", "triangular"])
def test_sylvester_columns_are_orthonormal(variant, rng):
    layer = vb.Sylvester(jax.random.key(0), 6, 4, variant=variant, num_reflections=3)
    if variant != "triangular":
        basis = jnp.asarray(20 * rng.normal(size=layer.basis.shape))
        layer = eqx.tree_at(lambda b: b.basis, layer, basis)
    np.testing.assert_allclose(layer.columns.T @ layer.columns, np.eye(4), atol=1e-14)
    if variant == "householder":  # the product of the reflections, multiplied out
        product = np.eye(6)
        for v in np.asarray(layer.basis):
            product = product @ (np.eye(6) - 2 * np.outer(v, v) / (v @ v))
        np.testing.assert_allclose(layer.columns, product[:, :4], atol=1e-14)
    with jax.enable_x64(False):
        columns = vb.Sylvester(jax.random.key(0), 6, 4, variant=variant).columns
        np.testing.assert_allclose(columns.T @ columns, np.eye(4), atol=1e-6)


def test_sylvester_in_saturation_stays_invertible():
    """Plain tanh saturates to r1 r2 = -1: at scale 20 in float64, at 5 ... 10 in float32."""
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            layer = vb.Sylvester(jax.random.key(0), 3, 3)
            raw = 20 * jnp.eye(3)
            assert np.prod(np.tanh(np.asarray([20.0, -20.0], dtype))) == -1  # the trap
            layer = eqx.tree_at(lambda b: (b.raw_r1, b.raw_r2), layer, (raw, -raw))
            layer = eqx.tree_at(lambda b: b.bias, layer, 0 * layer.bias)
            log_det = layer.forward_and_log_det(jnp.zeros(3))[1]
            np.testing.assert_allclose(log_det, 3 * np.log(1e-3), rtol=1e-3)


def test_triangular_sylvester_acts_on_the_coordinates_of_its_order():
    layer = vb.Sylvester(jax.random.key(0), 5, 2, variant="triangular", order=np.array([3, 1]))
    layer = eqx.tree_at(lambda b: b.raw_r1, layer, jnp.ones((2, 2)))
    forward = lambda x: layer.forward_and_log_det(x)[0]
    jacobian = np.asarray(jax.jit(jax.jacfwd(forward))(jnp.ones(5)))
    changed = np.abs(jacobian - np.eye(5)) > 1e-6
    assert set(zip(*np.nonzero(changed), strict=True)) == {(3, 3), (3, 1), (1, 1)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 4}, "rank"),
        ({"variant": "round"}, "variant"),
        ({"num_reflections": 0}, "num_reflections"),
        ({"order": [0]}, "order"),
        ({"variant": "triangular", "order": [0, 1]}, "order"),
        ({"variant": "triangular", "rank": 2, "order": [1, 1]}, "order"),
        ({"variant": "triangular", "order": [3]}, "order"),
        ({"variant": "triangular", "order": [0.5]}, "order"),
    ],
)
def test_sylvester_names_bad_arguments(options, match):
    options = {k: np.asarray(v) if k == "order" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=match):
        vb.Sylvester(jax.random.key(0), 3, **options)
