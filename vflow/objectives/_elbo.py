"""The evidence lower bound."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from vflow.objectives._target import log_density_of


def elbo(*, gradient: str | None = None) -> Callable[[Any, Any], Array]:
    r"""The evidence lower bound, to be maximised.

    $$\mathrm{ELBO}(q, p) = E_{x\sim q}[\log p(x) - \log q(x)] = \log Z - \mathrm{KL}(q\,\|\,p/Z)$$

    Args:
        gradient: "total", "path" or "auto", unbiased all three; None is that of `vf.expect`.

    Returns:
        The objective, a program `objective(q, p) -> scalar` for `vf.expect` or `vf.fit`: q is
        anything with `simulate`, p a target, a program, or a plain log density.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> log_density = lambda x: -0.5 * jnp.sum(x**2)
        >>> bound = vf.expect(lambda q: vf.objectives.elbo()(q, log_density), num_samples=10)
        >>> print(f"{bound(jax.random.key(1), flow):.4f}")
        1.8379

    Source:
        Jordan, Ghahramani, Jaakkola & Saul 1999; with flows: Rezende & Mohamed 2015 (arXiv
        1505.05770), equation 15.
    """

    def objective(q: Any, p: Any) -> Array:
        log_density = log_density_of(p)
        x, log_q = q.simulate(gradient=gradient, log_density=log_density)
        return log_density(x) - log_q

    return objective
