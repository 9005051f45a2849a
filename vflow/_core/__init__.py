"""Floor 1: types, numerics, the split of a module into trained leaves and the rest, errors."""

from vflow._core._errors import FitError as FitError
from vflow._core._errors import ProgramError as ProgramError
from vflow._core._estimate import Estimate as Estimate
from vflow._core._pytree import Frozen as Frozen
from vflow._core._pytree import apply_updates as apply_updates
from vflow._core._pytree import combine as combine
from vflow._core._pytree import params as params
from vflow._core._pytree import partition as partition
from vflow._core._pytree import stop_gradient as stop_gradient

__all__ = [
    "Estimate",
    "FitError",
    "Frozen",
    "ProgramError",
    "apply_updates",
    "combine",
    "params",
    "partition",
    "stop_gradient",
]
