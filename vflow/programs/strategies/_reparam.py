"""Reparameterisation: the value carries its derivative."""

import dataclasses
from typing import Any

from vflow.programs._site import Site
from vflow.programs._strategy import Strategy


@dataclasses.dataclass(frozen=True, repr=False)
class Reparam(Strategy):
    """See `reparam`."""

    def draw(self, site: Site) -> Any:
        """The reparameterised draw."""
        if not site.view.reparameterised:
            raise site.error(
                f"{site.view.family()} has no reparameterised sampler: use vf.enum(), "
                "vf.measure_valued() or vf.reinforce()."
            )
        return site.draw()


def reparam() -> Strategy:
    r"""Reparameterisation, $x = g(\epsilon; \theta)$: the derivative flows through the value.

    Example:
        >>> import vflow as vf
        >>> vf.reparam()
        reparam()
    """
    return Reparam()
