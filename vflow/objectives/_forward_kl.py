"""Maximum likelihood, also with the energy known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import stop_gradient
from vflow.flows.stochastic import StochasticFlow


def forward_kl(
    log_density: Callable[[Array], Array] | None,
    data: Array,
    batch_size: int | None = None,
    gradient: str = "total",
) -> Callable[..., Array]:
    r"""The mean log likelihood of data, $\frac1n \sum_i \log q(x_i) = -\mathrm{KL}(p\|q) + \mathrm{const}$.

    With `gradient="path"` and the log density p of the data known, the term
    $\partial_\theta \log q$ of mean zero under q is taken off: with $z = T^{-1}(x)$,
    $-(\partial_\theta z)^\top \nabla_z [\log p(T(z)) + \log|\det \partial T| - \log q_0(z)]$. It has no
    variance at q = p, and is unbiased where the data are draws from p.

    A stochastic flow has no exact density: each datum gets one reversed path, whose log estimate is low
    on average, so that the value is a lower bound of the log likelihood (forward KL on paths).

    Args:
        log_density: of the data, up to a constant; None for `gradient="total"`. Stochastic flows need
            it.
        data: (n, *shape) draws.
        batch_size: number of data in a minibatch, drawn afresh for every key; None takes all.
        gradient: "total" or "path" (for a `Flow`).

    Returns:
        An estimate `S(key, q) -> scalar`, to be maximised; value and gradient are unbiased over
        minibatches.

    Raises:
        ValueError: empty data, a batch larger than the data, an unknown gradient, or "path" without
            a log density.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> estimate = vf.objectives.forward_kl(None, jnp.zeros((10, 2)), batch_size=4)
        >>> print(f"{estimate(jax.random.key(1), flow):.4f}")
        -1.8379

    Source: Vaitl, Nicoli, Nakajima and Kessel, Path-Gradient Estimators for Continuous Normalizing
    Flows (2022); Vaitl et al., Fast and Unified Path Gradient Estimators (2024), section 4.
    """
    if gradient not in ("total", "path"):
        raise ValueError(f'gradient must be "total" or "path", got {gradient!r}.')
    if gradient == "path" and not callable(log_density):
        raise ValueError('gradient="path" needs the log density of the data.')
    take = minibatches(data, batch_size)

    def estimate(key: PRNGKeyArray, q: Any) -> Array:
        if isinstance(q, StochasticFlow):
            return _along_reversed_paths(key, q, log_density, take)
        one = (
            (lambda x: q.log_prob(x)) if gradient == "total" else lambda x: _path(q, log_density, x)
        )
        return jnp.mean(jax.vmap(one)(take(key)))

    return estimate


def minibatches(data: Array, batch_size: int | None) -> Callable[[PRNGKeyArray], Array]:
    """A function that draws a minibatch, without replacement; all data where there is no size."""
    data = jnp.asarray(data)
    if data.ndim == 0 or data.shape[0] == 0:
        raise ValueError(f"data must have draws along its leading axis, got shape {data.shape}.")
    n = data.shape[0]
    if batch_size is None:
        return lambda key: data
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 0 < batch_size <= n:
        raise ValueError(f"batch_size must be an integer in [1, {n}], got {batch_size!r}.")
    return lambda key: data[jax.random.choice(key, n, (batch_size,), replace=False)]


def _along_reversed_paths(key: PRNGKeyArray, q: Any, log_density: Any, take: Any) -> Array:
    if not callable(log_density):
        raise ValueError("forward_kl: a stochastic flow depends on the target: pass log_density.")
    key, key_paths = jax.random.split(key)
    x = take(key)
    keys = jax.random.split(key_paths, len(x))
    return jnp.mean(jax.vmap(lambda key, x: q.estimate_log_q(key, x, log_density))(keys, x))


def _path(q: Any, log_density: Any, x: Array) -> Array:
    if not (hasattr(q, "base") and hasattr(q, "bijection")):
        raise ValueError(f'gradient="path" is for a Flow, got {type(q).__name__}: use "total".')
    # The score of the data's density, carried back to the base.
    z, log_det, score = q.bijection.inverse_with_score(x, jax.grad(log_density)(x))
    base, still = stop_gradient((q.base, z))
    slope = jax.lax.stop_gradient(score - base.score(still))
    value = jax.lax.stop_gradient(q.base.log_prob(z) + log_det)
    # The base's own parameters act at fixed z.
    of_base = q.base.log_prob(still)
    return value - jnp.vdot(slope, z - still) + (of_base - jax.lax.stop_gradient(of_base))
