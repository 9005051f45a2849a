"""Tail estimators against known indices, and what `tails` says about draws and targets."""

import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from vflow.diagnostics import _tail_estimators as estimators

N = 200_000


@pytest.fixture(scope="module")
def samples():
    """|x| in descending order, for Student-t of several df and a normal."""
    rng = np.random.default_rng(0)
    draws = {df: rng.standard_t(df, N) for df in (1, 2, 5, 30)} | {np.inf: rng.normal(size=N)}
    return {df: np.sort(np.abs(x))[::-1] for df, x in draws.items()}


def test_hill_and_moments_are_their_formulas():
    top = np.array([9.0, 7.0, 4.0, 2.0, 1.0])
    d = [np.log(9 / 2), np.log(7 / 2), np.log(4 / 2)]
    m1, m2 = sum(d) / 3, sum(v * v for v in d) / 3
    np.testing.assert_allclose(estimators.hill(top, 3), m1)
    np.testing.assert_allclose(estimators.moments(top, 3), m1 + 1 - 0.5 / (1 - m1**2 / m2))


@pytest.mark.parametrize("df", [1, 2, 5])
def test_index_of_student_t(samples, df):
    """One over df, not the exponent of the density, which is larger by one."""
    top = samples[df]
    assert abs(estimators.hill(top, 1000) - 1 / df) < 0.1
    assert abs(estimators.moments(top, 1000) - 1 / df) < 0.18
    assert abs(estimators.kernel_estimator(top, N, 5000) - 1 / df) < 0.18
    k = estimators.double_bootstrap(top, np.random.default_rng(1), resamples=100)
    assert abs(estimators.hill(top, k) - 1 / df) < 0.1


@pytest.mark.parametrize("df", [30, np.inf])
def test_moments_and_kernel_tell_light_from_heavy_where_hill_cannot(samples, df):
    top = samples[df]
    assert estimators.hill(top, 1000) > 0.08
    assert estimators.moments(top, 2800) < 0
    assert estimators.kernel_estimator(top, N, 5600) < 0


def test_pareto_is_exact_for_all():
    """An exact power law of index one half has no bias; the three agree within sampling errors."""
    u = (np.arange(N) + 0.5) / N
    top = u**-0.5
    for value in (estimators.hill(top, 5000), estimators.moments(top, 5000)):
        np.testing.assert_allclose(value, 0.5, atol=0.005)
    np.testing.assert_allclose(estimators.kernel_estimator(top, N, 5000), 0.5, atol=0.01)


def test_draws_are_classified_and_df_can_be_passed_on():
    rng = np.random.default_rng(3)
    x = np.stack(
        [rng.standard_t(1, 20_000), rng.normal(size=20_000), 5 + rng.standard_t(2, 20_000)], axis=1
    )
    report = vf.diagnostics.tails(x)
    assert report.heavy.tolist() == [True, False, True]
    np.testing.assert_allclose(1 / report.df, [1, 0, 0.5], atol=0.1)
    assert np.all(report.lower <= report.df) and np.all(report.df <= report.upper)
    assert report.df[1] == np.inf and "flows.heavy_tail" in report.advice
    table = repr(report)
    assert "heavy" in table and "light" in table and "Hill" in table
    assert vf.bijections.SmoothHeavyTail(3, df=report.df).heavy == (0, 2)
    light = vf.diagnostics.tails(rng.normal(size=5000))
    assert "light-tailed flow" in light.advice


def _multivariate_t(df, dim):
    return vf.Target(lambda x: -0.5 * (df + dim) * jnp.log1p(jnp.sum(x**2) / df), dim)


def test_slices_of_a_target_are_not_its_marginals():
    """A slice of a multivariate t falls with slope df + d, its marginal with df + 1."""
    target = _multivariate_t(2.0, 4)
    sliced = vf.diagnostics.tails(target, method="slices")
    np.testing.assert_allclose(sliced.details["slope above"], 6.0, rtol=1e-6)
    assert "not marginals" in sliced.note
    report = vf.diagnostics.tails(target)
    np.testing.assert_allclose(report.df, 2.0, rtol=1e-4)
    assert "Laplace" in report.note


def test_a_diagonal_tail_is_seen_after_integration_only():
    """x_2 given x_1 is normal: along its axis no heavy tail, in its marginal that of x_1."""

    def log_density(x):
        heavy = -0.5 * (1.5 + 1) * jnp.log1p(x[0] ** 2 / 1.5)
        return heavy - 0.5 * (x[1] - x[0]) ** 2 - 0.5 * x[2] ** 2

    target = vf.Target(log_density, 3)
    assert vf.diagnostics.tails(target, method="slices").heavy.tolist() == [False, False, False]
    report = vf.diagnostics.tails(target)
    assert report.heavy.tolist() == [True, True, False]
    np.testing.assert_allclose(report.df[:2], 1.5, rtol=1e-3)


def test_whitened_a_coordinate_that_is_normal_around_a_heavy_one_is_light():
    """The Gaussian at the mode in closed form: precision (df + 1)/df of the t, one of the normal."""
    df, mode = 1.5, np.array([2.0, -1.0])

    def log_density(x):
        x = x - mode
        return -0.5 * (df + 1) * jnp.log1p(x[0] ** 2 / df) - 0.5 * (x[1] - 3 * x[0]) ** 2

    report = vf.diagnostics.tails(vf.Target(log_density, 2), whiten=True)
    np.testing.assert_allclose(report.loc, mode, atol=1e-9)
    sd = np.sqrt(df / (df + 1))
    np.testing.assert_allclose(report.tril, [[sd, 0.0], [3 * sd, 1.0]], atol=1e-9)
    np.testing.assert_allclose(report.df, [df, np.inf], rtol=1e-3)
    assert "loc=report.loc" in report.advice and "at the mode" in repr(report)
    with pytest.raises(ValueError, match="whiten=True"):
        vf.diagnostics.tails(np.arange(500.0), whiten=True)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (np.zeros(50), ValueError, "at least 200"),
        (np.full(500, np.nan), ValueError, "not finite"),
        (np.ones((500, 2)), ValueError, "coordinate 0 is constant"),
        ("text", TypeError, "draws or a target"),
    ],
    ids=["few", "nan", "constant", "text"],
)
def test_bad_data_is_refused(data, error, match):
    with pytest.raises(error, match=match):
        vf.diagnostics.tails(data)


def test_a_target_without_a_mode_is_refused():
    with pytest.raises(ValueError, match="no mode"):
        vf.diagnostics.tails(vf.Target(lambda x: x[0], 1))
    with pytest.raises(ValueError, match="method"):
        vf.diagnostics.tails(_multivariate_t(3.0, 2), method="profile")
