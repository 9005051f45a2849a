"""A Monte Carlo estimate with its standard error."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A Monte Carlo estimate: `value` and its `standard_error`, in its unit (nats for bounds).

    `float(estimate)` is the value; formatting applies to the value: `f"{estimate:.2f}"`.

    Example:
        >>> import vflow as vf
        >>> print(vf.Estimate(-1.25, 0.03))
        -1.250 +- 0.030
    """

    value: float
    standard_error: float

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        return f"{float(self.value):.3f} +- {float(self.standard_error):.3f}"

    def __format__(self, spec: str) -> str:
        return format(float(self.value), spec) if spec else str(self)
