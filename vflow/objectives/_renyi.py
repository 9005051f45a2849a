"""Renyi bounds and the chi-square upper bound."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.objectives._importance_weighted import importance_weighted


def renyi(
    alpha: float,
    num_particles: int,
    *,
    gradient: str | None = None,
    control: str | None = None,
) -> Callable[[Any, Any], Array]:
    r"""The variational Renyi bound, $\frac{1}{1-\alpha} \log \frac1K \sum_k w_k^{1-\alpha}$.

    Unbiased for its own expectation at K particles, which tends to
    $\log Z - D_\alpha(q \| p/Z)$ as K grows: consistent, not unbiased, for that. alpha = 0 is the
    importance-weighted bound, alpha = 1 the ELBO; a lower bound of log Z for alpha in [0, 1] at
    every K.

    Args:
        alpha: the order, any real number.
        num_particles: K.
        gradient: "total", "path", or None for that of `vf.expect`.
        control: "vimco" for guides with score-function sites.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> bound = vf.objectives.renyi(0.5, 8)
        >>> value = vf.expect(lambda q: bound(q, lambda x: -jnp.sum(x**2)))(jax.random.key(1), flow)

    Source: Li and Turner, Renyi Divergence Variational Inference (2016), equation 12.
    """
    if not jnp.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha!r}.")

    def bound(log_w: Array) -> Array:
        if alpha == 1:
            return jnp.mean(log_w)
        return (jax.nn.logsumexp((1 - alpha) * log_w) - jnp.log(log_w.shape[0])) / (1 - alpha)

    return importance_weighted(bound, num_particles, gradient=gradient, control=control)


def chi_square(
    num_particles: int, *, order: float = 2.0, gradient: str | None = None
) -> Callable[[Any, Any], Array]:
    r"""The chi-square upper bound, negated: $-\frac1n \log \frac1K \sum_k w_k^n \to -\mathrm{CUBO}_n$.

    $\mathrm{CUBO}_n = \frac1n \log \mathbb{E}_q w^n \ge \log Z$. At K particles its estimate is low
    by Jensen's inequality: consistent, not unbiased.

    Args:
        num_particles: K.
        order: n, at least 1.
        gradient: "total", "path", or None for that of `vf.expect`.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> bound = vf.objectives.chi_square(64)
        >>> value = vf.expect(lambda q: bound(q, lambda x: -jnp.sum(x**2)))(jax.random.key(1), flow)

    Source: Dieng et al., Variational Inference via chi Upper Bound Minimization (2017), equation 2.
    """
    if not order >= 1:
        raise ValueError(f"order must be at least 1, got {order!r}.")

    def bound(log_w: Array) -> Array:
        return -(jax.nn.logsumexp(order * log_w) - jnp.log(log_w.shape[0])) / order

    return importance_weighted(bound, num_particles, gradient=gradient)
