"""The rational-quadratic spline against an independent implementation, and where splines go wrong."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vflow_kernels import spline_forward, spline_inverse

BINS, BOUND, N = 8, 5.0, 400


def _raw(scale, n=N, bins=BINS):
    return jnp.asarray(scale * np.random.default_rng(0).normal(size=(3 * bins - 1, n)))


def _distrax(x, raw):
    """One point. distrax adds the same shift to raw slopes, and ignores the two outer ones."""
    outer = jnp.zeros(1)
    params = jnp.concatenate([raw[: 2 * BINS], outer, raw[2 * BINS :], outer])
    spline = distrax.RationalQuadraticSpline(
        params,
        -BOUND,
        BOUND,
        boundary_slopes="identity",
        min_bin_size=1e-3 * 2 * BOUND,
        min_knot_slope=1e-3,
    )
    return spline.forward_and_log_det(x), spline.inverse_and_log_det(x)


def test_values_inverses_and_derivatives_are_those_of_distrax():
    raw = _raw(1.0)
    x = jnp.asarray(np.random.default_rng(1).uniform(-6, 6, N))

    def curved(f):
        return lambda raw: sum(jnp.sum(jnp.sin(out)) for out in f(raw))

    theirs = lambda raw: [a for pair in jax.vmap(_distrax)(x, raw.T) for a in pair]
    ours = lambda raw: [*spline_forward(x, raw, BOUND), *spline_inverse(x, raw, BOUND)]

    @jax.jit
    def both(raw):
        return [(f(raw), jax.grad(curved(f))(raw)) for f in (theirs, ours)]

    (values, gradient), (own_values, own_gradient) = both(raw)
    for expected, value in zip(values, own_values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-12)
    np.testing.assert_allclose(own_gradient, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_knots_bounds_and_far_points(dtype):
    """At the bounds, at every knot and far out: the identity outside, C1, finite, invertible."""
    with jax.enable_x64(dtype == "float64"):
        eps = float(jnp.finfo(dtype).eps)
        raw = jnp.asarray(_raw(2.0, 1, 4)[:, 0], dtype)
        widths = 2 * BOUND * (1e-3 + (1 - 4e-3) * jax.nn.softmax(raw[:4]))
        knots = np.cumsum(widths)[:3] - BOUND
        points = np.concatenate([knots, [-BOUND, BOUND, 1e4, -1e4, 0.0]])
        step = 64 * eps * BOUND
        x = jnp.asarray(np.stack([points - step, points, points + step]).ravel(), dtype)
        columns = jnp.broadcast_to(raw[:, None], (11, x.size))

        @jax.jit
        def everything(x, columns):
            forward = lambda x, columns: spline_forward(x, columns, BOUND)
            out, pull = jax.vjp(forward, x, columns)
            return out, pull(out), spline_inverse(out[0], columns, BOUND)

        (y, slope), pulled, (back, inverse_slope) = everything(x, columns)
        for leaf in jax.tree.leaves((y, slope, pulled, back)):
            assert leaf.dtype == dtype
            assert np.isfinite(leaf).all()
        outside = np.abs(x) >= BOUND
        np.testing.assert_array_equal(y[outside], x[outside])
        np.testing.assert_array_equal(slope[outside], 0)
        # the slope and the value do not jump
        steep = float(jnp.exp(jnp.max(jnp.abs(slope))))
        curve = np.reshape(slope, (3, -1))[:, :5]
        np.testing.assert_allclose(curve, curve[1][None] * np.ones((3, 1)), atol=1e5 * eps)
        rise = np.diff(np.reshape(y, (3, -1))[:, :5], axis=0)
        assert (rise > 0).all() and (rise < 4 * steep * step).all()
        np.testing.assert_allclose(back, x, atol=100 * steep * eps * BOUND, rtol=10 * eps)
        np.testing.assert_allclose(inverse_slope, -slope, atol=1e5 * eps)


def test_extreme_parameters_stay_monotone_and_finite_in_float32():
    raw = np.random.default_rng(2).normal(size=(23, N)) * np.logspace(0, 6, N)
    with jax.enable_x64(False):
        raw, x = jnp.asarray(raw, jnp.float32), jnp.linspace(-5, 5, N)

        @jax.jit
        def run(x, raw):
            out, pull = jax.vjp(lambda x, raw: spline_forward(x, raw, BOUND), x, raw)
            inverse = lambda x, raw: spline_inverse(x, raw, BOUND)
            back, pull_back = jax.vjp(inverse, x, raw)
            return out, pull(out), back, pull_back(back)

        for leaf in jax.tree.leaves(run(x, raw)):
            assert np.isfinite(leaf).all()


def test_not_a_number_is_not_hidden():
    out = spline_forward(jnp.array([jnp.nan, 1.0]), jnp.full((5, 2), jnp.nan), BOUND)
    assert np.isnan(out[0]).all()
