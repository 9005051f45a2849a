"""vflow: variational inference with normalizing flows, written as programs, on JAX."""

from importlib import metadata as _metadata

from vflow._core import Estimate as Estimate
from vflow._core import FitError as FitError
from vflow._core import ProgramError as ProgramError
from vflow._core import apply_updates as apply_updates
from vflow._core import params as params
from vflow._core._platform import warn_of_known_bad_jaxlib as _warn_of_known_bad_jaxlib

try:
    __version__ = _metadata.version("vflow-jax")
except _metadata.PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+unknown"

_warn_of_known_bad_jaxlib()

__all__ = [
    "Estimate",
    "FitError",
    "ProgramError",
    "__version__",
    "apply_updates",
    "params",
]
