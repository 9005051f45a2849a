"""The symmetric Kullback-Leibler divergence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.objectives._importance_weighted import importance_weighted


def symmetric_kl(num_particles: int, *, gradient: str | None = None) -> Callable[[Any, Any], Array]:
    r"""$-\mathrm{KL}(q \| p/Z) - \mathrm{KL}(p/Z \| q)$, the second by importance sampling from q.

    $\frac1K \sum_k \log w_k - \sum_k \tilde w_k \log w_k$ with $\tilde w$ the normalised weights; log Z
    cancels. Consistent as K grows, not unbiased for the divergence.

    Args:
        num_particles: K, at least 2.
        gradient: "total", "path", or None for that of `vf.expect`.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> objective = vf.objectives.symmetric_kl(64)
        >>> value = vf.expect(lambda q: objective(q, lambda x: -jnp.sum(x**2)))(
        ...     jax.random.key(1), flow
        ... )

    Source: Jeffreys (1946); the self-normalised estimate as in reweighted wake-sleep, Bornschein
    and Bengio (2015).
    """
    if num_particles == 1:
        raise ValueError(
            "symmetric_kl is 0 with a single particle: num_particles must be 2 or more."
        )

    def divergence(log_w: Array) -> Array:
        return jnp.mean(log_w) - jnp.sum(jax.nn.softmax(log_w) * log_w)

    return importance_weighted(divergence, num_particles, gradient=gradient)
