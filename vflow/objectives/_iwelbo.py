"""The importance-weighted bound."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.objectives._importance_weighted import importance_weighted


def iwelbo(
    num_particles: int, *, gradient: str | None = None, control: str | None = None
) -> Callable[[Any, Any], Array]:
    r"""The importance-weighted bound, $\mathbb{E} \log \frac1K \sum_k p(x_k)/q(x_k) \le \log Z$.

    Value and gradient are unbiased for the bound of K particles, whichever the gradient.

    Args:
        num_particles: K; 1 is the ELBO.
        gradient: "total", "path" (DReG), or None for that of `vf.expect`.
        control: "vimco" for guides with score-function sites.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> bound = vf.objectives.iwelbo(8, gradient="path")
        >>> value = vf.expect(lambda q: bound(q, lambda x: -jnp.sum(x**2)))(jax.random.key(1), flow)

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders (2016), equation 8.
    """
    return importance_weighted(_log_mean_exp, num_particles, gradient=gradient, control=control)


def _log_mean_exp(log_w: Array) -> Array:
    return jax.nn.logsumexp(log_w) - jnp.log(log_w.shape[0])
