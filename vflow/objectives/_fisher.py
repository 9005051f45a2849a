"""Score matching and the Fisher divergence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.objectives._forward_kl import minibatches
from vflow.objectives._target import log_density_of


def fisher() -> Callable[[Any, Any], Array]:
    r"""The Fisher divergence, negated: $-\mathbb{E}_q \|\nabla \log p(x) - \nabla \log q(x)\|^2$.

    Value and gradient unbiased; log Z plays no part. q needs `score` (a `Flow` has it). No log
    density of the draw enters, so that path and total gradient are the same.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> log_p = lambda x: -0.5 * jnp.sum(x**2)
        >>> estimate = vf.expect(lambda q: vf.objectives.fisher()(q, log_p))
        >>> print(abs(float(estimate(jax.random.key(1), flow))) < 1e-6)
        True

    Source: Hyvaerinen, Estimation of Non-Normalized Statistical Models by Score Matching (2005),
    equation 2, with the roles of data and model exchanged.
    """

    def objective(q: Any, p: Any) -> Array:
        log_density = log_density_of(p)
        x, _ = q.simulate(gradient="total", log_density=log_density)
        return -jnp.sum((jax.grad(log_density)(x) - q.score(x)) ** 2)

    return objective


def score_matching(data: Array, batch_size: int | None = None) -> Callable[..., Array]:
    r"""Implicit score matching, negated: $-\mathbb{E}[\tfrac12 \|s(x)\|^2 + \mathrm{tr}\,\nabla s(x)]$.

    The mean is over the data, $s = \nabla \log q$. Up to a constant, minus half
    the Fisher divergence between data and q. The trace is exact, at the cost of d Jacobian columns.

    Args:
        data: (n, d) draws.
        batch_size: number of data in a minibatch; None takes all.

    Returns:
        An estimate `S(key, q) -> scalar`, to be maximised; unbiased over minibatches.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> estimate = vf.objectives.score_matching(jnp.zeros((10, 2)))
        >>> print(f"{estimate(jax.random.key(1), flow):.4f}")
        2.0000

    Source: Hyvaerinen, Estimation of Non-Normalized Statistical Models by Score Matching (2005),
    theorem 1.
    """
    take = minibatches(data, batch_size)

    def estimate(key: PRNGKeyArray, q: Any) -> Array:
        def one(x: Array) -> Array:
            return -0.5 * jnp.sum(q.score(x) ** 2) - jnp.trace(jax.jacfwd(q.score)(x))

        return jnp.mean(jax.vmap(one)(take(key)))

    return estimate
