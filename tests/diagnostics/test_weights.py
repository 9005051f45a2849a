"""k-hat against the generalised Pareto law and a second library; ESS and evidence in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import vflow as vf
from vflow.diagnostics import ess_fraction, khat, khat_threshold, log_evidence, psis

SHAPES = (0.2, 0.5, 0.8, 1.2)


def _pareto_log_weights(k, n, seed=None):
    """log(1 + x), x generalised Pareto of shape k: the quantiles, or draws in random order."""
    u = (np.arange(n) + 0.5) / n if seed is None else np.random.default_rng(seed).random(n)
    return np.log1p(np.expm1(-k * np.log(u)) / k)


@pytest.mark.parametrize("k", SHAPES)
def test_khat_of_a_pareto_law(k):
    """Exact quantiles: k-hat is k, shrunk to 1/2 by the prior's ten draws, up to discretisation."""
    n = 10_000
    num_tail = 300
    shrunk = (num_tail * k + 10 * 0.5) / (num_tail + 10)
    assert abs(khat(_pareto_log_weights(k, n)) - shrunk) < 0.03
    draws = [khat(_pareto_log_weights(k, n, seed)) for seed in range(20)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - shrunk) < 4.5 * error + 0.02
    # Power: the flipped sign, the published trap, is not accepted.
    assert khat(-_pareto_log_weights(k, n)) < 0.1


def test_khat_is_that_of_a_second_library():
    blackjax = pytest.importorskip("blackjax.diagnostics")
    for k in SHAPES:
        log_w = _pareto_log_weights(k, 2000, seed=7) - 300.0
        log_weights, other = blackjax.psis_weights(jnp.asarray(log_w))
        result = psis(log_w)
        np.testing.assert_allclose(result.khat, other, atol=1e-3)
        if result.khat > 1 / 3:  # below, the other library leaves the tail as it is
            np.testing.assert_allclose(result.log_weights, log_weights, atol=1e-3)


def test_khat_ignores_order_and_scale():
    log_w = _pareto_log_weights(0.5, 1000, seed=1)
    shuffled = np.random.default_rng(0).permutation(log_w)
    np.testing.assert_allclose(khat(shuffled + 1234.5), khat(log_w), rtol=1e-6)


def test_smoothed_weights_keep_order_body_and_sum():
    log_w = _pareto_log_weights(0.8, 1000, seed=3)
    smoothed = np.asarray(psis(log_w).log_weights)
    np.testing.assert_allclose(np.exp(smoothed).sum(), 1.0)
    order = np.argsort(log_w)
    assert (np.diff(smoothed[order]) >= -1e-12).all()
    body = order[:900]
    shift = smoothed[body] - log_w[body]
    np.testing.assert_allclose(shift, shift[0], atol=1e-12)
    assert np.exp(smoothed).max() <= np.exp(log_w - scipy.special.logsumexp(log_w)).max() * 1.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept_and_float32_is_close(dtype):
    log_w = _pareto_log_weights(0.6, 1000, seed=2)
    result = psis(log_w.astype(dtype))
    assert result.log_weights.dtype == dtype
    np.testing.assert_allclose(result.khat, khat(log_w), rtol=1e-4)


def _with(value, count=1):
    log_w = _pareto_log_weights(0.3, 400, seed=4)
    log_w[:count] = value
    return log_w


@pytest.mark.parametrize(
    ("log_w", "match"),
    [
        (_with(np.nan), "1 are NaN and 0 are infinite"),
        (_with(np.inf, 3), "0 are NaN and 3 are infinite"),
        (np.full(400, -np.inf), "no draw lies in the support"),
        (np.full(400, np.nan), "400 are NaN"),
        (-30.0 * np.arange(400.0), "too few draws carry weight"),
        (_with(-np.inf, 397), "too few draws carry weight"),
    ],
)
def test_weights_that_cannot_be_trusted_have_infinite_khat(log_w, match):
    result = psis(log_w)
    assert result.khat == np.inf
    assert match in result.reason
    assert not np.isnan(result.log_weights).any()
    assert not np.exp(result.log_weights)[~np.isfinite(log_w)].any()


def test_draws_of_weight_zero_are_counted():
    result = psis(_with(-np.inf, 5))
    assert result.num_zero == 5
    assert result.reason is None
    assert 0 < result.khat < 0.7
    np.testing.assert_array_equal(result.log_weights[:5], -np.inf)


@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-5])
def test_equal_weights_have_khat_zero(noise):
    log_w = 7.0 + noise * np.random.default_rng(0).normal(size=1000)
    result = psis(log_w)
    assert result.khat == 0.0
    np.testing.assert_allclose(np.exp(result.log_weights), 1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(), (24,), (100, 2)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="log_w"):
        psis(np.zeros(shape))


def test_tracers_are_refused_by_name():
    for function in (khat, log_evidence):
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(lambda w, f=function: f(w))(jnp.zeros(100))


def test_threshold():
    assert khat_threshold(100) == 0.5
    assert khat_threshold(10_000) == 0.7
    np.testing.assert_allclose(khat_threshold(1000), 2 / 3)
    with pytest.raises(ValueError, match="n must"):
        khat_threshold(1)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([2.0, 2.0, 2.0], 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 2.0, 3.0], 36 / (3 * 14)),
        ([0.0, 0.0], 0.0),
    ],
)
def test_ess_fraction(weights, expected):
    with np.errstate(divide="ignore"):
        log_w = jnp.asarray(np.log(weights))
    for shift in (0.0, 1e4, -1e4):
        np.testing.assert_allclose(jax.jit(ess_fraction)(log_w + shift), expected, rtol=1e-12)


def test_ess_fraction_shows_nan():
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(ess_fraction(jnp.array([0.0, bad])))
    with pytest.raises(ValueError, match="log_w"):
        ess_fraction(jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="log_w"):
        ess_fraction(jnp.zeros(0))


def test_log_evidence_of_log_normal_weights():
    """log E w = s^2 / 2; the standard error covers, and shrinks as it should."""
    s, n = 0.5, 2000
    rng = np.random.default_rng(0)
    estimates = [log_evidence(s * rng.normal(size=n)) for _ in range(300)]
    values = np.array([e.value for e in estimates])
    errors = np.array([e.standard_error for e in estimates])
    exact = np.sqrt(np.expm1(s**2) / n)
    np.testing.assert_allclose(errors.mean(), exact, rtol=0.02)
    np.testing.assert_allclose(values.std(), exact, rtol=0.15)
    z = (values - s**2 / 2) / errors
    assert abs(z.mean()) < 4.5 / np.sqrt(300)
    assert 0.9 < (np.abs(z) < 1.96).mean() < 0.99


def test_log_evidence_formula_and_shift():
    weights = np.array([1.0, 2.0, 3.0])
    for shift in (0.0, 1e3, -1e3):
        estimate = log_evidence(jnp.asarray(np.log(weights) + shift))
        np.testing.assert_allclose(estimate.value, np.log(2.0) + shift, rtol=1e-12)
        np.testing.assert_allclose(estimate.standard_error, 1 / (np.sqrt(3) * 2), rtol=1e-9)


def test_log_evidence_edges():
    for bad in (np.nan, np.inf):
        estimate = log_evidence(np.array([0.0, bad]))
        assert not np.isfinite(estimate.value)
        assert np.isnan(estimate.standard_error)
    assert log_evidence(np.array([-np.inf, -np.inf])) == vf.Estimate(-np.inf, np.inf)
    with pytest.raises(ValueError, match="at least 2"):
        log_evidence(np.zeros(1))
