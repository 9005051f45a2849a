"""Flow annealed importance sampling bootstrap with a replay buffer."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from vflow._core import combine, partition, stop_gradient
from vflow.objectives._fab import annealing, check_family
from vflow.objectives._target import log_density_of


class Buffer(NamedTuple):
    """Annealed points, the oldest of which are overwritten.

    Attributes:
        x: points, shape (capacity, dim).
        log_weights: for $p^2/q$ with the q of `log_q`; minus infinity for a place not yet taken.
        log_q: log density of the flow that saw a point last.
        cursor: where the next points go.
    """

    x: Array
    log_weights: Array
    log_q: Array
    cursor: Int[Array, ""]


class FabState(NamedTuple):
    """What training with `fab_replay` carries from step to step."""

    trainable: Any
    opt_state: Any
    buffer: Buffer


class FabReplay(NamedTuple):
    """Training by FAB as pure functions: jit, scan and vmap them.

    Attributes:
        init: `init(key) -> state`, with a first filling of the buffer.
        step: `step(key, state) -> (state, value)`: one annealing pass, then the updates on minibatches.
        flow: `flow(state) -> the flow` as trained so far.
    """

    init: Callable[[PRNGKeyArray], FabState]
    step: Callable[[PRNGKeyArray, FabState], tuple[FabState, Array]]
    flow: Callable[[FabState], Any]


def fab_replay(
    q: Any,
    p: Any,
    optimizer: optax.GradientTransformation,
    *,
    num_particles: int,
    num_updates: int = 4,
    num_batches: int = 32,
    blocks: Sequence[Any] | None = None,
    most: float = 10.0,
) -> FabReplay:
    r"""Train a flow by FAB on a buffer of annealed points, each of which is used several times.

    Each step anneals `num_particles` points from q to $p^2/q$ and puts them in the buffer with their
    weights w. Then minibatches are drawn from it in proportion to w, without replacement, and

    $$\frac1N\sum_i c_i \log q(x_i), \qquad c_i = \min\bigl(q_{\mathrm{old}}(x_i)/q(x_i),\ c_{\max}\bigr)$$

    is raised, points and $c_i$ as constants: $c_i$ corrects a weight for what q has become since. Weights in
    the buffer are corrected likewise. For one annealing pass there are `num_updates` updates. Draws
    without replacement and the bound on $c_i$ make the gradient consistent in the size of the
    buffer for a flow at rest, not unbiased. An update that is not finite is left out.

    Args:
        q: the flow to begin with; it needs `log_prob`.
        p: the target: a log density, a `Target` or a program.
        optimizer: an optax transformation.
        num_particles: annealed paths in a pass and points in a minibatch.
        num_updates: minibatches behind each pass.
        num_batches: capacity of the buffer, in passes; at least `num_updates`.
        blocks: sampling layers of the chain, as for `fab`.
        most: $c_{\max}$.

    Returns:
        `FabReplay(init, step, flow)`.

    Raises:
        TypeError: q has no exact density.
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> log_density = lambda x: -0.5 * jnp.sum((x - 1.0) ** 2)
        >>> fab = vf.objectives.fab_replay(flow, log_density, optax.adam(1e-3), num_particles=64)
        >>> def train(key, num_steps):
        ...     keys = jax.random.split(key, num_steps)
        ...     step = lambda state, key: fab.step(key, state)
        ...     return jax.lax.scan(step, fab.init(key), keys)
        >>> state, values = jax.eval_shape(lambda key: train(key, 100), jax.random.key(1))
        >>> print(state.buffer.x.shape, values.shape)
        (2048, 2) (100,)

    Source:
        Midgley, Stimper, Simm, Schoelkopf & Hernandez-Lobato 2023 (arXiv 2208.01893), algorithm 1.
    """
    counts = {
        "num_particles": num_particles,
        "num_updates": num_updates,
        "num_batches": num_batches,
    }
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"fab_replay: {name} must be a positive integer, got {value!r}.")
    if num_batches < num_updates:
        raise ValueError(
            f"fab_replay: num_batches ({num_batches}) must be at least num_updates ({num_updates}): "
            "a step draws that many minibatches from the buffer."
        )
    if not most >= 1:
        raise ValueError(f"fab_replay: most must be at least 1, got {most!r}.")
    check_family("fab_replay", q)
    start, static = partition(q)
    log_density = log_density_of(p)

    def passed(key: PRNGKeyArray, trainable: Any, buffer: Buffer) -> Buffer:
        """The buffer with the points of one annealing pass."""
        now = stop_gradient(combine(trainable, static))
        chain, towards = annealing(now, log_density, blocks)
        paths = jax.vmap(lambda key: chain.trajectory(key, towards))(
            jax.random.split(key, num_particles)
        )
        x = paths.positions[:, -1]
        log_q = jax.vmap(now.log_prob)(x)
        log_w = jax.vmap(towards)(x) - paths.log_base + jnp.sum(paths.increments, axis=1)
        sound = jnp.isfinite(log_w) & jnp.isfinite(log_q)
        new = (
            jnp.where(sound[:, None], x, paths.positions[:, 0]),
            jnp.where(sound, log_w, -jnp.inf),
            jnp.where(sound, log_q, 0.0),
        )
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, buffer.cursor, 0)
        x, log_w, log_q = (put(old, n) for old, n in zip(buffer[:3], new, strict=True))
        cursor = (buffer.cursor + num_particles) % (num_batches * num_particles)
        return Buffer(x, log_w, log_q, cursor)

    def init(key: PRNGKeyArray) -> FabState:
        like = combine(start, static).sample(key)
        size = num_batches * num_particles
        empty = Buffer(
            jnp.zeros_like(like, shape=(size, *like.shape)),
            jnp.full_like(like, -jnp.inf, shape=(size,)),
            jnp.zeros_like(like, shape=(size,)),
            jnp.zeros((), int),
        )
        buffer, _ = jax.lax.scan(
            lambda buffer, key: (passed(key, start, buffer), None),
            empty,
            jax.random.split(key, num_updates),
        )
        return FabState(start, optimizer.init(start), buffer)

    def update(carry: tuple[Any, Any, Buffer], chosen: Array) -> tuple[Any, Array]:
        trainable, opt_state, buffer = carry
        x, before, taken = (values[chosen] for values in buffer[:3])

        def loss(trainable: Any) -> tuple[Array, Array]:
            log_q = jax.vmap(combine(trainable, static).log_prob)(x)
            change = jax.lax.stop_gradient(jnp.where(before > -jnp.inf, taken - log_q, -jnp.inf))
            share = jnp.exp(jnp.minimum(change, math.log(most)))
            return -jnp.mean(share * jnp.where(share > 0, log_q, 0.0)), log_q

        (value, log_q), slope = jax.value_and_grad(loss, has_aux=True)(trainable)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(slope)]))
        changes, after = optimizer.update(slope, opt_state, trainable)
        pick = lambda new, old: jnp.where(finite, new, old)
        seen = jnp.isfinite(log_q)
        weights = jnp.where(seen, before + taken - log_q, -jnp.inf)
        buffer = buffer._replace(
            log_weights=buffer.log_weights.at[chosen].set(weights),
            log_q=buffer.log_q.at[chosen].set(jnp.where(seen, log_q, 0.0)),
        )
        trainable = jax.tree.map(pick, optax.apply_updates(trainable, changes), trainable)
        return (trainable, jax.tree.map(pick, after, opt_state), buffer), -value

    def step(key: PRNGKeyArray, state: FabState) -> tuple[FabState, Array]:
        key_pass, key_draw, key_mix = jax.random.split(key, 3)
        buffer = passed(key_pass, state.trainable, state.buffer)
        # The largest of log w + Gumbel noise are a draw by weight without replacement.
        scores = buffer.log_weights + jax.random.gumbel(
            key_draw, buffer.log_weights.shape, buffer.log_weights.dtype
        )
        chosen = jax.lax.top_k(scores, num_updates * num_particles)[1]
        chosen = jax.random.permutation(key_mix, chosen).reshape(num_updates, num_particles)
        carry = (state.trainable, state.opt_state, buffer)
        carry, values = jax.lax.scan(update, carry, chosen)
        return FabState(*carry), jnp.mean(values)

    return FabReplay(init, step, lambda state: combine(state.trainable, static))
