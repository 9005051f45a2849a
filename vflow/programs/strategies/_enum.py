"""Exact sums over a finite support."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from vflow.programs._site import Site
from vflow.programs._strategy import Strategy


@dataclasses.dataclass(frozen=True, repr=False)
class Enum(Strategy):
    """See `enum`."""

    def draw(self, site: Site) -> Any:
        """The value at this lane's position in the support."""
        if site.looped:
            raise site.error(
                "enum() inside vf.vmap or vf.scan would enumerate the joint of all iterations: use "
                "vf.measure_valued() or vf.reinforce() there, or, where the cost is a sum over "
                "items, one vf.expect per item, jax.vmap(vf.expect(body))(keys, items).sum()."
            )
        base = site.draw_detached()
        batch = tuple(getattr(site.view.dist, "batch_shape", ()))
        if math.prod(batch) > 1:
            raise site.error(
                f"enum() takes a single choice, the distribution has batch shape {batch}: use one "
                "site per entry, vf.measure_valued() or vf.reinforce()."
            )
        return site.enumerate(site.view.support(jnp.asarray(base)))


def enum() -> Strategy:
    r"""The exact sum $\sum_v p(v;\theta) F(v)$ over a finite support; no variance from this site.

    The sites of one program multiply: n sites of two values are 2^n evaluations (the compiled code
    stays linear in n).

    Example:
        >>> import vflow as vf
        >>> vf.enum()
        enum()
    """
    return Enum()
