"""Radial kernels against Bessel functions, at distance zero, and far away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gamma, kv
from vflow_kernels import kernel_expansion, median_lengthscale, radial_kernel

NU = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}
KERNELS = ("rbf", *NU)
# d^2 k / dr^2 at 0 where it exists: -1 for the squared exponential, -nu / (nu - 1) for Matern.
CURVATURE = {"rbf": -1.0, "matern32": -3.0, "matern52": -5 / 3}


def by_definition(r, kernel):
    """Rasmussen & Williams, equations 4.9 and 4.14, with the modified Bessel function."""
    if kernel == "rbf":
        return np.exp(-(r**2) / 2)
    nu = NU[kernel]
    scaled = np.sqrt(2 * nu) * r
    return 2 ** (1 - nu) / gamma(nu) * scaled**nu * kv(nu, scaled)


@pytest.mark.parametrize("kernel", KERNELS)
def test_formula(kernel):
    r = np.array([1e-3, 0.1, 0.7, 1.0, 3.0, 20.0])
    value = radial_kernel(jnp.asarray(r**2), kernel)
    np.testing.assert_allclose(value, by_definition(r, kernel), rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_derivatives_at_distance_zero(kernel):
    """Gradient zero, Hessian -c I as the paper kernel has it; a plain square root gives NaN or 0 there."""

    def at(x):
        return radial_kernel(jnp.sum(x**2), kernel)

    zero = jnp.zeros(2)
    value, gradient, hessian = at(zero), jax.grad(at)(zero), jax.hessian(at)(zero)
    backward = jax.jacrev(jax.jacrev(at))(zero)
    assert value == 1
    np.testing.assert_array_equal(gradient, 0)
    if kernel in CURVATURE:
        np.testing.assert_allclose(hessian, CURVATURE[kernel] * np.eye(2), rtol=1e-14)
        np.testing.assert_allclose(backward, hessian, rtol=1e-14)
        # and it is the limit of what differences say beside zero
        step = 1e-3
        near = [by_definition(abs(r), kernel) for r in (-step, step)]
        np.testing.assert_allclose((sum(near) - 2) / step**2, CURVATURE[kernel], rtol=1e-2)
    else:
        assert np.isfinite(hessian).all() and np.isfinite(backward).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_away_and_close_by(kernel, dtype):
    """Values and gradients of both orders stay finite from 1e-30 to 1e15; far out all is zero."""
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray([0.0, 1e-30, 1e-12, 1e-4, 1e4, 1e10, 1e15], dtype)

        def at(x):
            return radial_kernel(x**2, kernel)

        value, slope = jax.vmap(jax.value_and_grad(at))(x)
        curvature = jax.vmap(jax.grad(jax.grad(at)))(x)
        assert value.dtype == slope.dtype == x.dtype
        for out in (value, slope, curvature):
            assert np.isfinite(out).all()
            np.testing.assert_array_equal(out[-3:], 0)
        np.testing.assert_allclose(value[:3], 1, rtol=1e-6)


def test_expansion_is_the_sum_in_float32_too():
    """Centres far from the origin: scalar products would have no digit left in float32."""
    rng = np.random.default_rng(0)
    centres = 1e3 + rng.normal(size=(6, 3)).astype(np.float32)
    point = centres[0] + np.float32(0.125)
    lengthscale, coefficients = np.array([0.5, 1.0, 2.0]), rng.normal(size=(6, 2))
    expected = sum(
        by_definition(np.linalg.norm((point - w) / lengthscale), "matern52") * a
        for w, a in zip(centres.astype(np.float64), coefficients, strict=True)
    )
    with jax.enable_x64(False):
        arrays = (point, centres, np.log(lengthscale), coefficients)
        arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
        value = kernel_expansion(*arrays, "matern52")
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_median_heuristic():
    points = np.random.default_rng(1).normal(size=(20, 3)) * [1.0, 10.0, 0.0]
    scaled = points[:, :2] / points[:, :2].std(0)
    squared = [np.sum((a - b) ** 2) for i, a in enumerate(scaled) for b in scaled[:i]]
    expected = np.array([*points.std(0)[:2], 1.0]) * np.sqrt(
        np.quantile(squared, 0.5, method="lower") / 2
    )
    np.testing.assert_allclose(median_lengthscale(jnp.asarray(points)), expected, rtol=1e-12)
    # rows that repeat do not shrink it, and nothing to compare leaves 1
    twice = jnp.asarray([[0.0], [0.0], [0.0], [2.0]])
    spread = np.std([0.0, 0.0, 0.0, 2.0])
    np.testing.assert_allclose(median_lengthscale(twice), spread * np.sqrt(0.5 * (2 / spread) ** 2))
    np.testing.assert_array_equal(median_lengthscale(jnp.full((3, 2), 0.1)), 1)


@pytest.mark.optimised
def test_median_heuristic_is_the_same_in_a_loop():
    # There the products of a scaled difference are fused with it, and a point was not its own equal.
    points = jax.random.normal(jax.random.key(0), (3, 4, 1))
    looped = jax.jit(lambda p: jax.lax.map(median_lengthscale, p))(points)
    expected = [median_lengthscale(p) for p in points]
    np.testing.assert_allclose(looped, expected, rtol=1e-12)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of rbf, matern12"):
        radial_kernel(jnp.zeros(()), "cubic")
