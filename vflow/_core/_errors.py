"""The exceptions that vflow raises on purpose."""

from typing import Any


class ProgramError(RuntimeError):
    """A model, guide or objective program is wrong; the message names the site and the remedy."""


class FitError(RuntimeError):
    """A fit could not be started, broke down, or is not to be trusted.

    Attributes:
        reasons: why, one sentence each.
        step: the optimisation step at which the fit broke down, or None.
        last_good: the last finite parameters (a flow), or None.
    """

    def __init__(
        self,
        message: str,
        *,
        reasons: tuple[str, ...] = (),
        step: int | None = None,
        last_good: Any = None,
    ):
        super().__init__(message)
        self.reasons = reasons
        self.step = step
        self.last_good = last_good
