"""Low-rank plus diagonal covariance of a Gaussian in many dimensions, from gradients alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from vflow.bijections import Affine, Chain, Freeze, Invert, LowRankAffine

_RANK = 64  # directions wider than the diagonal, and as many narrower ones
_LANCZOS = 100  # products with the curvature in a round
_ROUNDS = 8
_PAIRS = 16  # antithetic pairs of draws behind a product
_DIFFERENCE = 1e-4
_IGNORED = 0.03  # |log| of an eigenvalue that is left as it is
_TOLERANCE = 0.5  # nats of the bound, of a round that is not worth another

Density = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class LowRank(NamedTuple):
    r"""The covariance $D (I + U \operatorname{diag}(v) U^\top) D$.

    Attributes:
        scale: the diagonal of $D$, shape (d,).
        directions: $U$, orthonormal columns, shape (d, r).
        values: $v > -1$, shape (r,).
    """

    scale: np.ndarray
    directions: np.ndarray
    values: np.ndarray

    def root(self, z: np.ndarray) -> np.ndarray:
        r"""$D (I + U \operatorname{diag}(\sqrt{1 + v} - 1) U^\top) z$ of rows z, shape (n, d)."""
        inner = (z @ self.directions) * (np.sqrt(1 + self.values) - 1)
        return self.scale * (z + inner @ self.directions.T)

    def transposed(self, z: np.ndarray) -> np.ndarray:
        """The transpose of `root` on rows z."""
        z = self.scale * z
        inner = (z @ self.directions) * (np.sqrt(1 + self.values) - 1)
        return z + inner @ self.directions.T

    def log_det(self) -> float:
        """Half the log determinant of the covariance."""
        return float(np.log(self.scale).sum() + 0.5 * np.log1p(self.values).sum())

    def tril(self) -> np.ndarray:
        """The lower Cholesky factor of the covariance, shape (d, d)."""
        inner = np.eye(len(self.scale)) + (self.directions * self.values) @ self.directions.T
        return self.scale[:, None] * np.linalg.cholesky(inner)

    @classmethod
    def identity(cls, dim: int) -> "LowRank":
        """The covariance of a standard normal."""
        return cls(np.ones(dim), np.zeros((dim, 0)), np.zeros(0))

    def layer(self, loc: np.ndarray, dtype: str) -> Freeze:
        """The affine map that carries the standard normal to this Gaussian; not trained.

        Its structure depends on d alone: unused directions have the factor one.
        """
        factors, rank = np.sqrt(1 + self.values) - 1, min(_RANK, len(self.scale))
        wide, narrow = factors > 0, factors < 0
        # I + V c V^T with c < 0 is the inverse of one with c > 0
        inner = _inflating(self.directions[:, narrow], 1 / (1 + factors[narrow]) - 1, rank, dtype)
        outer = _inflating(self.directions[:, wide], factors[wide], rank, dtype)
        affine = Affine(jnp.asarray(loc, dtype), jnp.asarray(self.scale, dtype))
        return Freeze(Chain([Invert(inner), outer, affine]))


def _inflating(directions: np.ndarray, factors: np.ndarray, rank: int, dtype: str) -> LowRankAffine:
    """I + V diag(c) V^T with c >= 0, as a `LowRankAffine` of the given rank."""
    dim, used = directions.shape
    padded, c = np.zeros((dim, rank)), np.zeros(rank)
    padded[:, :used], c[:used] = directions, factors
    padded[0, used:] = 1.0
    # c = softplus(w + a) - 1/r with a such that w = 0 gives c = 0.
    x = c + 1 / rank
    weights = x + np.log(-np.expm1(-x)) - math.log(math.expm1(1 / rank))
    return eqx.tree_at(
        lambda layer: (layer.directions, layer.weights),
        LowRankAffine(jax.random.key(0), dim, rank),
        (jnp.asarray(padded, dtype), jnp.asarray(weights, dtype)),
    )


def find_low_rank(
    density: Density, loc: np.ndarray, scale: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, LowRank, float]:
    r"""Mean, covariance and bound of a Gaussian with a low-rank plus diagonal covariance.

    A round applies Lanczos' method to the whitened curvature $W = -L^\top E[\nabla^2 \log p] L$, whose
    products with vectors are differences of gradients: it finds the eigenvalues farthest from the rest at
    either end, in which the posterior is narrower or wider than the Gaussian. Their square roots go
    into $L$, the median of the rest into $D$, the mean takes a Newton step, and the next round sees the
    ends that are left.

    Args:
        density: points (n, d) -> values and gradients of the log density, float64.
        loc: mean to start from, shape (d,).
        scale: standard deviations to start from, shape (d,).
        rng: of the draws.

    Source:
        Golub & Van Loan 2013, Matrix Computations, section 10.1 (Lanczos with reorthogonalisation);
        Lin, Schmidt & Khan 2020 (arXiv 2002.10060) for the natural gradient step.
    """
    dim = len(loc)
    root = LowRank.identity(dim)._replace(scale=scale)
    z = rng.standard_normal((_PAIRS, dim))
    z = np.stack([z, -z], axis=1).reshape(-1, dim)
    bound = _bound(density, loc, root, z)
    for _ in range(_ROUNDS):
        points = loc + root.root(z)
        _, grads = density(points)
        bulk, values, vectors = _lanczos(density, points, root, rng)
        wider = _composed(root._replace(scale=root.scale / math.sqrt(bulk)), values, vectors)
        step, best = 1.0, None
        while step > 0.05:
            moved = loc + step * wider.root(wider.transposed(grads.mean(0)[None]))[0]
            reached = _bound(density, moved, wider, z)
            if math.isfinite(reached) and reached > bound:
                best = moved, reached
                break
            step /= 2
        if best is None:
            break
        gain, (loc, bound), root = best[1] - bound, best, wider
        if gain < _TOLERANCE:
            break
    return loc, root, bound


def _bound(density: Density, loc: np.ndarray, root: LowRank, z: np.ndarray) -> float:
    values, _ = density(loc + root.root(z))
    entropy = root.log_det() + 0.5 * len(loc) * (1 + math.log(2 * math.pi))
    return float(values.mean() + entropy) if np.isfinite(values).all() else -math.inf


def _lanczos(
    density: Density, points: np.ndarray, root: LowRank, rng: np.random.Generator
) -> tuple[float, np.ndarray, np.ndarray]:
    """The median eigenvalue of the whitened curvature; those away from it, as multiples; vectors (d, k).

    The squared first components of the small problem's vectors are quadrature weights of the spectrum.
    """
    dim = points.shape[1]

    def product(v):
        shift = _DIFFERENCE * root.root(v[None])
        _, grads = density(np.concatenate([points + shift, points - shift]))
        difference = (grads[: len(points)] - grads[len(points) :]).mean(0) / (2 * _DIFFERENCE)
        return -root.transposed(difference[None])[0]

    basis, alpha, beta = [rng.standard_normal(dim)], [], []
    basis[0] /= np.linalg.norm(basis[0])
    for _ in range(min(dim, _LANCZOS)):
        w = product(basis[-1])
        if not np.isfinite(w).all():
            break
        alpha.append(w @ basis[-1])
        q = np.stack(basis)
        w = w - q.T @ (q @ w)
        w = w - q.T @ (q @ w)  # twice is enough
        beta.append(np.linalg.norm(w))
        if beta[-1] < 1e-6 * max(1.0, max(map(abs, alpha))):
            break
        basis.append(w / beta[-1])
    if not alpha:
        return 1.0, np.zeros(0), np.zeros((dim, 0))
    k = len(alpha)
    values, small = np.linalg.eigh(
        np.diag(alpha) + np.diag(beta[: k - 1], 1) + np.diag(beta[: k - 1], -1)
    )
    residual = beta[k - 1] * np.abs(small[-1]) if len(beta) == k else np.zeros(k)
    below = np.cumsum(small[0] ** 2)
    bulk = max(float(values[np.searchsorted(below, 0.5 * below[-1])]), 1e-3)
    values, residual = values / bulk, residual / bulk
    far = np.abs(np.log(np.maximum(values, 1e-3))) > _IGNORED
    kept = far & (values > 0) & (residual < 0.2 * np.abs(values - 1))
    return bulk, np.maximum(values[kept], 1e-3), np.stack(basis[:k]).T @ small[:, kept]


def _composed(root: LowRank, values: np.ndarray, vectors: np.ndarray) -> LowRank:
    """The covariance with its curvature at `vectors` (in whitened coordinates) brought to one."""
    if not len(values):
        return root
    basis, _ = np.linalg.qr(np.concatenate([root.directions, vectors], axis=1))
    unit = root._replace(scale=np.ones_like(root.scale))
    inner = unit.root(basis.T)  # rows; the root without D is symmetric
    along = inner @ vectors
    inflated = inner @ inner.T + along * (1 / values - 1) @ along.T
    eigenvalues, small = np.linalg.eigh(inflated)
    # eigh sorts: the narrowest come first, the widest last
    places = np.arange(len(eigenvalues))
    kept = np.where(eigenvalues < 1, places < _RANK, places >= len(places) - _RANK)
    return LowRank(root.scale, basis @ small[:, kept], eigenvalues[kept] - 1)
