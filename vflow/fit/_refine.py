"""Markov chains that start from a fit and end in the posterior."""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from scipy.stats import norm, rankdata

from vflow._core._compile import filter_jit_long
from vflow.bijections import Chain, TriangularAffine
from vflow.distributions import Flow
from vflow.fit._dtype import cast, scope
from vflow.fit._recipe import default_flow
from vflow.fit._refine_kernels import Kernel, independent, neutra
from vflow.fit._warm_start import likelihood_ascent
from vflow.targets import Target

METHODS = ("auto", "neutra", "imh")
# Weights at least this even make independent proposals mix in a few iterations.
_EVEN = 0.02
_LIGHT = 0.7
_RHAT = 1.01
_HOPELESS = 1.1  # R-hat of a first piece of chains that are not carried on
_DIVERGENT = 0.01  # share of the transitions above which corners are not reached
_MOVED = 0.05  # sds by which means, or logs of sds, of two rounds differ that do not agree
_FEWEST = 4  # draws of a chain that R-hat can be computed from
_PIECE = 250  # iterations of a chain between two looks, at least
_ROWS = 10  # draws per coordinate that a map is learned from, at least
_UNSETTLED = (
    "{} transitions diverged, and draws still moved by 0.05 sd from round to round after {} of them: "
    "there may be a corner of the posterior that chains do not get into; a larger num_rounds helps."
)


class Refined(NamedTuple):
    """Draws of Markov chains that were started from a fit.

    Attributes:
        draws: site -> array of shape (num_samples, *site shape), chain after chain.
        method: "neutra" or "imh".
        rhat: the largest R-hat of the unconstrained coordinates (rank-normalised, split).
        ess: the smallest bulk effective sample size, of the chains before they are thinned.
        acceptance: mean acceptance rate: of NUTS trajectories, or the share of iterations of "imh" that
            took a fresh proposal.
        divergences: divergent transitions of NUTS.
        rounds: how many it took; more than one means maps learned from draws, or longer chains.
        warnings: why the draws are not to be trusted, one sentence each.
        seconds: wall time.
    """

    draws: dict[str, Array]
    method: str
    rhat: float
    ess: float
    acceptance: float
    divergences: int
    rounds: int
    warnings: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        count = len(next(iter(self.draws.values())))
        lines = [
            f"{count} draws by {self.method}: R-hat {self.rhat:.3f}, effective size {self.ess:.0f}, "
            f"acceptance {self.acceptance:.2f}, {self.divergences} divergences, "
            f"rounds: {self.rounds}, {self.seconds:.1f} s"
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def choose_method(method: str, flow: Any, ess_fraction: float, khat: float) -> str:
    """The rule behind "auto".

    Independent proposals cross between modes and mix at once where the weights are even and their tail
    is light (a point of huge weight is not left for long); elsewhere chains on the density pulled
    back through the flow are more robust, but stay in their mode.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    if method == "neutra" and not isinstance(flow, Flow):
        raise ValueError(
            f'method="neutra" pulls the density back through a flow, and this family is a '
            f'{type(flow).__name__}: use "imh".'
        )
    if method != "auto":
        return method
    even = ess_fraction >= _EVEN and khat < _LIGHT
    return "imh" if even or not isinstance(flow, Flow) else "neutra"


def run_chains(
    key: PRNGKeyArray,
    flow: Any,
    target: Target,
    dtype: str,
    method: str,
    num_samples: int,
    num_chains: int,
    num_warmup: int,
    num_rounds: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Unconstrained draws, shape (num_samples, dim), chain after chain, and the rest of a `Refined`.

    In rounds, until the draws of one are as they should be, and if transitions diverged, until a
    second round agrees. With "neutra" a map is learned from the draws of a round, and the next one
    begins where its chains stand; with "imh", and where there are too few draws to learn from, the
    same chains are carried on for as long again. The draws handed out are those of one kernel, which
    no longer changed.
    """
    began = time.monotonic()
    length, learns = math.ceil(num_samples / num_chains), method == "neutra"
    enough = _ROWS * flow.shape[0]
    learns = learns and length * num_chains >= enough
    from_a_piece = _PIECE * num_chains >= enough
    outcomes, last = [], None
    with scope(dtype):
        flow = cast(flow, dtype)
        chains = _Chains(neutra(target) if method == "neutra" else independent(target))
        for number in range(1, num_rounds + 1):
            key, key_start, key_run, key_learn = jax.random.split(key, 4)
            if number == 1 or learns:
                chains.start(key_start, flow, last, num_chains, num_warmup)
            more = learns and number < num_rounds
            outcomes.append(chains.carry_on(key_run, length, may_stop=more and from_a_piece))
            x = outcomes[-1].x
            if _settled(outcomes) or not np.isfinite(x).all():
                break
            if more:
                flow, last = _learned(key_learn, x, dtype), jnp.asarray(x[:, -1])
            elif not learns:
                length = x.shape[1]
    count = math.ceil(num_samples / num_chains)
    good = [outcome for outcome in outcomes if not outcome.warnings]
    full = [outcome for outcome in outcomes if outcome.x.shape[1] >= count] or outcomes
    best = (
        good[-1] if good else min(full, key=lambda outcome: np.nan_to_num(outcome.rhat, nan=np.inf))
    )
    x, warnings = best.x, best.warnings
    if good and not _settled(outcomes) and num_rounds > 1:
        warnings = (_UNSETTLED.format(best.divergences, len(outcomes)),)
    kept = np.linspace(0, x.shape[1] - 1, count).round().astype(int)  # thins chains carried on
    report = {
        "method": method,
        "rhat": best.rhat,
        "ess": best.ess,
        "acceptance": best.acceptance,
        "divergences": best.divergences,
        "rounds": len(outcomes),
        "warnings": warnings,
        "seconds": round(time.monotonic() - began, 2),
    }
    return x[:, kept].reshape(-1, x.shape[2])[:num_samples], report


class _Outcome(NamedTuple):
    x: np.ndarray  # (chains, draws, dim)
    acceptance: float
    divergences: int
    rhat: float
    ess: float
    warnings: tuple[str, ...]


def _settled(outcomes: list[_Outcome]) -> bool:
    """Whether no further round is wanted.

    Divergent transitions mean corners that chains do not get into, which R-hat cannot see; but chains
    behind another map get less far, or farther, and then the rounds differ.
    """
    *before, last = outcomes
    if last.warnings or last.divergences == 0:
        return not last.warnings
    if not before:
        return False
    old, new = (outcome.x.reshape(-1, outcome.x.shape[-1]) for outcome in (before[-1], last))
    # Of normal scores, for some coordinates have hardly a standard deviation.
    ranks = rankdata(np.concatenate([old, new]), axis=0)
    scores = norm.ppf((ranks - 0.375) / (len(ranks) + 0.25))
    old, new = scores[: len(old)], scores[len(old) :]
    moved = abs(new.mean(axis=0) - old.mean(axis=0))
    widened = abs(np.log(new.std(axis=0) / old.std(axis=0)))
    return bool(max(moved.max(), widened.max()) < _MOVED)


class _Chains:
    """Chains of one kernel: all their draws so far, and the compiled programs that go on with them."""

    def __init__(self, kernel: Kernel):
        many = lambda flow, keys, x, n: jax.vmap(
            lambda key, x: kernel.start(flow, key, x, n), (0, None if x is None else 0)
        )(keys, x)
        self._start = filter_jit_long(many)
        self._advance = filter_jit_long(
            lambda flow, state, keys, n: jax.vmap(
                lambda state, key: kernel.advance(flow, state, key, n)
            )(state, keys)
        )

    def start(
        self, key: PRNGKeyArray, flow: Any, first: Array | None, num_chains: int, num_warmup: int
    ) -> None:
        """New chains through `flow`, from `first` or from its draws, after their warm-up."""
        self._flow, self._num_chains = flow, num_chains
        self._state = self._start(flow, jax.random.split(key, num_chains), first, num_warmup)
        self._pieces: list[tuple[np.ndarray, ...]] = []

    def carry_on(self, key: PRNGKeyArray, length: int, *, may_stop: bool) -> _Outcome:
        """All draws so far, after `length` more; fewer where the first piece is a failure."""
        count = max(1, length // _PIECE)
        piece = math.ceil(length / count)
        for key_piece in jax.random.split(key, count):
            keys = jax.random.split(key_piece, self._num_chains)
            self._state, found = self._advance(self._flow, self._state, keys, piece)
            self._pieces.append(tuple(np.asarray(part) for part in found))
            if may_stop and len(self._pieces) == 1 and not self._outcome().rhat < _HOPELESS:
                break
        return self._outcome()

    def _outcome(self) -> _Outcome:
        x, accepted, diverged = (np.concatenate(p, axis=1) for p in zip(*self._pieces, strict=True))
        divergences = int(diverged.sum())
        return _Outcome(x, float(accepted.mean()), divergences, *judged(x, divergences))


def _learned(key: PRNGKeyArray, x: np.ndarray, dtype: str) -> Flow:
    """A coupling flow behind the draws' own mean and covariance, by maximum likelihood on them."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    loc, cov = rows.mean(axis=0), np.atleast_2d(np.cov(rows.T))
    tril = np.linalg.cholesky(cov + np.diag(1e-10 * np.diag(cov) + 1e-30))
    white = np.linalg.solve(tril, (rows - loc).T).T
    key_start, key_ascent = jax.random.split(key)
    flow = cast(default_flow(key_start, len(loc)), dtype)
    flow = likelihood_ascent(flow, jnp.asarray(white, dtype), key_ascent)
    affine = TriangularAffine.from_loc_tril(jnp.asarray(loc, dtype), jnp.asarray(tril, dtype))
    return Flow(flow.base, Chain([flow.bijection, affine]))


def judged(x: np.ndarray, divergences: int = 0) -> tuple[float, float, tuple[str, ...]]:
    """The largest R-hat and the smallest effective size over coordinates, and what is wrong."""
    from arviz_stats.base import array_stats

    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        return math.nan, 0.0, ("a chain is not finite.",)
    if x.shape[1] < _FEWEST:
        return math.nan, 0.0, (f"chains of {x.shape[1]} draws cannot be judged: take more.",)
    rhat = float(np.max(array_stats.rhat(x, chain_axis=0, draw_axis=1)))
    ess = float(np.min(array_stats.ess(x, chain_axis=0, draw_axis=1)))
    warnings = []
    if not rhat < _RHAT:
        warnings.append(
            f"R-hat {rhat:.3f} is not below {_RHAT}: the chains disagree; more draws, or the other method."
        )
    if ess < 100 * x.shape[0]:
        warnings.append(f"effective size {ess:.0f} is below 100 per chain: take more draws.")
    if divergences > _DIVERGENT * x.shape[0] * x.shape[1]:
        warnings.append(
            f"{divergences} transitions diverged: chains do not get into a corner of the posterior."
        )
    return rhat, ess, tuple(warnings)
