"""Linear map that never mixes later groups of coordinates into earlier ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import lu_matvec, lu_solve

from vflow.bijections._bijection import AbstractBijection


class BlockLU(AbstractBijection):
    r"""The affine map $y = Wx + b$ with $W$ block lower triangular in groups of coordinates.

    $$W = \begin{pmatrix} W_1 & 0 \\ W_2 & W_3 \end{pmatrix} = L U, \qquad
      \log|\det W| = \sum_i \log U_{ii}$$

    $L$ is unit lower triangular and $U$ block diagonal, upper triangular in every block, with a
    positive diagonal: every such $W$ whose blocks have an LU decomposition. A group depends on
    itself and on earlier groups, never on later ones, in both directions and exactly, whatever the
    parameters. With the light coordinates first and the heavy ones behind, light marginals stay
    light. Inside a group coordinates mix: each heavy marginal can take the heaviest tail of its
    group. The map starts at the identity.

    Args:
        sizes: the number of coordinates in each group, in order; groups may be empty.
        key: PRNG key for a random start, free entries drawn from $N(0, 0.1^2/d)$; without it the
            map starts at the identity.

    Raises:
        ValueError: sizes that are no non-negative integers, or no coordinate at all.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.BlockLU((2, 1), key=jax.random.key(0))
        >>> matrix = jax.jacfwd(lambda x: layer.forward_and_log_det(x)[0])(jnp.ones(3))
        >>> print(matrix[:2, 2])  # the light coordinates do not see the heavy one
        [0. 0.]

    Source:
        Laszkiewicz, Lederer & Fischer 2022 (arXiv 2206.10311), section 3.2, for two groups.
    """

    bias: Array
    log_diagonal: Array
    factors: Array
    sizes: tuple[int, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, sizes: tuple[int, ...], *, key: PRNGKeyArray | None = None):
        sizes = tuple(sizes)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in sizes) or not any(
            sizes
        ):
            raise ValueError(
                "BlockLU: sizes must be non-negative integers, at least one of them positive, got "
                f"{sizes}."
            )
        dim = sum(sizes)
        self.bias = jnp.zeros((dim,))
        self.log_diagonal = jnp.zeros((dim,))
        self.factors = (
            jnp.zeros((dim, dim))
            if key is None
            else 0.1 * jax.random.normal(key, (dim, dim)) / dim**0.5
        )
        self.sizes = sizes
        self.shape = (dim,)
        self.condition_shape = None

    def _packed(self) -> Array:
        """L strictly below the diagonal, U on and above it; zero where a later group would enter."""
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        row, column = np.indices(self.factors.shape)
        free = (group[row] >= group[column]) & (row != column)
        return jnp.where(free, self.factors, 0) + jnp.diag(jnp.exp(self.log_diagonal))

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
