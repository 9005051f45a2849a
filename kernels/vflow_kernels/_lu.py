"""Packed LU factors: product, solve, log-determinant."""

from jaxtyping import Array, Float

from vflow_kernels._triangular import triangular_log_det, triangular_matvec, triangular_solve


def lu_matvec(
    factors: Float[Array, "d d"], x: Float[Array, " d"], *, transpose: bool = False
) -> Float[Array, " d"]:
    r"""The product $Wx$ (or $W^\top x$) with $W = LU$ given by its packed factors.

    Cost: $4d^2$ flops (two dense products; one matrix product each under `jax.vmap` over `x`).

    Args:
        factors: shape (d, d). Strictly below the diagonal: $L$, whose diagonal is one. On and above
            it: $U$. The layout of LAPACK's getrf, without pivoting.
        x: vector, shape (d,).
        transpose: multiply by $W^\top$.

    Returns:
        The product, shape (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import lu_matvec
        >>> factors = jnp.array([[2.0, 1.0], [3.0, 4.0]])  # W = [[2, 1], [6, 7]]
        >>> print(lu_matvec(factors, jnp.array([1.0, 0.0])))
        [2. 6.]
    """
    if transpose:
        x = triangular_matvec(factors, x, unit_diagonal=True, transpose=True)
        return triangular_matvec(factors, x, lower=False, transpose=True)
    x = triangular_matvec(factors, x, lower=False)
    return triangular_matvec(factors, x, unit_diagonal=True)


def lu_solve(
    factors: Float[Array, "d d"], y: Float[Array, " d"], *, transpose: bool = False
) -> Float[Array, " d"]:
    r"""The solution of $Wx = y$ (or $W^\top x = y$) with $W = LU$ given by its packed factors.

    Cost: $2d^2$ flops: two triangular solves, each one solve with many right-hand sides under
    `jax.vmap` over `y` alone. Domain: a non-zero diagonal of $U$.

    Args:
        factors: packed factors as in `lu_matvec`, shape (d, d).
        y: right-hand side, shape (d,).
        transpose: solve with $W^\top$.

    Returns:
        The solution, shape (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import lu_solve
        >>> print(lu_solve(jnp.array([[2.0, 1.0], [3.0, 4.0]]), jnp.array([2.0, 6.0])))
        [1. 0.]
    """
    if transpose:
        y = triangular_solve(factors, y, lower=False, transpose=True)
        return triangular_solve(factors, y, unit_diagonal=True, transpose=True)
    y = triangular_solve(factors, y, unit_diagonal=True)
    return triangular_solve(factors, y, lower=False)


def lu_log_det(factors: Float[Array, "d d"]) -> Float[Array, ""]:
    r"""$\log|\det LU| = \sum_i \log|U_{ii}|$.

    Cost: $d$ logarithms. Domain: a non-zero diagonal of $U$.

    Args:
        factors: packed factors as in `lu_matvec`, shape (d, d).

    Returns:
        The log absolute determinant, shape ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import lu_log_det
        >>> print(lu_log_det(jnp.array([[1.0, 7.0], [3.0, -1.0]])))
        0.0
    """
    return triangular_log_det(factors)
