"""Affine map with a lower-triangular matrix."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike
from vflow_kernels import triangular_matvec, triangular_solve

from vflow._core._numerics import as_float
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, check_positive


class TriangularAffine(AbstractBijection):
    r"""The affine map $y = Lx + \mu$ with $L$ lower triangular and a positive diagonal.

    On a standard normal base this is every Gaussian, $N(\mu, LL^\top)$. The trained leaves are
    `loc` ($\mu$), `log_diagonal` ($\log L_{ii}$) and `lower` (the entries of $L$ below the
    diagonal; the rest of that array is never read). It starts at the identity; `from_loc_tril`
    starts elsewhere.

    Args:
        dim: number of coordinates.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> tril = jnp.array([[2.0, 0.0], [1.0, 1.0]])
        >>> affine = vf.bijections.TriangularAffine.from_loc_tril(jnp.zeros(2), tril)
        >>> print(affine.forward_and_log_det(jnp.ones(2))[0])
        [2. 2.]
    """

    loc: Array
    log_diagonal: Array
    lower: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, dim: int):
        check_dim("TriangularAffine", dim)
        self.loc = jnp.zeros((dim,))
        self.log_diagonal = jnp.zeros((dim,))
        self.lower = jnp.zeros((dim, dim))
        self.shape = (dim,)
        self.condition_shape = None

    @classmethod
    def from_loc_tril(cls, loc: ArrayLike, tril: ArrayLike) -> "TriangularAffine":
        r"""The map $y = Lx + \mu$ with the given values, in their dtype.

        Args:
            loc: $\mu$, shape (d,).
            tril: $L$, shape (d, d); entries above the diagonal are ignored.

        Returns:
            The bijection.

        Raises:
            ValueError: shapes that do not fit, or a diagonal that is not positive and finite.

        Example:
            >>> import jax.numpy as jnp, vflow as vf
            >>> vf.bijections.TriangularAffine.from_loc_tril(jnp.zeros(3), jnp.eye(3)).shape
            (3,)
        """
        loc, tril = as_float(loc), as_float(tril)
        if loc.ndim != 1 or tril.shape != 2 * loc.shape:
            raise ValueError(
                "TriangularAffine: loc must have shape (d,) and tril (d, d), "
                f"got {loc.shape} and {tril.shape}."
            )
        diagonal = jnp.diagonal(tril)
        check_positive("TriangularAffine", "the diagonal of tril", diagonal)
        return eqx.tree_at(
            lambda b: (b.loc, b.log_diagonal, b.lower),
            cls(loc.shape[0]),
            (loc, jnp.log(diagonal), jnp.tril(tril, -1)),
        )

    @property
    def tril(self) -> Array:
        """The matrix $L$, shape (d, d)."""
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(Lx + \mu, \sum_i \log L_{ii})$."""
        return triangular_matvec(self.tril, x) + self.loc, jnp.sum(self.log_diagonal)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(L^{-1}(y - \mu), -\sum_i \log L_{ii})$."""
        return triangular_solve(self.tril, y - self.loc), -jnp.sum(self.log_diagonal)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $L^{-\top}s$: one transposed triangular solve."""
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, triangular_solve(self.tril, score, transpose=True)
