"""Sequential Monte Carlo along the layers of a stochastic flow."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Estimate, stop_gradient
from vflow.flows._checks import check_count
from vflow.flows.stochastic._flow import StochasticFlow, _pulled_back
from vflow.flows.stochastic._transition import LogDensity


class Particles(NamedTuple):
    """What `sequential_monte_carlo` returns.

    Attributes:
        x: positions, shape (num_runs * num_particles, *shape).
        log_weights: shape (num_runs * num_particles,); the mean of their exponentials estimates Z.
        log_evidence: with its standard error over the independent runs.
        resampled: mean number of resampling steps in a run.
    """

    x: Array
    log_weights: Array
    log_evidence: Estimate
    resampled: float


def sequential_monte_carlo(
    key: PRNGKeyArray,
    flow: StochasticFlow,
    log_density: LogDensity,
    num_particles: int = 1000,
    *,
    num_runs: int = 16,
    threshold: float = 0.3,
) -> Particles:
    r"""Evaluate a stochastic flow by sequential Monte Carlo: its paths, resampled as they go.

    After layer k particles have the weights of $\gamma_k$ at the temperature of that layer (after a
    bijection, of the next): $\log\gamma_k(x_k) - \log\gamma_{k-1}(x_{k-1}) + \Delta S_k$ is added. Where
    the effective sample size falls below `threshold`, they are resampled (systematically). The
    product of the mean weights is unbiased for Z; `threshold=0` is annealed importance sampling.
    Nothing is differentiable.

    Args:
        key: PRNG key.
        flow: the family.
        log_density: the target, unnormalised.
        num_particles: particles in a run.
        num_runs: independent runs, at least 2, over which the standard error is taken.
        threshold: of the effective sample size as a share of the particles, in [0, 1].

    Returns:
        `Particles`.

    Raises:
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> S = vf.flows.stochastic
        >>> chain = vf.flows.stochastic_flow(
        ...     jax.random.key(0), 2, [S.HMC(num_steps=1, num_leapfrog=3, step_size=0.3)] * 4)
        >>> found = S.sequential_monte_carlo(jax.random.key(1), chain, lambda x: -2 * jnp.sum(x**2), 500)
        >>> print(f"{found.log_evidence.value:.1f}")
        0.5

    Source:
        Del Moral, Doucet & Jasra 2006; with flows: Matthews, Arbel, Rezende & Doucet 2022 (arXiv
        2201.13117).
    """
    check_count("sequential_monte_carlo", "num_particles", num_particles)
    check_count("sequential_monte_carlo", "num_runs", num_runs)
    if num_runs < 2:
        raise ValueError(
            "sequential_monte_carlo: num_runs must be at least 2: the standard error is taken over runs."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"sequential_monte_carlo: threshold must lie in [0, 1], got {threshold!r}."
        )
    flow = stop_gradient(flow)

    @jax.jit
    def runs(key):
        one = lambda key: _run(key, flow, log_density, num_particles, threshold)
        return jax.vmap(one)(jax.random.split(key, num_runs))

    x, log_w, resampled = runs(key)
    totals = np.asarray(jax.nn.logsumexp(log_w, axis=1), np.float64) - math.log(num_particles)
    top = totals.max()
    if not math.isfinite(top):
        estimate = Estimate(float(top), math.inf)
    else:
        z = np.exp(totals - top)
        error = z.std(ddof=1) / (math.sqrt(num_runs) * z.mean())
        estimate = Estimate(float(top + math.log(z.mean())), float(error))
    return Particles(x.reshape(-1, *flow.shape), log_w.ravel(), estimate, float(resampled.mean()))


def _run(
    key: PRNGKeyArray, flow: StochasticFlow, log_density: LogDensity, n: int, threshold: float
) -> tuple[Array, Array, Array]:
    target = log_density if flow.outer is None else _pulled_back(log_density, flow.outer)
    key, key_resample = jax.random.split(key)
    x, _, keys = jax.vmap(flow._start)(jax.random.split(key, n))
    keys = jnp.swapaxes(keys, 0, 1)
    stages = flow.stages.astype(x.dtype)
    after = jax.random.split(key_resample, len(flow.temperatures))

    def step(layer: Any, cancels: bool, carry: Any, inputs: Any):  # noqa: FBT001
        x, log_w, times = carry
        (keys, start, stop), old, new, key = inputs
        density = flow._density(layer, target, start, stop, cancels=cancels)
        y, dS = jax.vmap(lambda key, x: layer.forward(key, x, density))(keys, x)
        log_w = log_w + _change(flow, target, x, y, old, new) + dS
        sound = jnp.isfinite(log_w) & jnp.all(jnp.isfinite(y), axis=tuple(range(1, y.ndim)))
        log_w = jnp.where(sound, log_w, -jnp.inf)
        y = jnp.where(sound.reshape(-1, *[1] * (y.ndim - 1)), y, x)
        share = jax.nn.softmax(log_w)
        poor = 1.0 / jnp.sum(share**2) < threshold * n
        chosen = jnp.where(poor, _systematic(key, share), jnp.arange(n))
        level = jax.nn.logsumexp(log_w) - jnp.log(n)
        return (y[chosen], jnp.where(poor, level, log_w), times + poor), jnp.zeros_like(level)

    first, carry = 0, (x, jnp.zeros_like(x, shape=(n,)), jnp.zeros((), int))
    for segment, inputs in flow._inputs(keys, x):
        part = slice(first, first + segment.size)
        old, new = stages[:-1][part], stages[1:][part]
        carry, _ = segment.run(step, carry, (inputs, old, new, after[part]), reverse=False)
        first += segment.size
    x, log_w, times = carry
    log_w = log_w + _change(flow, target, x, x, stages[-1], jnp.ones_like(stages[-1]))
    if flow.outer is not None:
        x = jax.vmap(flow.outer.forward_and_log_det)(x)[0]
    return x, log_w, times


def _change(
    flow: StochasticFlow, target: LogDensity, x: Array, y: Array, old: Array, new: Array
) -> Array:
    """log gamma_new(y) - log gamma_old(x), per particle."""
    before, later = flow._stage(old, target), flow._stage(new, target)
    return jax.vmap(lambda x, y: later(y) - before(x))(x, y)


def _systematic(key: PRNGKeyArray, share: Array) -> Array:
    n = share.shape[0]
    points = (jnp.arange(n) + jax.random.uniform(key, dtype=share.dtype)) / n
    return jnp.clip(jnp.searchsorted(jnp.cumsum(share), points), 0, n - 1)
