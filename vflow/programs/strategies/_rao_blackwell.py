"""Categorical choices: the likely values exactly, one draw for the rest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vflow.programs._site import Site, first_order
from vflow.programs._strategy import Strategy


@dataclasses.dataclass(frozen=True, repr=False)
class RaoBlackwell(Strategy):
    """See `rao_blackwell`."""

    num_exact: int

    def draw(self, site: Site) -> Any:
        """The base draw, or one of the alternatives: the likely values, and one of the rest."""
        if site.view.family() != "Categorical":
            raise site.error(
                f"rao_blackwell() is for categorical sites, got {site.view.family()}: use "
                "vf.disarm(), vf.measure_valued() or vf.reinforce()."
            )
        base = jnp.asarray(site.draw_detached())
        size, n = site.view.base().probs.shape[-1], base.size
        zero = first_order(site.view.parameter("probs", base, size), site.name).reshape(n, size)
        p = jax.lax.stop_gradient(site.view.parameter("probs", base, size)).reshape(n, size)
        _, likely = jax.lax.top_k(p, min(self.num_exact, size - 1))
        exact = jax.nn.one_hot(likely, size, dtype=bool).any(axis=1)
        rest = jnp.where(exact, 0.0, p)
        drawn = jax.random.categorical(jax.random.fold_in(site.key, 1), jnp.log(rest))[:, None]
        mass = jnp.take_along_axis(p, drawn, axis=1)
        ratio = jnp.where(
            mass > 0, rest.sum(axis=1, keepdims=True) / jnp.where(mass > 0, mass, 1), 0
        )
        # The draw of the rest is independent of the base draw, whose weight is a control variate.
        weights = jnp.concatenate(
            [
                jnp.take_along_axis(zero, likely, axis=1),
                jnp.take_along_axis(zero, drawn, axis=1) * ratio,
            ],
            axis=1,
        )
        choices = jnp.concatenate([likely, drawn], axis=1).astype(base.dtype)
        eye = jnp.eye(n, dtype=bool)[:, None, :]
        values = jnp.where(eye, choices[:, :, None], base.reshape(1, 1, n))
        return site.star(base, values.reshape((-1, *base.shape)), weights.ravel(), -weights.sum())


def rao_blackwell(num_exact: int = 1) -> Strategy:
    r"""Categorical sites: the `num_exact` likeliest values exactly, one draw for the others.

    $\sum_{a \in C} \nabla p_a F(a) + (1 - p(C)) \mathbb{E}_{a \notin C}[\nabla \log p_a F(a)]$,
    with the objective at an independent draw as control variate. Exact from K - 1 of K values on.
    Right in the first derivative; the second raises.

    Args:
        num_exact: how many values get an alternative of their own.

    Example:
        >>> import vflow as vf
        >>> vf.rao_blackwell(2)
        rao_blackwell(num_exact=2)

    Source: Liu, Regier, Tripuraneni, Jordan and McAuliffe, Rao-Blackwellized Stochastic Gradients
    for Discrete Distributions (2019), eq. 5.
    """
    if isinstance(num_exact, bool) or not isinstance(num_exact, int) or num_exact < 1:
        raise ValueError(f"num_exact must be a positive integer, got {num_exact!r}.")
    return RaoBlackwell(num_exact)
