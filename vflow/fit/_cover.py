"""A mixture that covers a target: a witness of mass that a fit has missed, and draws to start from."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp
from scipy.stats import chi2

from vflow._core import Estimate
from vflow.diagnostics import log_evidence, psis

MAX_DIM = 25  # above, importance weights of a mixture found in this way say nothing
_ROUNDS = 20
_NUM_DRAWS = 1024  # of a round
_NUM_FRESH = 4096  # of the last mixture
_NUM_PARTS = 16
_EM_STEPS = 8
_EM_POINTS = 4096  # more are thinned
_PSEUDO = 0.3  # of a point, by which the covariance of a part is shrunk to the mean of all
_ENOUGH = 0.3  # effective fraction of the draws of two rounds in a row that ends them
_TRUSTED = 0.05  # effective fraction of the fresh draws
_DF = 5.0  # of the Student-t components that are drawn from
_DEFENSIVE = 0.1  # share of the draws from one wide component
_FAR = 1e-4  # of the mass of a Gaussian lies farther out than what counts as outside
_TEMPERED = 0.1  # weights are flattened to at least this effective fraction while parts are moved


class Cover(NamedTuple):
    """Weighted draws that cover a target.

    Attributes:
        points: fresh draws of the last mixture, shape (n, dim), float64.
        log_weights: log p - log q of each, shape (n,).
        evidence: the importance sampling estimate of log Z from them.
        trusted: whether their weights can be relied upon: k-hat and effective sample size.
    """

    points: np.ndarray
    log_weights: np.ndarray
    evidence: Estimate
    trusted: bool

    def weights(self) -> np.ndarray:
        """Normalised, shape (n,)."""
        return np.exp(self.log_weights - logsumexp(self.log_weights))

    def resample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` draws in proportion to the weights, shape (n, dim)."""
        return self.points[rng.choice(len(self.points), n, p=self.weights())]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (dim,) and lower Cholesky factor of the covariance (dim, dim) of the target."""
        weights = self.weights()
        loc = weights @ self.points
        shifted = self.points - loc
        return loc, np.linalg.cholesky((weights * shifted.T) @ shifted)

    def outside(self, loc: np.ndarray, tril: np.ndarray) -> float:
        """The share of the target's mass where a Gaussian has its outermost 1e-4."""
        white = np.linalg.solve(tril, (self.points - loc).T)
        far = (white**2).sum(axis=0) > chi2.isf(_FAR, len(loc))
        return float(self.weights()[far].sum())


class _Mixture(NamedTuple):
    log_shares: np.ndarray  # (k,)
    locs: np.ndarray  # (k, dim)
    trils: np.ndarray  # (k, dim, dim)

    def squares(self, x: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distances, shape (n, k)."""
        white = [np.linalg.solve(t, (x - m).T) for m, t in zip(self.locs, self.trils, strict=True)]
        return np.stack([(z**2).sum(axis=0) for z in white], axis=1)

    def _log_scales(self) -> np.ndarray:
        return np.log(np.diagonal(self.trils, axis1=1, axis2=2)).sum(axis=1)

    def normal(self, x: np.ndarray) -> np.ndarray:
        """Log density of each normal part times its share, shape (n, k)."""
        dim = x.shape[1]
        const = self.log_shares - self._log_scales() - 0.5 * dim * math.log(2 * math.pi)
        return const - 0.5 * self.squares(x)

    def student(self, x: np.ndarray) -> np.ndarray:
        """Log density of the mixture with Student-t parts, shape (n,)."""
        dim = x.shape[1]
        const = gammaln((_DF + dim) / 2) - gammaln(_DF / 2) - 0.5 * dim * math.log(_DF * math.pi)
        parts = const - self._log_scales() - (_DF + dim) / 2 * np.log1p(self.squares(x) / _DF)
        return np.asarray(logsumexp(self.log_shares + parts, axis=1))

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Student-t draws, shape (n, dim)."""
        part = rng.choice(len(self.locs), n, p=np.exp(self.log_shares))
        noise = rng.standard_normal((n, self.locs.shape[1]))
        noise /= np.sqrt(rng.chisquare(_DF, n) / _DF)[:, None]
        return self.locs[part] + np.einsum("nij,nj->ni", self.trils[part], noise)


def effective_fraction(log_w: np.ndarray) -> float:
    """The effective fraction of draws with these log weights; 0 where none has any."""
    if np.isneginf(log_w).all():
        return 0.0
    w = np.exp(log_w - log_w.max())
    return float(w.sum() ** 2 / (w**2).sum() / w.size)


def apart(x: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether a point (dim,) lies far outside every one of the Gaussians."""
    squares = [np.sum(np.linalg.solve(tril, x - loc) ** 2) for loc, tril in parts]
    return bool(min(squares) > chi2.isf(_FAR, len(x)))


def find_cover(
    log_prob: Callable[[np.ndarray], np.ndarray],
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
) -> Cover | None:
    r"""Fit a mixture to a target by adaptive importance sampling, and draw from it.

    From Gaussians found from different starts, in rounds: draw from the mixture so far (with
    Student-t parts and a wide one besides), weight all draws so far by $p / \bar q$, with $\bar q$
    the mean of the proposals, and fit a Gaussian mixture to the weighted draws by EM. The
    evidence comes from fresh draws of the last mixture: unbiased for $Z$, too low by chance or where
    the mixture too misses something, but hardly ever too high. All is done in the coordinates that
    whiten the first Gaussian.

    Args:
        log_prob: of points (n, dim), shape (n,), in float64.
        parts: mean and lower Cholesky factor of each Gaussian to start from, the best one first.
        rng: the source of randomness.

    Returns:
        The cover; None where no draw has a weight, or the draws span no volume.

    Source:
        Cappe, Douc, Guillin, Marin & Robert 2008 (arXiv 0710.4242); Cornuet, Marin, Mira & Robert
        2012 (arXiv 0907.1254).
    """
    origin, scale = parts[0]
    volume = float(np.log(np.diag(scale)).sum())

    def density(white: np.ndarray) -> np.ndarray:
        log_p = log_prob(origin + white @ scale.T) + volume
        return np.where(np.isfinite(log_p), log_p, -np.inf)  # the unknown carries nothing

    try:
        found = _adapt(density, _whitened(parts), rng)
    except np.linalg.LinAlgError:
        return None
    if found is None:
        return None
    white, log_weights = found
    smoothed, fraction = psis(log_weights), effective_fraction(log_weights)
    trusted = smoothed.reason is None and smoothed.khat < smoothed.threshold
    trusted = bool(trusted and fraction > _TRUSTED)
    return Cover(origin + white @ scale.T, log_weights, log_evidence(log_weights), trusted)


def _whitened(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Mixture:
    """The Gaussians with equal shares, in the coordinates that whiten the first."""
    origin, scale = parts[0]
    locs = np.stack([np.linalg.solve(scale, loc - origin) for loc, _ in parts])
    trils = np.stack([np.linalg.solve(scale, tril) for _, tril in parts])
    return _Mixture(np.full(len(locs), -math.log(len(locs))), locs, trils)


def _adapt(
    density: Callable[[np.ndarray], np.ndarray], mixture: _Mixture, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Fresh draws of the last mixture and their log weights."""
    used: list[_Mixture] = []
    points, log_p, log_q = np.zeros((0, mixture.locs.shape[1])), np.zeros(0), np.zeros(0)
    good = 0  # rounds in a row
    for _ in range(_ROUNDS):
        used.append(mixture)
        fresh = mixture.draw(rng, _NUM_DRAWS)
        log_q = np.logaddexp(log_q, mixture.student(points))  # log of the sum over proposals
        of_fresh = np.asarray(logsumexp([m.student(fresh) for m in used], axis=0))
        points = np.concatenate([points, fresh])
        log_p = np.concatenate([log_p, density(fresh)])
        log_q = np.concatenate([log_q, of_fresh])
        weights = _tempered(log_p - log_q)
        if weights is None:
            return None
        mixture = _fit(points, weights, rng)
        done = effective_fraction((log_p - log_q)[-_NUM_DRAWS:]) > _ENOUGH
        good = good + 1 if done else 0
        if good == 2:
            break
    points = mixture.draw(rng, _NUM_FRESH)
    log_weights = density(points) - mixture.student(points)
    return None if np.isneginf(log_weights).all() else (points, log_weights)


def _tempered(log_w: np.ndarray) -> np.ndarray | None:
    """Normalised weights to the largest power at which enough draws carry them."""
    if np.isneginf(log_w).all():
        return None
    rises = np.maximum(log_w - log_w.max(), -1e8)  # 0 times -inf is NaN

    def normalised(power: float) -> np.ndarray:
        w = np.exp(power * rises)
        return w / w.sum()

    low, high = 0.0, 1.0
    middle = 1.0
    for _ in range(20):
        if 1 / (normalised(middle) ** 2).sum() >= _TEMPERED * _NUM_DRAWS:
            low = middle
        else:
            high = middle
        if low == high:
            break
        middle = (low + high) / 2
    return normalised(low)


def _fit(x: np.ndarray, w: np.ndarray, rng: np.random.Generator) -> _Mixture:
    """A Gaussian mixture of weighted points by EM, and a wide part beside it."""
    dim = x.shape[1]
    size = 1 / (w**2).sum()  # what the weighted points are worth
    loc = w @ x
    cov = (w * (x - loc).T) @ (x - loc)
    cov += 1e-10 * np.trace(cov) / dim * np.eye(dim)
    whole = np.linalg.cholesky(cov)
    if len(x) > _EM_POINTS:
        x = x[rng.choice(len(x), _EM_POINTS, p=w)]
        w = np.full(_EM_POINTS, 1 / _EM_POINTS)
    locs = _spread_out(x, w, whole, min(_NUM_PARTS, 1 + int(size / (dim * (dim + 3)))), rng)
    k = len(locs)
    mixture = _Mixture(np.full(k, -math.log(k)), locs, np.stack([whole * k ** (-1 / dim)] * k))
    for _ in range(_EM_STEPS):
        joint = mixture.normal(x)
        r = w[:, None] * np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        share = r.sum(axis=0) + 1e-12
        locs = (r.T @ x) / share[:, None]
        spread = np.stack([(r[:, j] * (x - m).T) @ (x - m) for j, m in enumerate(locs)])
        within = spread.sum(axis=0)
        weight = _PSEUDO / size
        covs = (spread + weight * within) / (share + weight)[:, None, None]
        covs += 1e-9 * np.trace(within) / dim * np.eye(dim)
        mixture = _Mixture(np.log(share / share.sum()), locs, np.linalg.cholesky(covs))
    shares = np.append(mixture.log_shares + math.log1p(-_DEFENSIVE), math.log(_DEFENSIVE))
    return _Mixture(
        shares,
        np.concatenate([mixture.locs, loc[None]]),
        np.concatenate([mixture.trils, 2.0 * whole[None]]),
    )


def _spread_out(
    x: np.ndarray, w: np.ndarray, whole: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Points far apart, in proportion to weight times squared distance to the nearest so far."""
    white = np.linalg.solve(whole, x.T).T
    chosen = [rng.choice(len(x), p=w)]
    nearest = np.full(len(x), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, ((white - white[chosen[-1]]) ** 2).sum(axis=1))
        p = w * nearest
        if not p.sum() > 0:
            break
        chosen.append(rng.choice(len(x), p=p / p.sum()))
    return x[chosen]
