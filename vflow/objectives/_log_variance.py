"""The log-variance objective of Langevin chains."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.flows.stochastic import StochasticFlow
from vflow.objectives._target import log_density_of
from vflow.programs import vmap


def log_variance(num_particles: int) -> Callable[[Any, Any], Array]:
    r"""Minus half the variance of the log path weights, the paths being constants (VarGrad).

    $$-\tfrac12 \operatorname{Var}_k \Bigl[\log p(x_K) - \log q_0(x_0) + \sum_k \log
    \tfrac{r_\theta(x_{k-1}\mid x_k)}{q_\theta(x_k\mid x_{k-1})}\Bigr]$$

    Its gradient is unbiased for that of the variance under the law of the paths at the current
    parameters, held fixed; it is zero, without variance, where all weights are equal, which is where the path
    ELBO is largest too. No derivative runs along the paths, so that the target needs first
    derivatives only. For stochastic flows of `Langevin` and `ControlledLangevin` layers.

    Args:
        num_particles: paths behind the variance, at least 2.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised; 0 at best.

    Raises:
        ValueError: fewer than 2 particles.
        ProgramError: (from the objective) a layer of another kind.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> S = vf.flows.stochastic
        >>> chain = vf.flows.stochastic_flow(
        ...     jax.random.key(0), 2, [S.ControlledLangevin(num_steps=4, step_size=0.1)])
        >>> objective = vf.objectives.log_variance(32)
        >>> estimate = vf.expect(lambda q: objective(q, lambda x: -jnp.sum(x**2)))
        >>> value = estimate(jax.random.key(1), chain)

    Source:
        Richter, Boustati, Nuesken, Ruiz & Akyildiz 2020, VarGrad (arXiv 2010.10436), section 3.
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 2:
        raise ValueError(f"num_particles must be an integer of at least 2, got {num_particles!r}.")

    def objective(q: Any, p: Any) -> Array:
        if not isinstance(q, StochasticFlow):
            raise TypeError(
                f"log_variance is for stochastic flows, got {type(q).__name__}: use elbo()."
            )
        log_density = log_density_of(p)

        def log_weight() -> Array:
            path = q.simulate_trajectory(log_density=log_density, fixed=True)
            end = q.stage(len(q.temperatures), log_density)
            return end(path.positions[-1]) - path.log_base + jnp.sum(path.increments)

        return -0.5 * jnp.var(vmap(log_weight, num_particles), ddof=1)

    return objective


def stopped_softmax(log_w: Array) -> Array:
    """Normalised weights without derivative; zero where a log weight is not finite."""
    return jax.lax.stop_gradient(jax.nn.softmax(jnp.where(jnp.isfinite(log_w), log_w, -jnp.inf)))
