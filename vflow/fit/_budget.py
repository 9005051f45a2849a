"""How much a fit may spend."""

import math
import time
from typing import Any, NamedTuple

import numpy as np


class Budget(NamedTuple):
    """The size of a fit's rounds of training.

    Attributes:
        num_steps: gradient steps of a round.
        num_samples: draws behind each gradient, in the first round.
        rounds: how many rounds at most; each after the first is an escalation.
        seconds: the wall clock at which training ends, from the start of the fit; None: steps count.
    """

    num_steps: int
    num_samples: int
    rounds: int
    seconds: float | None = None


_NAMED = {
    "quick": Budget(500, 128, 1),
    "default": Budget(2000, 128, 3),
    "thorough": Budget(6000, 256, 6),
}


def budget_of(value: Any, named: dict[str, Budget] = _NAMED) -> Budget:
    """The budget by its name, or the rounds of a default fit within a number of seconds.

    Args:
        value: "quick", "default", "thorough" or seconds.
        named: what these names stand for.

    Raises:
        ValueError, TypeError: neither a name nor a positive number.
    """
    if isinstance(value, str):
        if value not in named:
            raise ValueError(
                f"fit: budget must be one of {', '.join(map(repr, named))} or seconds, got {value!r}."
            )
        return named[value]
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(
            f"fit: budget must be one of {', '.join(map(repr, named))} or seconds, got {value!r}."
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"fit: budget in seconds must be positive and finite, got {value!r}.")
    return named["default"]._replace(rounds=named["thorough"].rounds, seconds=float(value))


class Clock:
    """Time since the start of a fit, against its budget.

    Args:
        seconds: the budget; None for one without end.
    """

    def __init__(self, seconds: float | None):
        self.began, self.seconds = time.monotonic(), seconds

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.seconds is not None and self.spent() >= self.seconds

    def allows(self, cost: float) -> bool:
        """Whether something that takes this many seconds still fits in."""
        return self.seconds is None or self.spent() + cost <= self.seconds
