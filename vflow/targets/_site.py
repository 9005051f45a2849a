"""What a target knows about one of its sites."""

import dataclasses
from typing import Any

from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to

from vflow._core import ProgramError
from vflow.programs._support import describe as describe


@dataclasses.dataclass(frozen=True)
class Site:
    """A latent site and where it sits in the unconstrained vector.

    Attributes:
        name: the name of the site.
        shape: the shape of its constrained value.
        start: its first unconstrained coordinate.
        stop: one past its last unconstrained coordinate.
        unconstrained_shape: the shape of its unconstrained value, `stop - start` in size.
        support: the support, in words.
        dims: for each axis of `shape` the name of the plate along it, or None.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    unconstrained_shape: tuple[int, ...]
    support: str
    dims: tuple[str | None, ...]

    @property
    def slice(self) -> slice:
        """Where the site sits in the unconstrained vector."""
        return slice(self.start, self.stop)


def transform_of(name: str, support: Any) -> Transform:
    """The bijection from unconstrained space onto a support; a ProgramError names the site."""
    if support is None or not isinstance(support, constraints.Constraint):
        raise ProgramError(f"site {name!r} has no support: {support!r} is not a constraint.")
    try:
        if not support.is_discrete:
            return biject_to(support)
        why = (
            "it is discrete. Marginalise it inside the model, or give it a gradient strategy in an "
            f"objective program, vf.from_numpyro(model, ..., strategies={{{name!r}: vf.enum()}})"
        )
    except NotImplementedError:
        why = f"NumPyro has no bijection onto its support ({describe(support)})"
        if "sphere" in repr(support).lower():
            why = "it lies on a sphere: use numpyro.infer.reparam.ProjectedNormalReparam"
    raise ProgramError(f"latent site {name!r} cannot be moved to an unconstrained space: {why}.")
