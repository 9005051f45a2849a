"""Is the support of a guide's site contained in that of the model's?"""

import math
from typing import Any

import numpy as np
from jax.core import Tracer

from vflow._core import ProgramError


def check_support(name: str, guide: Any, model: Any) -> None:
    """Refuse a draw from one support where the model has another, as far as that can be told.

    Args:
        name: of the site.
        guide: the support its value was drawn from, a NumPyro constraint; None if not known.
        model: the support at the model's site.

    Raises:
        ProgramError: the guide's support is wider, or one of the two is discrete.
    """
    if guide is None or model is None:
        return
    if guide.is_discrete != model.is_discrete:
        kinds = ("discrete", "continuous") if guide.is_discrete else ("continuous", "discrete")
        raise ProgramError(
            f"site {name!r} is {kinds[0]} in the guide and {kinds[1]} in the model: their "
            "densities cannot be compared. Give it a distribution of the model's kind."
        )
    if _is_wider(guide, model):
        raise ProgramError(
            f"site {name!r}: the guide's support ({describe(guide)}) is wider than the model's "
            f"({describe(model)}), so that some draws have log density -inf. Use a distribution on "
            "the model's support (LogNormal or Gamma for a positive site, Beta for a unit "
            "interval), or a dist.TransformedDistribution onto it."
        )


def describe(support: Any) -> str:
    """A support in a word or two, without the values that may be traced."""
    return type(_base(support)).__name__.strip("_").lower()


def _is_wider(guide: Any, model: Any) -> bool:
    """True only where it is certain."""
    inner, outer = _bounds(guide), _bounds(model)
    if inner is None:
        return False
    if outer is None:  # simplices, ordered vectors, matrices: no room for an unbounded coordinate
        known = model.event_dim > 0 and type(_base(model)).__name__ not in ("_Dependent", "_Cat")
        return known and math.inf in (-_known(inner[0]), _known(inner[1]))
    return _below(inner[0], outer[0]) or _below(-inner[1], -outer[1])


def _base(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _bounds(support: Any) -> tuple[Any, Any] | None:
    """Lower and upper bound where the support is a product of intervals or of ranges of integers."""
    support = _base(support)
    kind = type(support).__name__
    if kind == "_Real":
        return -math.inf, math.inf
    if kind == "_Boolean":
        return 0, 1
    if hasattr(support, "lower_bound") or hasattr(support, "upper_bound"):
        lower = getattr(support, "lower_bound", -math.inf)
        return lower, getattr(support, "upper_bound", math.inf)
    return None


def _known(bound: Any) -> float:
    """A scalar bound; NaN where it is traced or an array."""
    return math.nan if isinstance(bound, Tracer) or np.ndim(bound) else float(bound)


def _below(a: Any, b: Any) -> bool:
    """Whether some a is below its b by more than rounding; False where that cannot be told."""
    if _known(a) == -math.inf:  # below whatever finite bound, also one that is traced
        return _known(b) != -math.inf
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    a, b = np.asarray(a, float), np.asarray(b, float)
    with np.errstate(invalid="ignore"):
        return bool(np.any(a < b - 1e-6 * (1.0 + np.abs(b))))
