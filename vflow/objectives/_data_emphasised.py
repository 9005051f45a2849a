"""The data-emphasised ELBO."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from vflow.objectives._target import log_density_of


def data_emphasised_elbo(
    log_likelihood: Callable[[Any], Array], kappa: float, *, gradient: str | None = None
) -> Callable[[Any, Any], Array]:
    r"""The data-emphasised ELBO, $\mathbb{E}_q[\kappa \log p(y|x) + \log p(x) - \log q(x)]$.

    Value and gradient unbiased. With $\kappa > 1$ it is not a bound of log Z but one of the evidence
    of the likelihood to the power $\kappa$; its source takes $\kappa$ = parameters / observations to
    learn prior scales.

    Args:
        log_likelihood: $\log p(y|x)$ of the latent x alone; p is the joint density.
        kappa: how many times the likelihood counts; 1 is the ELBO.
        gradient: "total", "path" or "auto", unbiased all three; None is that of `vf.expect`.

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> likelihood = lambda x: -0.5 * jnp.sum((x - 1.0) ** 2)
        >>> joint = lambda x: likelihood(x) - 0.5 * jnp.sum(x**2)
        >>> objective = vf.objectives.data_emphasised_elbo(likelihood, 3.0)
        >>> value = vf.expect(lambda q: objective(q, joint))(jax.random.key(1), flow)

    Source: Harvey, Petrov and Hughes, Learning Hyperparameters via a Data-Emphasized Variational
    Objective (2025).
    """
    if not kappa > 0:
        raise ValueError(f"kappa must be positive, got {kappa!r}.")

    def objective(q: Any, p: Any) -> Array:
        log_density = log_density_of(p)
        x, log_q = q.simulate(gradient=gradient, log_density=log_density)
        return log_density(x) + (kappa - 1) * log_likelihood(x) - log_q

    return objective
