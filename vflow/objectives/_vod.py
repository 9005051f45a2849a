"""The self-normalised Renyi bound (VOD)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow.objectives._target import log_density_of
from vflow.programs import vmap


def vod(
    log_likelihood: Callable[[Any], Array],
    alpha: float,
    num_particles: int,
    *,
    gradient: str | None = None,
    control: str | None = None,
) -> Callable[[Any, Any], Array]:
    r"""The self-normalised Renyi bound, for priors (and guides) known up to a constant only.

    $\frac{1}{1-\alpha} \log \frac1K \sum_k \hat v_k^{1-\alpha}$ with
    $\hat v_k = p(y|x_k)\,\zeta_k / \frac1K \sum_j \zeta_j$ and $\zeta = f(x)/q(x)$, f the unnormalised
    prior. Constants in f and q cancel. Consistent as K grows for
    $\log p(y) - D_\alpha(q \| p(x|y))$, neither unbiased nor a bound at finite K; its gradient is
    unbiased for the estimate's own expectation. alpha = 0 is the self-normalised estimate of the
    evidence, alpha = 1 its ELBO.

    Args:
        log_likelihood: $\log p(y|x)$ of the latent x.
        alpha: the order, any real number.
        num_particles: K, independent draws of q.
        gradient: "total", "path" or "auto", unbiased all three; None is that of `vf.expect`.
        control: "loo" for guides with score-function sites, as in `vf.vmap`.

    Returns:
        The objective `objective(q, p) -> scalar`, p the unnormalised log prior; to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> objective = vf.objectives.vod(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 0.5, 8)
        >>> prior = lambda x: 7.0 - 0.5 * jnp.sum(x**2)
        >>> value = vf.expect(lambda q: objective(q, prior))(jax.random.key(1), flow)

    Source: Lievin, Motzfeldt, Jensen and Winther, Variational Open-Domain Question Answering
    (2023), section 2.2, with equal weights in place of priority sampling.
    """
    if not jnp.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha!r}.")
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 2:
        raise ValueError(f"num_particles must be an integer, 2 or more, got {num_particles!r}.")

    def objective(q: Any, p: Any) -> Array:
        log_prior = log_density_of(p)

        def particle() -> tuple[Array, Array]:
            x, log_q = q.simulate(gradient=gradient, log_density=log_prior)
            return log_likelihood(x), log_prior(x) - log_q

        fit, log_zeta = vmap(particle, num_particles, control=control)
        log_v = fit + log_zeta - _log_mean_exp(log_zeta)
        if alpha == 1:
            return jnp.mean(log_v)
        return _log_mean_exp((1 - alpha) * log_v) / (1 - alpha)

    return objective


def _log_mean_exp(x: Array) -> Array:
    return jax.nn.logsumexp(x) - jnp.log(x.shape[0])
