"""A certified bound of the largest singular value."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def spectral_bound(matrix: Float[Array, "n m"], *, num_squarings: int = 6) -> Float[Array, ""]:
    r"""An upper bound of the largest singular value, by repeated squaring of the Gram matrix.

    $$\|W\|_2 \le \big\|(W^\top W)^{2^k}\big\|_F^{\,2^{-(k+1)}} \le r^{\,2^{-(k+2)}}\,\|W\|_2$$

    with $r$ the rank: for 64 and $k = 6$ at most 1.7 % above. No state and no start vector, unlike power
    iteration, which gives a lower bound; smooth, so that derivatives of any order exist.

    Cost: k + 1 products of square matrices of the smaller side.

    Args:
        matrix: $W$.
        num_squarings: $k$.

    Returns:
        The bound.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import spectral_bound
        >>> print(f"{spectral_bound(jnp.diag(jnp.array([3.0, 4.0]))):.4f}")
        4.0000

    Source:
        Delattre, Barthelemy, Araujo & Allauzen 2023 (arXiv 2305.16173), Gram iteration.
    """
    short = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if short else matrix.T @ matrix
    log_size = jnp.zeros_like(gram, shape=())
    for step in range(num_squarings + 1):
        norm = jnp.sqrt(jnp.sum(gram**2) + jnp.finfo(gram.dtype).tiny)
        gram, log_size = gram / norm, log_size + jnp.log(norm)
        if step < num_squarings:
            gram, log_size = gram @ gram, 2 * log_size
    return jnp.exp(log_size * math.ldexp(1.0, -num_squarings - 1))
