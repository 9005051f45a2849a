"""Student-t and normal bases against scipy, and the derivative in the degrees of freedom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import vflow as vf
from vflow._core import combine, partition
from vflow.distributions import EllipticalStudentT, Normal, StudentT

DF = np.array([1.0, 2.5, 7.0, 1e3, 1e8, np.inf])


def test_log_prob_is_scipys():
    x = np.array([-3.0, 0.0, 0.2, 1.5, 10.0, -2.0])
    expected = scipy.stats.t.logpdf(x[:5], DF[:5]).sum() + scipy.stats.norm.logpdf(x[5])
    np.testing.assert_allclose(StudentT(DF).log_prob(jnp.asarray(x)), expected, rtol=1e-9)
    expected = scipy.stats.norm.logpdf(x).sum()
    np.testing.assert_allclose(Normal(6).log_prob(jnp.asarray(x)), expected, rtol=1e-12)


def test_df_is_kept_and_shaped():
    base = StudentT(DF.reshape(2, 3))
    assert base.shape == (2, 3)
    np.testing.assert_allclose(base.df, DF.reshape(2, 3), rtol=1e-12)
    x, log_q = base.sample_and_log_prob(jax.random.key(0))
    assert x.shape == (2, 3)
    np.testing.assert_allclose(log_q, base.log_prob(x))


def test_infinite_df_has_no_leaf():
    assert jax.tree.leaves(vf.params(StudentT(jnp.array([jnp.inf, jnp.inf]), trainable=True))) == []
    assert jax.tree.leaves(vf.params(StudentT(jnp.array([3.0, jnp.inf])))) == []
    (leaf,) = jax.tree.leaves(vf.params(StudentT(jnp.array([3.0, jnp.inf]), trainable=True)))
    assert leaf.shape == (1,)
    base = StudentT(jnp.array([3.0, jnp.inf]))
    gradient = jax.grad(lambda base: base.log_prob(jnp.ones(2)), allow_int=True)(base)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_df_never_falls_below_its_minimum():
    base = StudentT(jnp.array([1.0, 5.0]), trainable=True)
    low = vf.apply_updates(base, jax.tree.map(lambda r: jnp.full_like(r, -1e4), vf.params(base)))
    np.testing.assert_allclose(low.df, 0.2, rtol=1e-6)
    assert np.isfinite(low.sample(jax.random.key(0))).all()


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-6), ("float32", 2e-3)])
def test_derivative_of_a_draw_in_df_is_the_implicit_one(dtype, rtol):
    """Against central differences of the gamma quantile at the draw's own probability."""
    df = np.array([0.3, 2.5, 7.0, 40.0])

    with jax.enable_x64(dtype == "float64"):
        base = StudentT(jnp.asarray(df, dtype), trainable=True)
        trained, static = partition(base)
        key = jax.random.key(5)

        def draw(trained):
            return combine(trained, static).sample(key)

        x = np.asarray(draw(trained), np.float64)
        by_raw = np.diagonal(jax.jacobian(draw)(trained).raw_df)
        slope = np.asarray(jax.nn.sigmoid(trained.raw_df), np.float64)  # d df / d raw
        derivative = np.asarray(by_raw, np.float64) / slope
        n = np.asarray(jax.random.normal(jax.random.split(key)[0], (4,), dtype), np.float64)
    gamma = (n / x) ** 2 * df / 2
    probability = scipy.special.gammainc(df / 2, gamma)

    def quantile(df):
        return n / np.sqrt(scipy.special.gammaincinv(df / 2, probability) / (df / 2))

    h = 1e-5 * df
    expected = (quantile(df + h) - quantile(df - h)) / (2 * h)
    np.testing.assert_allclose(derivative, expected, rtol=rtol, atol=rtol * 1e-2)


def test_derivative_of_a_moment():
    r"""$E x^2 = \nu/(\nu - 2)$, so its derivative is $-2/(\nu - 2)^2$."""
    df, n = 12.0, 100_000
    keys = jax.random.split(jax.random.key(0), n)

    @jax.jit
    @jax.vmap
    def derivative(key):
        return jax.jvp(lambda df: _at(df).sample(key)[0] ** 2, (jnp.asarray(df),), (jnp.ones(()),))[
            1
        ]

    template = StudentT(jnp.array([df]), trainable=True)

    def _at(df):
        raw = jnp.log(jnp.expm1(df - 0.2)).reshape(1)
        return combine(jax.tree.map(lambda _: raw, partition(template)[0]), partition(template)[1])

    values = np.asarray(derivative(keys))
    error = values.std() / np.sqrt(n)
    expected = -2 / (df - 2) ** 2
    assert error < 0.02 * abs(expected)
    assert abs(values.mean() - expected) < 4.5 * error


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_out_values_and_gradients_are_finite(dtype):
    with jax.enable_x64(dtype == "float64"):
        base = StudentT(jnp.array([0.3, 3.0, 1e6], dtype), trainable=True)
        trained, static = partition(base)
        x = jnp.tile(jnp.array([[0.0], [1e-30], [-1e10], [1e30]], dtype), (1, 3))
        run = jax.value_and_grad(lambda t, x: combine(t, static).log_prob(x), (0, 1))
        for leaf in jax.tree.leaves(jax.vmap(run, (None, 0))(trained, x)):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("df", [[0.2], [jnp.nan], [-1.0], [3.0, 0.0], []])
def test_bad_df_is_refused(df):
    with pytest.raises(ValueError, match="df"):
        StudentT(jnp.array(df))


def test_traced_df_is_refused():
    with pytest.raises(TypeError, match="concrete"):
        jax.jit(lambda df: StudentT(df).log_prob(jnp.zeros(1)))(jnp.ones(1))


@pytest.mark.parametrize("shape", [0, -1, (2, 0), True])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        Normal(shape)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elliptical_is_scipys_and_finite_far_out(dtype):
    x = np.array([[0, 0, 0], [0.3, -2, 1], [1e5, -3e5, 1e4], [3e6, 1, -2e7], [0, -1e19, 1e30]])
    dfs = np.array([0.5, 3.0, 1e4])
    with jax.enable_x64(dtype == "float64"):
        trained, static = partition(EllipticalStudentT(3, np.array(3.0, dtype), trainable=True))
        raw = jax.tree.map(
            lambda _: np.asarray(dfs - 0.2 + np.log(-np.expm1(0.2 - dfs)), dtype), trained
        )
        run = jax.value_and_grad(lambda t, x: combine(t, static).log_prob(x), (0, 1))
        over_points = jax.vmap(run, (None, 0))
        log_q, slopes = jax.jit(jax.vmap(over_points, (0, None)))(raw, np.asarray(x, dtype))
    for leaf in (log_q, *jax.tree.leaves(slopes)):
        assert np.isfinite(leaf).all()
    for df, values in zip(dfs, log_q, strict=True):
        expected = scipy.stats.multivariate_t.logpdf(x[:4], shape=np.eye(3), df=df)
        np.testing.assert_allclose(values[:4], expected, rtol=1e-9 if dtype == "float64" else 1e-4)


@pytest.mark.slow
def test_derivative_of_an_elliptical_draw_is_the_coordinates_one():
    """The same gamma draw for all coordinates: the derivative in df is along the draw."""
    trained, static = partition(EllipticalStudentT(3, 2.5, trainable=True))

    @jax.jit
    def run(trained, key):
        draw = lambda trained: combine(trained, static).sample(key)
        normal = jax.random.normal(jax.random.split(key)[0], (3,))
        one = jax.tree.map(jnp.ones_like, trained)
        return normal, *jax.jvp(draw, (trained,), (one,)), jax.nn.sigmoid(trained.raw_df)

    normal, x, slope, inner = map(np.asarray, run(trained, jax.random.key(0)))
    probability = scipy.special.gammainc(1.25, 1.25 * (normal / x) ** 2)
    np.testing.assert_allclose(probability, probability[0], rtol=1e-12)
    h = 1e-5
    log_x = lambda df: 0.5 * np.log(df / 2 / scipy.special.gammaincinv(df / 2, probability))
    expected = (log_x(2.5 + h) - log_x(2.5 - h)) / (2 * h)
    np.testing.assert_allclose(slope / x / inner, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dim", "df"), [(0, 3.0), (2, 0.1), (2, np.inf), (2, np.nan), (2, [3.0, 4.0])], ids=str
)
def test_bad_elliptical_arguments_are_named(dim, df):
    with pytest.raises(ValueError, match="dim" if dim == 0 else "df"):
        EllipticalStudentT(dim, jnp.asarray(df))
