"""Log densities against scipy, their derivatives, and the ends of the floating-point range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import vflow_kernels as vk

X = np.array([0.0, 1e-30, -1e-3, 0.5, -1.0, 3.0, 10.0, -1e3, 1e10, 1e30])
DF = np.array([1e-3, 0.1, 0.5, 1.0, 2.5, 5.0, 15.0, 29.9, 30.1, 50.0, 1e3])
GRID_X, GRID_DF = (a.ravel() for a in np.meshgrid(X, DF))

EPS = {jnp.float32: 1.2e-7, jnp.float64: 2.3e-16}
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@jax.jit
def _value_and_grads(x, df):
    """Value, d/dx, d/d df, elementwise; one compiled function for the whole module."""
    return jax.vmap(lambda x, df: (vk.student_t_log_density(x, df), *_slopes(x, df)))(x, df)


def _slopes(x, df):
    return jax.grad(vk.student_t_log_density, (0, 1))(x, df)


def _student_t(x, df):
    """The textbook formula with log1p(x^2/df) kept in range."""
    with np.errstate(over="ignore", divide="ignore"):
        t = np.abs(x) / np.sqrt(df)
        log1p = np.where(t > 1e8, 2 * np.log(t), np.log1p(t**2))
    half = scipy.special.gammaln((df + 1) / 2) - scipy.special.gammaln(df / 2)
    return half - 0.5 * np.log(df * np.pi) - (df + 1) / 2 * log1p


def _student_t_df_slope(x, df):
    """The derivative in df, with digammas."""
    u = (x / np.sqrt(df)) ** 2
    digammas = scipy.special.digamma((df + 1) / 2) - scipy.special.digamma(df / 2)
    return 0.5 * (digammas - 1 / df - np.log1p(u) + (df + 1) / df * u / (1 + u))


@dtypes
def test_student_t_matches_the_formula(dtype):
    value, by_x, by_df = _value_and_grads(jnp.asarray(GRID_X, dtype), jnp.asarray(GRID_DF, dtype))
    assert value.dtype == by_x.dtype == by_df.dtype == dtype
    # the inputs as the kernel saw them
    x, df = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (GRID_X, GRID_DF))
    reference = _student_t(x, df)
    np.testing.assert_allclose(value, reference, rtol=20 * EPS[dtype], atol=20 * EPS[dtype] + 1e-12)
    np.testing.assert_allclose(
        by_x, -(df + 1) * (x / df) / (1 + (x / np.sqrt(df)) ** 2), rtol=20 * EPS[dtype]
    )
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-7
    np.testing.assert_allclose(by_df, _student_t_df_slope(x, df), rtol=tolerance)


def test_textbook_formula_is_scipys():
    """So that the oracle above is not of our own making where scipy is in range."""
    inside = np.abs(GRID_X) < 1e9
    x, df = GRID_X[inside], GRID_DF[inside]
    np.testing.assert_allclose(_student_t(x, df), scipy.stats.t.logpdf(x, df), rtol=1e-11)


@dtypes
@pytest.mark.parametrize("df", [1e4, 1e7, 1e12, 1e30])
def test_student_t_with_large_df(dtype, df):
    """log t = log N + (x^4 - 2 x^2 - 1) / (4 df) + O(1 / df^2); log-gammas would cancel."""
    x = jnp.array([0.0, 0.5, -1.0, 3.0], dtype)
    value, by_x, by_df = _value_and_grads(x, jnp.full(4, df, dtype))
    x = np.asarray(x, np.float64)
    reference = scipy.stats.norm.logpdf(x) + (x**4 - 2 * x**2 - 1) / (4 * df)
    np.testing.assert_allclose(value, reference, rtol=4 * EPS[dtype], atol=300 / df**2)
    np.testing.assert_allclose(by_x, -x, rtol=40 / df + 4 * EPS[dtype])
    slope = -(x**4 - 2 * x**2 - 1) / (4 * df**2)
    np.testing.assert_allclose(by_df, slope, atol=1000 / df**3 + 10 * EPS[dtype] / df)
    # at the centre nothing cancels: the slope is 1 / (4 df^2) to full precision
    np.testing.assert_allclose(by_df[0], 1 / (4 * df**2), rtol=1e-5, atol=1e-37)


@dtypes
def test_infinite_df_is_the_normal(dtype):
    x = jnp.array([0.0, 1.0, -30.0, 1e10], dtype)
    value, by_x, by_df = _value_and_grads(x, jnp.full(4, jnp.inf, dtype))
    np.testing.assert_array_equal(value, vk.standard_normal_log_density(x))
    np.testing.assert_array_equal(by_x, -x)
    np.testing.assert_array_equal(by_df, 0)


@dtypes
def test_standard_normal_matches_scipy(dtype):
    x = jnp.array([0.0, 1e-30, -1.0, 37.0, 1e9, -1e18], dtype)
    expected = scipy.stats.norm.logpdf(np.asarray(x, np.float64))
    np.testing.assert_allclose(vk.standard_normal_log_density(x), expected, rtol=4 * EPS[dtype])
    np.testing.assert_array_equal(jax.vmap(jax.grad(vk.standard_normal_log_density))(x), -x)


def test_nan_is_not_silent():
    value, _, _ = _value_and_grads(jnp.array([jnp.nan, 0.0]), jnp.array([3.0, jnp.nan]))
    assert np.isnan(value).all()
