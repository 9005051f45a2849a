"""Local training of the bijections between sampling layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.flows.stochastic import StochasticFlow
from vflow.objectives._log_variance import stopped_softmax
from vflow.objectives._target import log_density_of
from vflow.programs import vmap


def craft(num_particles: int) -> Callable[[Any, Any], Array]:
    r"""Train each bijection to carry one annealed density to the next.

    $$\sum_k \mathbb{E}_{x\sim\pi_{k-1}}\bigl[\log\gamma_k(T_k x) + \log|\det\partial T_k| -
    \log\gamma_{k-1}(x)\bigr] = \sum_k \log\tfrac{Z_k}{Z_{k-1}} - \mathrm{KL}(T_k\#\pi_{k-1} \,\|\, \pi_k)$$

    over the runs of bijections $T_k$ of a stochastic flow. Particles come from the flow's own paths, with
    their normalised weights, and are constants: no derivative passes through a sampling layer, so
    that layers with an accept/reject step do no harm. Only bijections are trained (not step sizes or
    temperatures). The expectations are self-normalised: consistent in the number of particles.
    Paths are weighted, not resampled.

    Args:
        num_particles: paths behind each value.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Raises:
        ValueError: num_particles is not positive.
        TypeError, ValueError: (from the objective) q is no stochastic flow, or has no bijections.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> S = vf.flows.stochastic
        >>> blocks = [vf.bijections.Affine(jnp.zeros(2), 1.0), S.Metropolis(num_steps=2, step_size=0.5)]
        >>> snf = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks * 2)
        >>> objective = vf.objectives.craft(64)
        >>> estimate = vf.expect(lambda q: objective(q, lambda x: -jnp.sum(x**2)))
        >>> value, gradient = vf.value_and_grad(estimate)(jax.random.key(1), snf)

    Source:
        Matthews, Arbel, Rezende & Doucet 2022, Continual Repeated Annealed Flow Transport Monte
        Carlo (arXiv 2201.13117), equation 8.
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}.")

    def objective(q: Any, p: Any) -> Array:
        if not isinstance(q, StochasticFlow):
            raise TypeError(f"craft is for stochastic flows, got {type(q).__name__}: use elbo().")
        log_density = log_density_of(p)
        paths = vmap(lambda: q.simulate_trajectory(log_density=log_density), num_particles)
        layers, total, start = q.layers, jnp.zeros_like(paths.log_base, shape=()), 0
        runs = [i for i, layer in enumerate(layers) if not layer.tempered]
        if not runs:
            raise ValueError("craft trains bijections, and this stochastic flow has none.")
        while start < len(layers):
            stop = start
            while stop < len(layers) and not layers[stop].tempered:
                stop += 1
            if stop > start:
                total = total + _gain(q, log_density, layers[start:stop], paths, start, stop)
            start = stop + 1
        return total

    return objective


def _gain(q: Any, log_density: Any, run: list[Any], paths: Any, start: int, stop: int) -> Array:
    """The weighted mean of log gamma_k(T x) + log det - log gamma_{k-1}(x)."""
    before, after = q.stage(start, log_density), q.stage(stop, log_density)
    x = paths.positions[:, start]
    here = jax.vmap(before)(x)
    log_w = here - paths.log_base + jnp.sum(paths.increments[:, :start], axis=1)

    def moved(x: Array) -> Array:
        total = jnp.zeros_like(x, shape=())
        for layer in run:
            x, log_det = layer.bijection.forward_and_log_det(x)
            total = total + log_det
        return after(x) + total

    return jnp.sum(stopped_softmax(log_w) * (jax.vmap(moved)(x) - here))
