"""Roots of increasing functions: precision, derivatives, brackets, extreme right-hand sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from vflow_kernels import monotone_root


def _bend(x, args):
    """Increasing, with a slope between a little above zero and 1 + c."""
    c, shift = args
    return x + c * jnp.tanh(x - shift)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_root_to_a_few_ulp(dtype):
    c = np.array([-0.999, -0.5, 0.0, 3.0, 1e4])
    x = np.concatenate([-np.logspace(4, -6, 12), [0.0], np.logspace(-6, 4, 12)])
    c, x = np.broadcast_arrays(c[:, None], x)
    with jax.enable_x64(dtype == "float64"):
        args = (jnp.asarray(c, dtype), jnp.zeros_like(c, dtype))
        y = _bend(jnp.asarray(x, dtype), args)
        known = monotone_root(_bend, args, y, y - jnp.abs(args[0]), y + jnp.abs(args[0]))
        unknown = jax.jit(lambda y: monotone_root(_bend, args, y))(y)
        again = _bend(known, args)
        assert known.dtype == unknown.dtype == dtype
    eps = np.finfo(dtype).eps
    # what rounding y by one ulp does to the root
    slope = 1 + c / np.cosh(np.minimum(np.abs(x), 300)) ** 2
    size = (np.abs(x) + np.abs(y)) / slope + 1e-3
    for root in (known, unknown):
        assert np.max(np.abs(root - x) / size) < 4 * eps
    terms = np.abs(x) + np.abs(c * np.tanh(x))  # which cancel where c is negative
    assert np.max(np.abs(again - y) - 4 * eps * terms) <= 0


def test_against_brentq():
    def f(x, args):
        return x**5 + jnp.exp(x)

    for y in (-300.0, 0.1, 1.0, 1e5):
        expected = scipy.optimize.brentq(lambda x, y=y: x**5 + np.exp(x) - y, -10, 20, xtol=1e-15)
        root = monotone_root(f, None, jnp.asarray(y), start=0.0)
        np.testing.assert_allclose(root, expected, rtol=1e-13, atol=1e-15)


def test_derivatives_of_both_modes_and_orders():
    """sinh: the inverse and its derivatives are known; the parameter moves the root too."""

    def f(x, args):
        return jnp.sinh(args["rate"] * x)

    def root(y, rate):
        return monotone_root(f, {"rate": rate, "count": jnp.arange(2)}, y, -50.0, 50.0)

    exact = lambda y, rate: jnp.arcsinh(y) / rate
    y, rate = jnp.asarray(1.7), jnp.asarray(0.6)
    np.testing.assert_allclose(root(y, rate), exact(y, rate), rtol=1e-15)
    both = (0, 1)
    for derivative in (
        lambda g: jax.grad(g, both),
        lambda g: jax.jacfwd(g, both),
        lambda g: jax.hessian(g, both),
        lambda g: jax.jacfwd(jax.jacfwd(g, both), both),
        lambda g: jax.grad(jax.grad(jax.grad(g))),
    ):
        expected = jax.tree.leaves(derivative(exact)(y, rate))
        for a, b in zip(jax.tree.leaves(derivative(root)(y, rate)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    batch = jax.jit(jax.vmap(jax.grad(root), (0, None)))(jnp.linspace(-5.0, 5.0, 7), rate)
    np.testing.assert_allclose(batch, 1 / (0.6 * np.cosh(np.arcsinh(np.linspace(-5, 5, 7)))))


def test_wrong_guesses_and_brackets_cost_nothing():
    """Neither start nor bracket moves the root; both get a zero derivative."""

    def root(lower, upper, start):
        return monotone_root(_bend, (3.0, 1.0), jnp.asarray(2.0), lower, upper, start)

    reference = root(-10.0, 10.0, None)
    for options in ((-1e8, 1e8, 1e7), (None, 4.0, None), (-2.0, None, -1.0), (None, None, 1e15)):
        np.testing.assert_allclose(root(*options), reference, rtol=4e-16)
    assert jax.grad(root, (0, 1, 2))(-10.0, 10.0, 1.0) == (0, 0, 0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_roots_where_newton_diverges_or_rounding_hides_them(dtype):
    with jax.enable_x64(dtype == "float64"):
        y = jnp.asarray([1e4, -1e4, 1e-4, 0.0], dtype)
        # arctan: Newton from afar runs away; here beyond a quarter million
        root = monotone_root(lambda x, _: jnp.arctan(x) + 1e-6 * x, None, y, -1e11, 1e11)
        value = np.arctan(np.asarray(root, float)) + 1e-6 * np.asarray(root, float)
        np.testing.assert_allclose(value, y, rtol=8 * np.finfo(dtype).eps, atol=1e-12)
        # cancellation: f is exact to eps only, its zero is at zero
        noisy = monotone_root(lambda x, _: jnp.tanh(x + 1) - jnp.tanh(1.0), None, 0 * y, -2.0, 3.0)
        assert np.all(np.abs(noisy) < 4 * np.finfo(dtype).eps)


def test_outside_of_the_range_and_nan():
    y = jnp.asarray([5.0, -5.0, jnp.nan])
    root = monotone_root(lambda x, _: jnp.tanh(x), None, y, -2.0, 3.0)
    np.testing.assert_allclose(root, [3.0, -2.0, np.nan], rtol=1e-15)
    broken = monotone_root(lambda x, _: x * jnp.nan, None, jnp.ones(()), -1.0, 1.0)
    assert np.isnan(broken)


def test_few_evaluations():
    """A smooth function takes Newton's handful of steps, not a bisection."""
    count = []

    def counted(x, args):
        jax.debug.callback(lambda: count.append(1))
        return jnp.sinh(x)

    jax.block_until_ready(monotone_root(counted, None, jnp.asarray(3.0), -10.0, 10.0))
    jax.effects_barrier()
    assert 3 <= len(count) <= 15
