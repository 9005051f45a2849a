"""Linear map by its LU factors."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import lu_matvec, lu_solve

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim


class LULinear(AbstractBijection):
    r"""The affine map $y = LUx + b$: $L$ unit lower, $U$ upper triangular, $U_{ii} > 0$.

    A dense linear map whose log-determinant costs $d$ and whose inverse costs two triangular
    solves. The trained leaves are `bias` ($b$), `log_diagonal` ($\log U_{ii}$) and `factors` ($L$
    strictly below and $U$ strictly above the diagonal of one array). Chain it with `Permute` for
    the $PLU$ of Glow.

    Args:
        dim: number of coordinates.
        key: PRNG key for a random start, strict triangles drawn from $N(0, 0.1^2/d)$; without it
            the map starts at the identity.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> y, log_det = vf.bijections.LULinear(2).forward_and_log_det(jnp.ones(2))
        >>> print(y, log_det)
        [1. 1.] 0.0

    Source:
        Kingma & Dhariwal 2018 (arXiv 1807.03039), section 3.2, without the permutation.
    """

    bias: Array
    log_diagonal: Array
    factors: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None):
        check_dim("LULinear", dim)
        self.bias = jnp.zeros((dim,))
        self.log_diagonal = jnp.zeros((dim,))
        self.factors = (
            jnp.zeros((dim, dim))
            if key is None
            else 0.1 * jax.random.normal(key, (dim, dim)) / dim**0.5
        )
        self.shape = (dim,)
        self.condition_shape = None

    def _packed(self) -> Array:
        strict = self.factors - jnp.diag(jnp.diagonal(self.factors))
        return strict + jnp.diag(jnp.exp(self.log_diagonal))

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(LUx + b, \sum_i \log U_{ii})$."""
        return lu_matvec(self._packed(), x) + self.bias, jnp.sum(self.log_diagonal)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(U^{-1}L^{-1}(y - b), -\sum_i \log U_{ii})$."""
        return lu_solve(self._packed(), y - self.bias), -jnp.sum(self.log_diagonal)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $L^{-\top}U^{-\top}s$: two transposed triangular solves."""
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, lu_solve(self._packed(), score, transpose=True)
