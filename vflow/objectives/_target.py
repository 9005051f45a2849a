"""What an objective accepts as its target."""

from collections.abc import Callable
from typing import Any

from vflow._core import ProgramError
from vflow.programs import Program


def log_density_of(p: Any) -> Callable[..., Any]:
    """The log density of a target or program (its `log_prob`), or of a plain function (itself).

    Raises:
        TypeError: p is neither.
    """
    log_prob = getattr(p, "log_prob", p)
    if not callable(log_prob):
        raise TypeError(
            "p must have a log_prob method (a target, a program) or be a log density, a function "
            f"of x; got {type(p).__name__}."
        )
    if not isinstance(p, Program):
        return log_prob

    def log_density(values: Any) -> Any:
        if not isinstance(values, dict):
            raise ProgramError(
                "p is a program over named sites, but q draws arrays: pass vf.target(p), its "
                "density on unconstrained vectors."
            )
        return log_prob(values)

    return log_density
