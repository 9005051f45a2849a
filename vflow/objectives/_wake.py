"""Reweighted wake-sleep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.objectives._target import log_density_of
from vflow.programs import vmap


def wake_p(num_particles: int) -> Callable[[Any, Any], Array]:
    r"""The wake phase of the model, $\sum_k \tilde w_k \log p(x_k)$ at stopped weights and draws.

    Its gradient estimates $\nabla \log Z$ for the parameters of p; consistent as K grows, not
    unbiased. Parameters of q get none.

    Args:
        num_particles: K, the self-normalised importance samples.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised over p.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> wake = vf.objectives.wake_p(10)
        >>> value = vf.expect(lambda q: wake(q, lambda x: -jnp.sum(x**2)))(jax.random.key(1), flow)

    Source: Bornschein and Bengio, Reweighted Wake-Sleep (2015), equation 5.
    """
    return _wake(num_particles, lambda q, log_density: log_density)


def wake_q(num_particles: int) -> Callable[[Any, Any], Array]:
    r"""The wake phase of the guide, $\sum_k \tilde w_k \log q(x_k)$ at stopped weights and draws.

    Its gradient estimates $-\nabla\,\mathrm{KL}(p/Z \| q)$ for the parameters of q; consistent as K
    grows, not unbiased. Parameters of p get none. q needs an exact `log_prob`.

    Args:
        num_particles: K, the self-normalised importance samples.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised over q.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> wake = vf.objectives.wake_q(10)
        >>> value = vf.expect(lambda q: wake(q, lambda x: -jnp.sum(x**2)))(jax.random.key(1), flow)

    Source: Bornschein and Bengio, Reweighted Wake-Sleep (2015), equation 7.
    """
    return _wake(num_particles, lambda q, log_density: q.log_prob)


def _wake(num_particles: int, scored: Callable) -> Callable[[Any, Any], Array]:
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}.")

    def objective(q: Any, p: Any) -> Array:
        log_density = log_density_of(p)

        def particle() -> tuple[Array, Array]:
            x, log_q = q.simulate(gradient="total", log_density=log_density)
            x, log_q = jax.lax.stop_gradient((x, log_q))
            return scored(q, log_density)(x), log_density(x) - log_q

        terms, log_w = vmap(particle, num_particles)
        return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(log_w)) * terms)

    return objective
