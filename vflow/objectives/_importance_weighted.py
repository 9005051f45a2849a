"""Any function of importance weights."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from vflow.objectives._target import log_density_of
from vflow.programs import vmap

_GRADIENTS = (None, "total", "path", "auto", "dreg")


def importance_weighted(
    F: Callable[[Array], Array],
    num_particles: int,
    *,
    gradient: str | None = None,
    control: str | None = None,
) -> Callable[[Any, Any], Array]:
    r"""An objective $\mathbb{E}\,F(\log w_1, \dots, \log w_K)$, $\log w_k = \log p(x_k) - \log q(x_k)$.

    With `gradient="path"` the score terms, of mean zero only where F is linear, are replaced by
    an unbiased rule, which `vf.expect` applies to any program: here particle k's path term is
    weighted by $F_k - F_{kk}$, the first and second derivatives of F, for the parameters of q;
    those of p keep $F_k$. For the importance-weighted bound this is DReG.

    Args:
        F: the function, of (K,) log weights to a scalar.
        num_particles: K.
        gradient: "total", "path" (also called "dreg"), "auto", or None for that of `vf.expect`.
        control: for guides with score-function sites, as in `vf.vmap`: "vimco" or "loo".

    Returns:
        The objective `objective(q, p) -> scalar`, to be maximised; value and gradient unbiased.

    Raises:
        ValueError: an unknown gradient, or `num_particles` not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> spread = vf.objectives.importance_weighted(lambda log_w: -jnp.var(log_w), 4)
        >>> value = vf.expect(lambda q: spread(q, lambda x: -jnp.sum(x**2)))(jax.random.key(1), flow)

    Source: Tucker et al., Doubly Reparameterized Gradient Estimators (2018), of which this is the
    general form.
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}.")
    if gradient not in _GRADIENTS:
        raise ValueError(f"gradient must be one of {_GRADIENTS}, got {gradient!r}.")

    gradient = "path" if gradient == "dreg" else gradient

    def objective(q: Any, p: Any) -> Array:
        log_density = log_density_of(p)

        def log_weight() -> Array:
            x, log_q = q.simulate(gradient=gradient, log_density=log_density)
            return log_density(x) - log_q

        return F(vmap(log_weight, num_particles, control=control))

    return objective
