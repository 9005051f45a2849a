"""Products of Householder reflections."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow_kernels._triangular import triangular_solve


def householder_matvec(
    vectors: Float[Array, "k d"], x: Float[Array, " d"], *, transpose: bool = False
) -> Float[Array, " d"]:
    r"""The product $Qx$ (or $Q^\top x = Q^{-1}x$) with $Q = H_1\cdots H_k$, a product of reflections.

    $$H_i = I - 2\,\frac{v_i v_i^\top}{\|v_i\|^2}, \qquad Q = I - V^\top T V, \qquad
      T^{-1} = \tfrac12 I + \operatorname{striu}(VV^\top)$$

    with the normalised $v_i$ as the rows of $V$: two products and a triangular solve in place of k
    reflections one after the other. A vector of zeros reflects nothing.

    Cost: $4kd + k^2$ flops; under `jax.vmap` over `x` the $2k^2d$ of $VV^\top$ are paid once.

    Args:
        vectors: $v_1, \dots, v_k$, shape (k, d).
        x: vector, shape (d,).
        transpose: multiply by the transpose, which is the inverse.

    Returns:
        The product, shape (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import householder_matvec
        >>> print(householder_matvec(jnp.ones((1, 2)), jnp.array([1.0, 3.0])))
        [-3. -1.]

    Source:
        Joffrain, Low, Quintana-Orti, van de Geijn & Van Zee 2006, Accumulating Householder
        transformations, revisited, ACM TOMS 32(2).
    """
    squares = jnp.sum(vectors**2, axis=1, keepdims=True)
    rows = vectors / jnp.sqrt(jnp.where(squares > 0, squares, 1))
    inverse = jnp.triu(rows @ rows.T, 1) + 0.5 * jnp.eye(rows.shape[0], dtype=rows.dtype)
    weights = triangular_solve(inverse, rows @ x, lower=False, transpose=transpose)
    return x - weights @ rows
