"""Triangular matrices: product, solve, log-determinant."""

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float


def _triangle(matrix: Array, *, lower: bool, unit_diagonal: bool) -> Array:
    strict = jnp.tril(matrix, -1) if lower else jnp.triu(matrix, 1)
    diagonal = jnp.ones_like(jnp.diagonal(matrix)) if unit_diagonal else jnp.diagonal(matrix)
    return strict + jnp.diag(diagonal)


def triangular_matvec(
    matrix: Float[Array, "d d"],
    x: Float[Array, " d"],
    *,
    lower: bool = True,
    unit_diagonal: bool = False,
    transpose: bool = False,
) -> Float[Array, " d"]:
    r"""The product $Lx$ (or $L^\top x$) with one triangle of a matrix.

    Cost: $2d^2$ flops (a dense product: under `jax.vmap` over `x` it becomes one matrix product),
    $d^2$ memory for the masked triangle. The other triangle is never read.

    Args:
        matrix: the triangle, shape (d, d); the rest is ignored.
        x: vector, shape (d,).
        lower: read the lower triangle, else the upper one.
        unit_diagonal: take the diagonal as ones whatever the matrix holds.
        transpose: multiply by the transpose.

    Returns:
        The product, shape (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import triangular_matvec
        >>> print(triangular_matvec(jnp.array([[2.0, 9.0], [1.0, 3.0]]), jnp.array([1.0, 1.0])))
        [2. 4.]
    """
    triangle = _triangle(matrix, lower=lower, unit_diagonal=unit_diagonal)
    return x @ triangle if transpose else triangle @ x


def triangular_solve(
    matrix: Float[Array, "d d"],
    y: Float[Array, " d"],
    *,
    lower: bool = True,
    unit_diagonal: bool = False,
    transpose: bool = False,
) -> Float[Array, " d"]:
    r"""The solution of $Lx = y$ (or $L^\top x = y$) by substitution.

    Cost: $d^2$ flops, $d$ memory. Under `jax.vmap` over `y` alone it stays one solve with many
    right-hand sides. Domain: a non-zero diagonal.

    Args:
        matrix: the triangle, shape (d, d); the rest is ignored.
        y: right-hand side, shape (d,).
        lower: read the lower triangle, else the upper one.
        unit_diagonal: take the diagonal as ones whatever the matrix holds.
        transpose: solve with the transpose.

    Returns:
        The solution, shape (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import triangular_solve
        >>> print(triangular_solve(jnp.array([[2.0, 9.0], [1.0, 3.0]]), jnp.array([2.0, 4.0])))
        [1. 1.]
    """
    return jsl.solve_triangular(
        matrix, y, trans=int(transpose), lower=lower, unit_diagonal=unit_diagonal
    )


def triangular_log_det(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    r"""$\log|\det L| = \sum_i \log|L_{ii}|$ of a triangular matrix, either triangle.

    Cost: $d$ logarithms. Domain: a non-zero diagonal.

    Args:
        matrix: triangular matrix, shape (d, d); only the diagonal is read.

    Returns:
        The log absolute determinant, shape ().

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import triangular_log_det
        >>> print(triangular_log_det(jnp.array([[1.0, 0.0], [5.0, -1.0]])))
        0.0
    """
    return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(matrix))))
