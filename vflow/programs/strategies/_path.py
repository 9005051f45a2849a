"""Path gradients of a single site."""

import dataclasses
from typing import Any

from vflow.programs._site import Site
from vflow.programs._strategy import Strategy
from vflow.programs.strategies._reparam import Reparam


@dataclasses.dataclass(frozen=True, repr=False)
class Path(Strategy):
    """See `path`."""

    def draw(self, site: Site) -> Any:
        """The reparameterised draw; `simulate` treats its log density."""
        return Reparam().draw(site)


def path() -> Strategy:
    r"""Reparameterisation whose log density, as `simulate` returns it, carries path gradients only.

    $\nabla_\theta \log q(x;\theta)$ at fixed $x$ is dropped. `vf.expect` keeps the gradient of the
    objective unbiased: where it is not linear in the log density, what was dropped has a mean, which
    is put back along the sampling path.

    Example:
        >>> import vflow as vf
        >>> vf.path()
        path()

    Source: Roeder, Wu and Duvenaud, Sticking the Landing (2017).
    """
    return Path()
