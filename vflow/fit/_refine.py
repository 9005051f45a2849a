"""Markov chains that start from a fit and end in the posterior."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow.distributions import Flow
from vflow.fit._draws import extra
from vflow.fit._dtype import cast, scope
from vflow.flows.stochastic import MALA
from vflow.targets import Target

METHODS = ("auto", "neutra", "imh")
# Weights at least this even make independent proposals mix in a few iterations.
_EVEN = 0.02
_LIGHT = 0.7
_PROPOSALS = 16
_LOCAL = 5
_RHAT = 1.01
_FEWEST = 4  # draws of a chain that R-hat can be computed from


class Refined(NamedTuple):
    """Draws of Markov chains that were started from a fit.

    Attributes:
        draws: site -> array of shape (num_samples, *site shape), chain after chain.
        method: "neutra" or "imh".
        rhat: the largest R-hat of the unconstrained coordinates (rank-normalised, split).
        ess: the smallest bulk effective sample size.
        acceptance: mean acceptance rate: of NUTS trajectories, or the share of iterations of "imh" that
            took a fresh proposal.
        divergences: divergent transitions of NUTS.
        warnings: why the draws are not to be trusted, one sentence each.
        seconds: wall time.
    """

    draws: dict[str, Array]
    method: str
    rhat: float
    ess: float
    acceptance: float
    divergences: int
    warnings: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        count = len(next(iter(self.draws.values())))
        lines = [
            f"{count} draws by {self.method}: R-hat {self.rhat:.3f}, effective size {self.ess:.0f}, "
            f"acceptance {self.acceptance:.2f}, {self.divergences} divergences, {self.seconds:.1f} s"
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
) -> tuple[np.ndarray, dict[str, Any]]:
    """Unconstrained draws, shape (chains, draws, dim), and acceptance, divergences, seconds."""
    began = time.monotonic()
    length = math.ceil(num_samples / num_chains)
    with scope(dtype):
        flow = cast(flow, dtype)
        one = _neutra(flow, target) if method == "neutra" else _independent(flow, target)
        run = eqx.filter_jit(jax.vmap(lambda key: one(key, length, num_warmup)))
        x, accepted, diverged = run(jax.random.split(key, num_chains))
        x = np.asarray(x)
    report = {
        "acceptance": float(np.mean(accepted)),
        "divergences": int(np.sum(diverged)),
        "seconds": round(time.monotonic() - began, 2),
    }
    return x, report


def judged(x: np.ndarray) -> tuple[float, float, tuple[str, ...]]:
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
    return rhat, ess, tuple(warnings)


def _pulled_back(flow: Flow, target: Target) -> Callable[[Array], Array]:
    def log_density(z: Array) -> Array:
        x, log_det = flow.bijection.forward_and_log_det(z)
        return target.log_prob(x) + log_det

    return log_density


def _neutra(flow: Flow, target: Target) -> Callable:
    """NUTS on the density pulled back to the base space, with its own warm-up."""
    import blackjax

    nuts: Any = blackjax.nuts
    log_density = _pulled_back(flow, target)

    def chain(key: PRNGKeyArray, length: int, num_warmup: int) -> tuple[Array, Array, Array]:
        key_start, key_warm, key_run = jax.random.split(key, 3)
        warmup: Any = blackjax.window_adaptation(nuts, log_density)
        found, _ = warmup.run(key_warm, flow.base.sample(key_start), num_warmup)
        kernel = nuts(log_density, **found.parameters)

        def step(state, key):
            state, info = kernel.step(key, state)
            return state, (state.position, info.acceptance_rate, info.is_divergent)

        _, (z, accepted, diverged) = jax.lax.scan(
            step, found.state, jax.random.split(key_run, length)
        )
        x = jax.lax.map(lambda z: flow.bijection.forward_and_log_det(z)[0], z)
        return x, accepted, diverged

    return chain


def _independent(flow: Any, target: Target) -> Callable:
    """Iterated sampling importance resampling with fresh draws of the family, and MALA moves.

    The state carries its weight, so that an estimated density of the family is allowed. MALA moves are
    made in the base space, where there is one.
    """
    exact = isinstance(flow, Flow)
    pulled: Any = _pulled_back(flow, target) if exact else None

    def propose(key: PRNGKeyArray) -> tuple[Array, Array]:
        """A point (in the base space, if there is one) and its log weight."""
        if exact:
            z, log_q = flow.base.sample_and_log_prob(key)
            return z, pulled(z) - log_q
        x, log_q = flow.sample_and_log_prob(key, **extra(flow, target))
        return x, target.log_prob(x) - log_q

    def fresh(key: PRNGKeyArray, z: Array, log_w: Array) -> tuple[Array, Array, Array]:
        """One of the proposals or the point itself, by weight."""
        key_propose, key_pick = jax.random.split(key)
        points, weights = jax.vmap(propose)(jax.random.split(key_propose, _PROPOSALS))
        points = jnp.concatenate([z[None], points])
        weights = jnp.concatenate([log_w[None], weights])
        weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)
        pick = jax.random.categorical(key_pick, weights)
        return points[pick], weights[pick], pick > 0

    def local(key: PRNGKeyArray, z: Array, log_step: Array) -> tuple[Array, Array]:
        """MALA moves, and the share of them that was accepted."""
        layer = MALA(num_steps=1, step_size=1.0)
        layer = eqx.tree_at(lambda layer: layer.log_step, layer, log_step)

        def move(z, key):
            new, _ = layer.forward(key, z, pulled)
            return new, jnp.any(new != z)

        z, moved = jax.lax.scan(move, z, jax.random.split(key, _LOCAL))
        return z, jnp.mean(moved)

    def step(carry, inputs):
        z, log_w, log_step = carry
        key, rate = inputs
        key_fresh, key_local = jax.random.split(key)
        z, log_w, taken = fresh(key_fresh, z, log_w)
        if exact:
            z, moved = local(key_local, z, log_step)
            log_w = pulled(z) - flow.base.log_prob(z)
            log_step = log_step + rate * (moved - 0.574)
        return (z, log_w, log_step), (z, taken)

    def chain(key: PRNGKeyArray, length: int, num_warmup: int) -> tuple[Array, Array, Array]:
        key_start, key_run = jax.random.split(key)
        z, log_w = propose(key_start)
        log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
        log_step = jnp.full_like(log_w, math.log(0.5 / z.size ** (1 / 3)))
        # The step is adapted in the warm-up only: the kernel of the draws that count is fixed.
        n = num_warmup + length
        rate = jnp.where(jnp.arange(n) < num_warmup, 0.2, 0.0).astype(log_w.dtype)
        _, (z, taken) = jax.lax.scan(
            step, (z, log_w, log_step), (jax.random.split(key_run, n), rate)
        )
        z, taken = z[num_warmup:], taken[num_warmup:]
        x = jax.lax.map(lambda z: flow.bijection.forward_and_log_det(z)[0], z) if exact else z
        return x, taken, jnp.zeros_like(taken)

    return chain
