"""The Markov kernels behind `Posterior.refine`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.distributions import Flow
from vflow.fit._draws import extra
from vflow.flows.stochastic import MALA
from vflow.targets import Target

_PROPOSALS = 16
_LOCAL = 5
_DEPTH = 7  # doublings of a NUTS trajectory: where it takes more, the map is to be replaced
_ACCEPTANCE = 0.9
_DENSE = 64  # coordinates up to which NUTS adapts a full mass matrix


class Kernel(NamedTuple):
    """A Markov chain on one event. The family is an argument: one of the same kind is not recompiled.

    Attributes:
        start: (family, key, first position or None, warm-up iterations) -> state; None draws from
            the family.
        advance: (family, state, key, iterations) -> (state, (x, acceptance, divergent)), stacked.
    """

    start: Callable[[Any, PRNGKeyArray, Array | None, int], Any]
    advance: Callable[[Any, Any, PRNGKeyArray, int], tuple[Any, tuple[Array, Array, Array]]]


def _pulled_back(flow: Flow, target: Target) -> Callable[[Array], Array]:
    def log_density(z: Array) -> Array:
        x, log_det = flow.bijection.forward_and_log_det(z)
        return target.log_prob(x) + log_det

    return log_density


def neutra(target: Target) -> Kernel:
    """NUTS on the density pulled back to the base space, with its own warm-up."""
    import blackjax

    nuts: Any = blackjax.nuts

    def start(flow: Flow, key: PRNGKeyArray, x: Array | None, num_warmup: int) -> Any:
        key_start, key_warm = jax.random.split(key)
        z = flow.base.sample(key_start) if x is None else flow.bijection.inverse_and_log_det(x)[0]
        warmup: Any = blackjax.window_adaptation(
            nuts,
            _pulled_back(flow, target),
            is_mass_matrix_diagonal=flow.shape[0] > _DENSE,
            target_acceptance_rate=_ACCEPTANCE,
            max_num_doublings=_DEPTH,
        )
        found, _ = warmup.run(key_warm, z, num_warmup)
        tuned = ("step_size", "inverse_mass_matrix")
        return found.state, {name: found.parameters[name] for name in tuned}

    def advance(flow: Flow, state: Any, key: PRNGKeyArray, length: int) -> Any:
        at, tuned = state
        kernel = nuts(_pulled_back(flow, target), **tuned, max_num_doublings=_DEPTH)

        def step(at, key):
            at, info = kernel.step(key, at)
            return at, (at.position, info.acceptance_rate, info.is_divergent)

        at, (z, accepted, diverged) = jax.lax.scan(step, at, jax.random.split(key, length))
        x = jax.lax.map(lambda z: flow.bijection.forward_and_log_det(z)[0], z)
        return (at, tuned), (x, accepted, diverged)

    return Kernel(start, advance)


def independent(target: Target) -> Kernel:
    """Iterated sampling importance resampling with fresh draws of the family, and MALA moves.

    The state carries its weight, so that an estimated density of the family is allowed. MALA moves are
    made in the base space, where there is one.
    """

    def stepper(flow: Any) -> tuple[Callable, Callable]:
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

        return propose, step

    def run(flow: Any, state: Any, key: PRNGKeyArray, length: int, rate: float) -> Any:
        rates = jnp.full_like(state[1], rate, shape=(length,))
        return jax.lax.scan(stepper(flow)[1], state, (jax.random.split(key, length), rates))

    def start(flow: Any, key: PRNGKeyArray, x: Array | None, num_warmup: int) -> Any:
        key_start, key_run = jax.random.split(key)
        z, log_w = stepper(flow)[0](key_start)
        log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
        log_step = jnp.full_like(log_w, math.log(0.5 / z.size ** (1 / 3)))
        # The step is adapted in the warm-up only: the kernel of the draws that count is fixed.
        return run(flow, (z, log_w, log_step), key_run, num_warmup, 0.2)[0]

    def advance(flow: Any, state: Any, key: PRNGKeyArray, length: int) -> Any:
        state, (z, taken) = run(flow, state, key, length, 0.0)
        if isinstance(flow, Flow):
            z = jax.lax.map(lambda z: flow.bijection.forward_and_log_det(z)[0], z)
        return state, (z, taken, jnp.zeros_like(taken))

    return Kernel(start, advance)
