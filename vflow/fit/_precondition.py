"""A Gaussian fit of the target, in float64: the affine layer in front of every flow."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core import FitError
from vflow._core._compile import jit
from vflow.fit._cover import MAX_DIM, Cover, apart, find_cover
from vflow.fit._dtype import scope
from vflow.fit._lbfgs import climb
from vflow.fit._low_rank import LowRank, find_low_rank
from vflow.targets import Target, site_table
from vflow.targets._preflight import diagnosis

_NUM_STARTS = 4
_NUM_PAIRS = 32  # antithetic pairs of draws behind every expectation
DENSE_LIMIT = 200  # above, the Gaussian is low-rank plus diagonal
_CURVATURE_POINTS = 4096  # gradients spent on one curvature, where 4 pairs a column allow it
_RACE_STEPS = 4
_MAX_STEPS = 60
_TOLERANCE = 0.03  # nats: what the flow finds in its first steps anyway
_NUM_PROBES = 1024  # of the best Gaussian, for what is to be known about the target
_NUM_FRESH = 256  # of a rival, for a bound that is not optimistic
_MOST_MODES = 4
_FAR_BELOW = 20.0  # nats below the best bound at which a rival no longer matters
_UNBOUNDED = 1e12  # nats: no constant that was left out is as large
_DIFFERENCE = 1e-4  # in standard deviations of the current Gaussian


class Mode(NamedTuple):
    """A Gaussian that another start led to, away from the best one.

    Attributes:
        origin: where it was started from.
        elbo: the evidence lower bound that it reached, in nats.
        loc: its mean, shape (dim,).
        tril: lower Cholesky factor of its covariance, shape (dim, dim).
    """

    origin: str
    elbo: float
    loc: np.ndarray
    tril: np.ndarray


class Gaussian(NamedTuple):
    """A Gaussian approximation of a target.

    Attributes:
        loc: its mean, shape (dim,), float64.
        tril: lower Cholesky factor of its covariance, shape (dim, dim), float64.
        elbo: its evidence lower bound on the draws it was fitted to, in nats (a little optimistic).
        origin: where it was started from.
        rivals: the other starts with the bounds they reached; -inf where one broke down.
        cover: weighted draws that cover the target, found from all starts; None where there are none.
        modes: Gaussians from other starts, where they lie far outside this one and each other.
        draws: from it, shape (n, dim), float64.
        log_p: the log density at these draws, shape (n,).
        factors: its covariance, low-rank plus diagonal, above 200 coordinates.
    """

    loc: np.ndarray
    tril: np.ndarray
    elbo: float
    origin: str
    rivals: tuple[tuple[str, float], ...]
    cover: Cover | None = None
    modes: tuple[Mode, ...] = ()
    draws: np.ndarray = np.zeros((0, 0))
    log_p: np.ndarray = np.zeros(0)
    factors: LowRank | None = None

    def gap(self) -> float:
        """About how many nats the target is away: half the variance of its log weights, or inf."""
        white = np.linalg.solve(self.tril, (self.draws - self.loc).T)
        log_w = self.log_p + 0.5 * (white**2).sum(axis=0)
        return float(0.5 * log_w.var()) if len(log_w) and np.isfinite(log_w).all() else math.inf

    def witness(self) -> list[float] | None:
        """Log evidence and its standard error from the cover, where its weights can be trusted."""
        trusted = self.cover is not None and self.cover.trusted
        return [float(x) for x in self.cover.evidence] if trusted else None  # pyright: ignore[reportOptionalMemberAccess]


class _Density:
    """Values and gradients of a log density on batches, in float64 on the host."""

    def __init__(self, target: Target):
        self.dim = target.dim
        self.block = 2 * _NUM_PAIRS
        self.num_blocks = max(1, min(2 * self.dim, 64))
        value_and_grad = jax.value_and_grad(target.log_prob)

        @jit
        def many(points, count):
            """The first `count` blocks of points (num_blocks, block, dim); the rest is zero."""

            def body(i, out):
                value, grad = jax.vmap(value_and_grad)(points[i])
                return out[0].at[i].set(value), out[1].at[i].set(grad)

            empty = jnp.zeros_like(points[..., 0]), jnp.zeros_like(points)
            return jax.lax.fori_loop(0, count, body, empty)

        self._many = many

    def many(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Any number of points (n, dim): one program, one call for up to num_blocks * block."""
        whole = self.num_blocks * self.block
        values, grads = [], []
        for start in range(0, len(x), whole):
            part = x[start : start + whole]
            points = np.empty((whole, self.dim))
            points[: len(part)], points[len(part) :] = part, part[-1]
            value, grad = self._many(
                points.reshape(self.num_blocks, self.block, self.dim), -(-len(part) // self.block)
            )
            values.append(np.asarray(value).reshape(-1)[: len(part)])
            grads.append(np.asarray(grad).reshape(-1, self.dim)[: len(part)])
        return np.concatenate(values), np.concatenate(grads)


def fit_gaussian(target: Target, key: PRNGKeyArray) -> Gaussian:
    """`race`, and the cover of what it found."""
    _, cover = race(target, key)
    return cover()


def race(target: Target, key: PRNGKeyArray) -> tuple[Gaussian, Callable[[], Gaussian]]:
    r"""The best Gaussian approximation of a target found from several starts.

    Each start (the origin and prior draws) is climbed to a mode by L-BFGS; from the Laplace
    approximation there, and from the start itself, natural-gradient steps maximise the ELBO of
    a full-covariance Gaussian $N(\mu, LL^\top)$ over fixed antithetic draws. With
    $W = -L^\top E[\nabla^2 \log p] L$ and the step $\rho$,

    $$A = I + \rho (W - I) + \tfrac{\rho^2}{2} (W - I)^2, \quad
      \Sigma \leftarrow L A^{-1} L^\top, \quad \mu \leftarrow \mu + \rho\, \Sigma\, E[\nabla \log p],$$

    which keeps the covariance positive definite; a step that lowers the bound is halved. $W$
    comes from differences of gradients along the columns of $L$: no Hessian is compiled. The
    candidates race, the worse half dropping out every few steps, until two are left.
    Above 200 coordinates the race is between diagonal Gaussians, with the diagonal of $W$ estimated along
    random signs, and the best gets a low-rank plus diagonal covariance (`find_low_rank`).

    Up to 25 coordinates, a mixture that starts from all these Gaussians, and from the modes that
    a dozen more starts lead to, is adapted to the target. Its weighted draws show mass that the
    best Gaussian, and a flow that grows from it, would miss.

    Args:
        target: the unconstrained log density.
        key: PRNG key of the starts and the draws.

    Returns:
        The Gaussian with the best bound, and a function that returns it with its cover.

    Raises:
        FitError: no start has a finite log density and gradient; with a table by site.

    Source:
        Opper & Archambeau 2009; Lin, Schmidt & Khan 2020 (arXiv 2002.10060), equation 18.
    """
    words = np.asarray(jax.random.key_data(key)).reshape(-1)
    with scope("float64"):
        density = _Density(target)
        starts = _starts(target, density, key, np.random.default_rng([*words, 0]))
        draws = np.random.default_rng([*words, 1]).standard_normal((_NUM_PAIRS, target.dim))
        climber = _Climber(density, draws)
        racers = [
            (name, state)
            for name, loc, tril in _candidates(density, starts[:_NUM_STARTS])
            if (state := climber.start(loc, tril)) is not None
        ]
        if not racers:
            raise FitError(
                "no Gaussian approximation could be started: the log density or its gradient is "
                "not finite around every starting point.\n" + site_table(target, starts[0])
            )
        rivals = []
        while len(racers) > 2:
            racers = [(name, climber.climb(state, _RACE_STEPS)) for name, state in racers]
            racers.sort(key=lambda racer: -racer[1].elbo)
            half = max(2, len(racers) // 2)
            rivals = racers[half:] + rivals
            racers = racers[:half]
        racers = _finish(climber, racers)
        (origin, best), rivals = racers[0], racers[1:] + rivals
        tril, factors = best.dense_tril(), None
        if best.tril.ndim == 1:
            rng = np.random.default_rng([*words, 4])
            loc, factors, _ = find_low_rank(density.many, best.loc, best.tril, rng)
            tril, best = factors.tril(), best._replace(loc=loc)
        white = np.random.default_rng([*words, 2]).standard_normal((_NUM_PROBES, target.dim))
        probes = best.loc + white @ tril.T
        found = Gaussian(
            best.loc,
            tril,
            best.elbo,
            origin,
            tuple((name, state.elbo) for name, state in rivals),
            modes=_modes(density, best, rivals, white[:_NUM_FRESH]),
            draws=probes,
            log_p=density.many(probes)[0],
            factors=factors,
        )
        if factors is not None:  # on fresh draws, less the noise of their length
            log_w = found.log_p + 0.5 * (white**2).sum(axis=1)
            constant = factors.log_det() + 0.5 * target.dim * math.log(2 * math.pi)
            found = found._replace(elbo=float(log_w.mean() + constant))

    def cover() -> Gaussian:
        if target.dim > MAX_DIM:
            return found
        with scope("float64"):
            parts = [(state.loc, state.dense_tril()) for state in (best, *(s for _, s in rivals))]
            others = starts[_NUM_STARTS:]
            for mode in climb(density.many, np.stack(others)) if others else ():
                if apart(mode, parts):
                    parts.append((mode, _curvature_root(density, mode, 1e-2)))
            rng = np.random.default_rng([*words, 3])
            return found._replace(cover=find_cover(lambda x: density.many(x)[0], parts, rng))

    return found, cover


def _finish(climber: "_Climber", racers: list[tuple[str, "_State"]]) -> list[tuple[str, "_State"]]:
    """The finalists at the top; one on the way to where the leader has arrived is left where it is."""
    racers = sorted(racers, key=lambda racer: -racer[1].elbo)
    name, leader = racers[0]
    leader = climber.climb(leader, _MAX_STEPS)
    done = [(name, leader)]
    for name, state in racers[1:]:
        elsewhere = apart(state.loc, [(leader.loc, leader.dense_tril())])
        done.append((name, climber.climb(state, _MAX_STEPS) if elsewhere else state))
    return sorted(done, key=lambda racer: -racer[1].elbo)


def _modes(
    density: _Density, best: "_State", rivals: list[tuple[str, "_State"]], white: np.ndarray
) -> tuple[Mode, ...]:
    """The rivals that lie far outside the best Gaussian and each other, with bounds on fresh draws."""
    parts, modes = [(best.loc, best.dense_tril())], []
    for name, state in sorted(rivals, key=lambda rival: -rival[1].elbo):
        if len(modes) == _MOST_MODES or state.elbo < best.elbo - _FAR_BELOW:
            break
        tril = state.dense_tril()
        if apart(state.loc, parts):
            parts.append((state.loc, tril))
            values = density.many(state.loc + white @ tril.T)[0]
            entropy = np.log(np.diag(tril)).sum() + 0.5 * len(tril) * (1 + math.log(2 * math.pi))
            bound = float(values.mean() + entropy)
            if bound > best.elbo - _FAR_BELOW:
                modes.append(Mode(name, bound, state.loc, tril))
    return tuple(modes)


def _starts(
    target: Target, density: _Density, key: PRNGKeyArray, rng: np.random.Generator
) -> list[np.ndarray]:
    """The origin, draws from the prior and near points, where density and gradient are finite."""
    prior = np.asarray(target.prior_draws(key, 8), np.float64)
    near = rng.uniform(-2.0, 2.0, (8, target.dim))
    # Alternating, so that a prior without a usable draw leaves the near ones, and vice versa.
    points = np.stack([prior, near], axis=1).reshape(-1, target.dim)
    points = np.concatenate([np.zeros((1, target.dim)), points])
    values, grads = density.many(points)
    usable = np.isfinite(values) & np.isfinite(grads).all(axis=1)
    if not usable.any():
        where = f"at any of {len(points)} starting points (the origin, prior draws, uniform draws)"
        raise FitError(diagnosis(target, points[0], where))
    return list(points[usable])


def _candidates(density: _Density, starts: list[np.ndarray]):
    """(name, loc, tril) of the Gaussians to start from."""
    modes = climb(density.many, np.stack(starts))
    for i, (start, mode) in enumerate(zip(starts, modes, strict=True)):
        yield f"Laplace at the mode from start {i}", mode, _curvature_root(density, mode, 1e-2)
        yield f"start {i}", start, _curvature_root(density, start, 1.0)


def _curvature_root(density: _Density, x: np.ndarray, floor: float) -> np.ndarray:
    """A square root of the inverse |curvature| at a point, precisions below `floor` lifted to it.

    Steps of the differences are fixed at 1e-5 here: there is no scale to go by yet.
    """
    dim = len(x)
    if dim > DENSE_LIMIT:
        return np.ones(dim)
    steps = 1e-5 * np.eye(dim)
    _, up = density.many(x + steps)
    _, down = density.many(x - steps)
    hessian = (up - down) / 2e-5
    if not np.isfinite(hessian).all():
        return np.eye(dim)
    values, vectors = np.linalg.eigh(-(hessian + hessian.T) / 2)
    return _triangular(vectors / np.sqrt(np.maximum(np.abs(values), floor)))


def _triangular(root: np.ndarray) -> np.ndarray:
    """The lower Cholesky factor of root @ root.T, without forming it."""
    upper = np.linalg.qr(root.T, mode="r")
    return (upper * np.where(np.diag(upper) < 0, -1.0, 1.0)[:, None]).T  # pyright: ignore[reportAttributeAccessIssue]


class _State(NamedTuple):
    """A Gaussian on its way up, with the density at its draws."""

    loc: np.ndarray
    tril: np.ndarray  # (dim, dim), or (dim,) for a diagonal one
    elbo: float
    points: np.ndarray
    mean_grad: np.ndarray
    step: float

    def dense_tril(self) -> np.ndarray:
        return self.tril if self.tril.ndim == 2 else np.diag(self.tril)


class _Climber:
    """Natural-gradient ascent of the ELBO over fixed standard normal draws and their mirror images.

    Pairs are neighbours, so that the first draws are antithetic too: the curvature uses only as
    many as its budget of gradients allows.
    """

    def __init__(self, density: _Density, draws: np.ndarray):
        self.density = density
        self.draws = np.stack([draws, -draws], axis=1).reshape(-1, density.dim)
        pairs = min(len(draws), max(4, _CURVATURE_POINTS // (4 * density.dim)))
        self.num_curvature = 2 * pairs
        self.tolerance = _TOLERANCE * max(1.0, density.dim / MAX_DIM)
        self.entropy = 0.5 * density.dim * (1 + math.log(2 * math.pi))

    def start(self, loc: np.ndarray, tril: np.ndarray) -> _State | None:
        """The Gaussian itself, shrunk until the density is finite at all of its draws."""
        for shrink in (1.0, 0.3, 0.1, 0.01):
            state = self._evaluate(loc, shrink * tril, 0.5)
            if state is not None:
                return state
        return None

    def _evaluate(self, loc: np.ndarray, tril: np.ndarray, step: float) -> _State | None:
        dense = tril.ndim == 2
        points = loc + (self.draws @ tril.T if dense else self.draws * tril)
        scales = np.diag(tril) if dense else tril
        if not (np.isfinite(points).all() and (scales > 0).all()):
            return None
        values, grads = self.density.many(points)
        if not (np.isfinite(values).all() and np.isfinite(grads).all()):
            return None
        with np.errstate(over="ignore"):  # what grows so far is refused
            elbo = values.mean() + np.log(scales).sum() + self.entropy
        return _State(loc, tril, float(elbo), points, grads.mean(axis=0), step)

    def climb(self, state: _State, num_steps: int) -> _State:
        """At most `num_steps` steps; fewer when the bound stops rising or the density breaks."""
        slow = 0
        for _ in range(num_steps):
            curvature = self._curvature(state)
            if curvature is None:
                return state
            following = self._search(state, curvature)
            if following is None:
                return state
            slow = slow + 1 if following.elbo - state.elbo < self.tolerance else 0
            state = following
            if state.elbo > _UNBOUNDED:
                raise FitError(
                    f"the log density grows without bound, to {state.elbo:.3g} nats where a climb "
                    "was given up: there is no such posterior. Check its sign and the priors."
                )
            if slow == 3:
                return state
        return state

    def _search(self, state: _State, curvature: np.ndarray) -> _State | None:
        step = state.step
        while step > 1e-4:
            following = self._step(state, curvature, step)
            if following is not None and following.elbo > state.elbo - 1e-9:
                return following
            step /= 2
        return None

    def _step(self, state: _State, curvature: np.ndarray, step: float) -> _State | None:
        """Curvature is W - I in whitened coordinates: a matrix, or its diagonal."""
        longer = min(1.0, 1.5 * step)
        if curvature.ndim == 1:
            precision = 1 + step * curvature + 0.5 * step**2 * curvature**2
            tril = state.tril / np.sqrt(precision)
            return self._evaluate(state.loc + step * tril**2 * state.mean_grad, tril, longer)
        with np.errstate(over="ignore", invalid="ignore"):
            precision = np.eye(len(curvature)) + step * curvature
            precision += 0.5 * step**2 * curvature @ curvature
        if not np.isfinite(precision).all():
            return None
        values, vectors = np.linalg.eigh(precision)
        if not (values > 0).all():
            return None
        root = state.tril @ (vectors / np.sqrt(values))
        return self._evaluate(
            state.loc + step * root @ (root.T @ state.mean_grad), _triangular(root), longer
        )

    def _curvature(self, state: _State) -> np.ndarray | None:
        dim = self.density.dim
        if state.tril.ndim == 1:
            signs = np.sign(self.draws)
            shift = _DIFFERENCE * signs * state.tril
            _, up = self.density.many(state.points + shift)
            _, down = self.density.many(state.points - shift)
            second = ((up - down) * signs * state.tril).mean(axis=0) / (2 * _DIFFERENCE)
            return -second - 1 if np.isfinite(second).all() else None
        points = state.points[: self.num_curvature]
        shifts = _DIFFERENCE * state.tril.T[:, None, None] * np.array([1.0, -1.0])[:, None, None]
        _, grads = self.density.many((points + shifts).reshape(-1, dim))
        up, down = grads.reshape(dim, 2, len(points), dim).mean(axis=2).swapaxes(0, 1)
        second = (up - down).T / (2 * _DIFFERENCE)  # E[Hessian] L
        if not np.isfinite(second).all():
            return None
        white = -state.tril.T @ second
        return (white + white.T) / 2 - np.eye(dim)
