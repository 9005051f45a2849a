"""What an objective accepts as its target."""

from collections.abc import Callable
from typing import Any


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
    return log_prob
