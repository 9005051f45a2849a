"""Flow annealed importance sampling bootstrap."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import stop_gradient
from vflow.distributions import AbstractDistribution
from vflow.flows import stochastic_flow
from vflow.flows.stochastic import HMC, StochasticFlow
from vflow.flows.stochastic._transition import LogDensity
from vflow.objectives._log_variance import stopped_softmax
from vflow.objectives._target import log_density_of
from vflow.programs import vmap


def fab(num_particles: int, blocks: Sequence[Any] | None = None) -> Callable[[Any, Any], Array]:
    r"""Mass-covering training of a flow on points found by annealed importance sampling.

    $$\sum_i \tilde w_i \log q(x_i), \qquad (x_i, w_i) \text{ from an annealed chain from } q \text{ to }
    p^2/q$$

    with points and normalised weights as constants; maximising it lowers the divergence
    $\int p^2/q$ ($\alpha = 2$), which is large where q misses mass of p. The chain starts at q, so it
    finds what is near q or what its steps can reach. Consistent in the number of particles, not
    unbiased.

    Args:
        num_particles: annealed paths behind each value.
        blocks: sampling layers of the chain, as for `vf.flows.stochastic_flow`; by default four HMC
            steps of 5 leapfrog steps of size 0.1. Step sizes are in the target's coordinates.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised; q needs `log_prob`.

    Raises:
        ValueError: num_particles is not positive.
        TypeError: (from the objective) q has no exact density.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> objective = vf.objectives.fab(64)
        >>> estimate = vf.expect(lambda q: objective(q, lambda x: -jnp.sum(x**2)))
        >>> value = estimate(jax.random.key(1), flow)

    Source:
        Midgley, Stimper, Simm, Schoelkopf & Hernandez-Lobato 2023 (arXiv 2208.01893), section 3.
        With its replay buffer: `vf.objectives.fab_replay`.
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}.")

    def objective(q: Any, p: Any) -> Array:
        check_family("fab", q)
        frozen, log_density = stop_gradient(q), log_density_of(p)
        chain, towards = annealing(frozen, log_density, blocks)
        paths = vmap(lambda: chain.simulate_trajectory(log_density=towards), num_particles)
        x = paths.positions[:, -1]
        log_w = jax.vmap(towards)(x) - paths.log_base + jnp.sum(paths.increments, axis=1)
        return jnp.sum(stopped_softmax(log_w) * jax.vmap(q.log_prob)(x))

    return objective


def annealing(
    q: AbstractDistribution, log_density: LogDensity, blocks: Sequence[Any] | None
) -> tuple[StochasticFlow, LogDensity]:
    """The chain from `q`, which must be without derivative, and the $p^2/q$ that it moves towards."""
    steps = [HMC(num_steps=1, num_leapfrog=5, step_size=0.1)] * 4 if blocks is None else blocks
    chain = stochastic_flow(jax.random.key(0), q.shape[0], steps, base=q, train_temperatures=False)
    return chain, lambda x: 2.0 * log_density(x) - q.log_prob(x)


def check_family(owner: str, q: Any) -> None:
    """Raise TypeError unless `q` is a distribution on vectors with an exact density."""
    if not isinstance(q, AbstractDistribution) or len(q.shape) != 1:
        raise TypeError(
            f"{owner} trains a flow on vectors with an exact log_prob, got {type(q).__name__}; for "
            "stochastic flows there is vf.objectives.craft."
        )
