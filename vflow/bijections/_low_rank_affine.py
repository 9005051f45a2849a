"""Affine map whose matrix is the identity plus low rank, scaled by rows."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import low_rank_log_det, low_rank_matvec, low_rank_solve

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim


class LowRankAffine(AbstractBijection):
    r"""The affine map $y = D\,(I + V C V^\top)\,x + \mu$ of rank $r$ plus diagonal.

    $D = \operatorname{diag}(e^{\lambda})$; the columns of $V$ have length one; $C$ is diagonal with
    $c_j = \operatorname{softplus}(\gamma_j + a) - 1/r > -1/r$, and $a$ such that $c_j = 0$ at
    $\gamma_j = 0$. Every eigenvalue of $I + VCV^\top$ is then positive: the map is invertible for
    all parameters, contains every covariance $D(I + FF^\top)D$ with $F$ of rank $r$ on a normal
    base, starts at the identity, and has a non-zero gradient there. The trained leaves are `loc`,
    `log_scale` ($\lambda$), `directions` ($V$ before normalisation) and `weights` ($\gamma$).

    Args:
        key: PRNG key for the directions.
        dim: number of coordinates $d$.
        rank: number of directions $r$, from 1 to $d$.

    Raises:
        ValueError: a rank outside 1 to `dim`.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> affine = vf.bijections.LowRankAffine(jax.random.key(0), 3, rank=1)
        >>> print(affine.forward_and_log_det(jnp.ones(3))[0])
        [1. 1. 1.]
    """

    loc: Array
    log_scale: Array
    directions: Array
    weights: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, dim: int, rank: int = 1):
        check_dim("LowRankAffine", dim)
        if not 1 <= rank <= dim:
            raise ValueError(f"LowRankAffine: rank must be between 1 and dim = {dim}, got {rank}.")
        self.loc = jnp.zeros((dim,))
        self.log_scale = jnp.zeros((dim,))
        self.directions = jax.random.normal(key, (dim, rank))
        self.weights = jnp.zeros((rank,))
        self.shape = (dim,)
        self.condition_shape = None

    def _factors(self) -> tuple[Array, Array, Array]:
        """Ones, V C and V: the inner matrix is diag(ones) + (V C) V^T."""
        rank = self.weights.shape[0]
        unit = self.directions / jnp.linalg.norm(self.directions, axis=0, keepdims=True)
        weights = jax.nn.softplus(self.weights + math.log(math.expm1(1 / rank))) - 1 / rank
        return jnp.ones_like(self.loc), unit * weights[None, :], unit

    def _log_det(self) -> Array:
        return jnp.sum(self.log_scale) + low_rank_log_det(*self._factors())

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The map and its log-determinant by the determinant lemma."""
        y = jnp.exp(self.log_scale) * low_rank_matvec(*self._factors(), x) + self.loc
        return y, self._log_det()

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The inverse by the Woodbury identity."""
        scaled = (y - self.loc) * jnp.exp(-self.log_scale)
        return low_rank_solve(*self._factors(), scaled), -self._log_det()

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $D^{-1}(I + VCV^\top)^{-1}s$: the inner matrix is symmetric."""
        y, log_det = self.forward_and_log_det(x)
        score = low_rank_solve(*self._factors(), score) * jnp.exp(-self.log_scale)
        return y, log_det, score
