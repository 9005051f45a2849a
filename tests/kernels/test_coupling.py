"""The affine coupling transform and its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vflow_kernels as vk


def test_soft_clamp_is_the_papers_formula():
    """Andrade 2024: (2 alpha / pi) atan(s / alpha), alpha = 2 below zero and 0.1 above."""
    raw = np.concatenate([-np.logspace(-6, 12, 37), [0.0], np.logspace(-6, 12, 37)])
    expected = [2 * a / np.pi * np.arctan(s / a) for s in raw for a in [2.0 if s < 0 else 0.1]]
    clamped = vk.soft_clamp(jnp.asarray(raw), -2.0, 0.1)
    np.testing.assert_allclose(clamped, expected, rtol=1e-14)
    assert clamped.min() >= -2.0
    assert clamped.max() <= 0.1
    slope = jax.vmap(jax.grad(lambda s: vk.soft_clamp(s, -2.0, 0.1)))
    np.testing.assert_allclose(slope(jnp.array([-1e-12, 0.0, 1e-12])), 2 / np.pi, rtol=1e-10)
    assert (slope(jnp.asarray(raw)) > 0).all()


def test_soft_clamp_in_float32_is_as_exact_as_the_type():
    """It has an arctangent of its own there: relative error, sign, ends and not-a-number."""
    raw = np.concatenate([np.linspace(-6, 6, 20001), np.logspace(-37, 38, 3001)]).astype(np.float32)
    clamped = np.asarray(vk.soft_clamp(jnp.asarray(raw), -2.0, 2.0), np.float64)
    expected = 4 / np.pi * np.arctan(raw.astype(np.float64) / 2)
    np.testing.assert_allclose(clamped, expected, rtol=4e-7)
    assert (np.diff(clamped[:20001]) >= -3e-7).all()
    ends = vk.soft_clamp(jnp.array([-jnp.inf, jnp.inf, jnp.nan], jnp.float32), -2.0, 2.0)
    np.testing.assert_allclose(ends, [-2.0, 2.0, jnp.nan], rtol=4e-7)
    slope = jax.vmap(jax.grad(lambda s: vk.soft_clamp(s, -2.0, 2.0)))(jnp.asarray(raw[::50]))
    exact = 2 / np.pi / (1 + (raw[::50].astype(np.float64) / 2) ** 2)
    np.testing.assert_allclose(slope, exact, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_coupling_at_extreme_inputs(dtype):
    """Finite and invertible to relative precision over thirty orders of magnitude."""
    x = jnp.array([-1e15, -1.0, -1e-15, 0.0, 1e-15, 1.0, 1e15], dtype)
    raw = jnp.array([1e30, -1e30, 5.0, -5.0, 0.0, 1e30, -1e30], dtype)
    log_scale = vk.soft_clamp(raw, -2.0, 2.0)
    shift = jnp.zeros_like(x)
    y, log_derivative = vk.affine_coupling_forward(x, shift, log_scale)
    back, inverse_log_derivative = vk.affine_coupling_inverse(y, shift, log_scale)
    np.testing.assert_allclose(back, x, rtol=4 * jnp.finfo(dtype).eps)
    assert (log_derivative == -inverse_log_derivative).all()
    assert (jnp.abs(log_derivative) <= 2).all()
    expected = np.asarray(x, np.float64) * np.exp(np.asarray(log_scale, np.float64))
    np.testing.assert_allclose(y, expected, rtol=4 * jnp.finfo(dtype).eps)


def test_push_score_against_a_change_of_variables():
    """y = x exp(s) + m with x ~ N(1, 4): the score of y is that of N(e^s + m, 4 e^2s)."""
    x, shift, log_scale = jnp.array([0.3, -2.0]), jnp.array([1.0, 0.5]), jnp.array([0.7, -1.1])
    y, _ = vk.affine_coupling_forward(x, shift, log_scale)
    score_y, u_shift, u_scale = vk.affine_coupling_push_score(x, -(x - 1) / 4, log_scale)
    expected = -(y - jnp.exp(log_scale) - shift) / (4 * jnp.exp(2 * log_scale))
    np.testing.assert_allclose(score_y, expected, rtol=1e-13)
    # u is minus the derivative of log q(y) in the parameters at fixed y

    def log_q(shift, log_scale):
        x, log_derivative = vk.affine_coupling_inverse(y, shift, log_scale)
        return jnp.sum(-((x - 1) ** 2) / 8 + log_derivative)

    by_shift, by_scale = jax.grad(log_q, (0, 1))(shift, log_scale)
    np.testing.assert_allclose(u_shift, -by_shift, rtol=1e-13)
    np.testing.assert_allclose(u_scale, -by_scale, rtol=1e-13)
