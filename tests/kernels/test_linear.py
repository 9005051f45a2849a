"""Triangular, LU and low-rank kernels against dense linear algebra in numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import vflow_kernels as vk

DIM, RANK = 7, 3


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def _matrix(rng):
    return (
        np.tril(rng.normal(size=(DIM, DIM)), -1)
        + np.triu(rng.normal(size=(DIM, DIM)), 1)
        + (np.diag(np.exp(rng.normal(size=DIM)) * np.sign(rng.normal(size=DIM))))
    )


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_triangular_kernels_match_dense(rng, lower, unit):
    matrix, x = _matrix(rng), rng.normal(size=DIM)
    dense = np.tril(matrix) if lower else np.triu(matrix)
    if unit:
        np.fill_diagonal(dense, 1.0)
    for transpose, reference in ((False, dense), (True, dense.T)):
        options = {"lower": lower, "unit_diagonal": unit, "transpose": transpose}
        y = vk.triangular_matvec(jnp.asarray(matrix), jnp.asarray(x), **options)
        np.testing.assert_allclose(y, reference @ x, rtol=1e-12, atol=1e-13)
        solution = vk.triangular_solve(jnp.asarray(matrix), jnp.asarray(x), **options)
        expected = scipy.linalg.solve(reference, x)
        np.testing.assert_allclose(solution, expected, rtol=1e-9, atol=1e-12)
    if not unit:
        expected = np.linalg.slogdet(dense)[1]
        np.testing.assert_allclose(vk.triangular_log_det(jnp.asarray(matrix)), expected, rtol=1e-12)


def test_other_triangle_is_never_read(rng):
    matrix = jnp.asarray(np.where(np.tri(DIM), _matrix(rng), np.nan))
    x = jnp.ones(DIM)
    assert np.isfinite(vk.triangular_matvec(matrix, x)).all()
    assert np.isfinite(vk.triangular_solve(matrix, x)).all()


def test_lu_kernels_match_scipy_factors(rng):
    """Factors computed by LAPACK, without pivoting for a diagonally dominant matrix."""
    dense = rng.normal(size=(DIM, DIM)) + 2 * DIM * np.eye(DIM)
    packed, pivots = scipy.linalg.lu_factor(dense.T)
    assert (pivots == np.arange(DIM)).all()
    packed, dense, x = jnp.asarray(packed), dense.T, rng.normal(size=DIM)
    for transpose, reference in ((False, dense), (True, dense.T)):
        y = vk.lu_matvec(packed, jnp.asarray(x), transpose=transpose)
        np.testing.assert_allclose(y, reference @ x, rtol=1e-12)
        solution = vk.lu_solve(packed, jnp.asarray(x), transpose=transpose)
        np.testing.assert_allclose(solution, scipy.linalg.solve(reference, x), rtol=1e-11)
    np.testing.assert_allclose(vk.lu_log_det(packed), np.linalg.slogdet(dense)[1], rtol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_low_rank_kernels_match_dense(rng, scale):
    diagonal = np.exp(rng.normal(size=DIM)) * scale
    left = rng.normal(size=(DIM, RANK)) * scale
    right, x = rng.normal(size=(DIM, RANK)), rng.normal(size=DIM)
    dense = np.diag(diagonal) + left @ right.T
    arrays = [jnp.asarray(a) for a in (diagonal, left, right)]
    np.testing.assert_allclose(vk.low_rank_matvec(*arrays, jnp.asarray(x)), dense @ x, rtol=1e-12)
    solution = vk.low_rank_solve(*arrays, jnp.asarray(x))
    np.testing.assert_allclose(solution, scipy.linalg.solve(dense, x), rtol=1e-10)
    transposed = vk.low_rank_solve(arrays[0], arrays[2], arrays[1], jnp.asarray(x))
    np.testing.assert_allclose(transposed, scipy.linalg.solve(dense.T, x), rtol=1e-10)
    log_det = np.linalg.slogdet(dense / scale)[1] + DIM * np.log(scale)
    np.testing.assert_allclose(vk.low_rank_log_det(*arrays), log_det, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_log_dets_neither_overflow_nor_underflow(dtype):
    """The determinant itself would be 1e-1500 and 1e1500."""
    for exponent in (-30, 30):
        diagonal = jnp.full(50, 10.0**exponent, dtype)
        expected = 50 * exponent * np.log(10.0)
        zeros = jnp.zeros((50, 1), dtype)
        for value in (
            vk.triangular_log_det(jnp.diag(diagonal)),
            vk.lu_log_det(jnp.diag(diagonal)),
            vk.low_rank_log_det(diagonal, zeros, zeros),
        ):
            np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["triangular_solve", "lu_solve"])
def test_batched_solve_is_one_solve_with_many_right_hand_sides(name):
    """Neither a loop over the batch nor a batched factor."""

    def batched(matrix, y):
        return jax.vmap(lambda y: getattr(vk, name)(matrix, y))(y)

    lowered = jax.jit(batched).trace(jnp.eye(5), jnp.ones((16, 5))).lower()
    hlo = lowered.compile().as_text()
    solves = [line for line in hlo.splitlines() if "trsm" in line or "triangular-solve(" in line]
    assert len(solves) == (1 if name == "triangular_solve" else 2)
    assert "while(" not in hlo
    assert not any("[16,5,5]" in line for line in solves)
