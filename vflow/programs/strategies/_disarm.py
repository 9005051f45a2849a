"""Antithetic pairs of binary choices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vflow.programs._site import Site, first_order
from vflow.programs._strategy import Strategy


@dataclasses.dataclass(frozen=True, repr=False)
class Disarm(Strategy):
    """See `disarm`."""

    def draw(self, site: Site) -> Any:
        """One of the pair in the base lane, the other in a lane of its own."""
        if site.view.family() != "Bernoulli":
            raise site.error(
                f"disarm() is for Bernoulli sites, got {site.view.family()}: use "
                "vf.rao_blackwell(), vf.measure_valued() or vf.reinforce()."
            )
        like = jnp.asarray(site.draw_detached())
        logits = site.view.parameter("logits", like)
        detached = jax.lax.stop_gradient(logits)
        p = jax.nn.sigmoid(detached)
        u = jax.random.uniform(site.key, like.shape, p.dtype)
        base = (1 - u < p).astype(like.dtype)
        other = (u < p).astype(like.dtype)
        slope = 0.5 * (1.0 - 2.0 * other) * (base != other) * jax.nn.sigmoid(jnp.abs(detached))
        weight = jnp.sum(slope * first_order(logits, site.name))
        return site.star(base, other[None], -weight[None], weight)


def disarm() -> Strategy:
    r"""DisARM for Bernoulli sites of any shape, with one alternative for all their components.

    $\partial_{\phi_i} \mathbb{E} F = \mathbb{E}\, \tfrac12 (F(b) - F(\tilde b)) (-1)^{\tilde b_i}
    1[b_i \ne \tilde b_i]\, \sigma(|\phi_i|)$ with $b = 1[1 - u < \sigma(\phi)]$,
    $\tilde b = 1[u < \sigma(\phi)]$. Right in the first derivative; the second raises.

    Example:
        >>> import vflow as vf
        >>> vf.disarm()
        disarm()

    Source: Dong, Mnih and Tucker, DisARM (2020), eq. 7; Yin, Zhou (2019) for ARM.
    """
    return Disarm()
