"""vflow: variational inference with normalizing flows, written as programs, on JAX."""

from importlib import metadata as _metadata

from vflow import bijections as bijections
from vflow import diagnostics as diagnostics
from vflow import distributions as distributions
from vflow import flows as flows
from vflow import objectives as objectives
from vflow import programs as programs
from vflow import targets as targets
from vflow._core import Estimate as Estimate
from vflow._core import FitError as FitError
from vflow._core import ProgramError as ProgramError
from vflow._core import apply_updates as apply_updates
from vflow._core import params as params
from vflow._core._platform import warn_of_known_bad_jaxlib as _warn_of_known_bad_jaxlib
from vflow.diagnostics import check_unbiased as check_unbiased
from vflow.distributions import sample_and_log_prob as sample_and_log_prob
from vflow.fit import DensityFit as DensityFit
from vflow.fit import Maximum as Maximum
from vflow.fit import Posterior as Posterior
from vflow.fit import Progress as Progress
from vflow.fit import Refined as Refined
from vflow.fit import fit as fit
from vflow.fit import fit_density as fit_density
from vflow.fit import fit_fn as fit_fn
from vflow.fit import load as load
from vflow.fit import maximize as maximize
from vflow.programs import Program as Program
from vflow.programs import cond as cond
from vflow.programs import cost as cost
from vflow.programs import exact_enumeration as exact_enumeration
from vflow.programs import expect as expect
from vflow.programs import from_numpyro as from_numpyro
from vflow.programs import importance as importance
from vflow.programs import marginal as marginal
from vflow.programs import normalize as normalize
from vflow.programs import program as program
from vflow.programs import sample as sample
from vflow.programs import scan as scan
from vflow.programs import smc as smc
from vflow.programs import strategies as strategies
from vflow.programs import value_and_grad as value_and_grad
from vflow.programs import vmap as vmap
from vflow.programs.strategies import Strategy as Strategy
from vflow.programs.strategies import disarm as disarm
from vflow.programs.strategies import enum as enum
from vflow.programs.strategies import implicit as implicit
from vflow.programs.strategies import measure_valued as measure_valued
from vflow.programs.strategies import path as path
from vflow.programs.strategies import rao_blackwell as rao_blackwell
from vflow.programs.strategies import reinforce as reinforce
from vflow.programs.strategies import reparam as reparam
from vflow.targets import Target as Target
from vflow.targets import target as target

try:
    __version__ = _metadata.version("vflow-jax")
except _metadata.PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+unknown"

_warn_of_known_bad_jaxlib()

__all__ = [
    "DensityFit",
    "Estimate",
    "FitError",
    "Maximum",
    "Posterior",
    "Program",
    "ProgramError",
    "Progress",
    "Refined",
    "Strategy",
    "Target",
    "apply_updates",
    "bijections",
    "check_unbiased",
    "cond",
    "cost",
    "diagnostics",
    "disarm",
    "distributions",
    "enum",
    "exact_enumeration",
    "expect",
    "fit",
    "fit_density",
    "fit_fn",
    "flows",
    "from_numpyro",
    "implicit",
    "importance",
    "load",
    "marginal",
    "maximize",
    "measure_valued",
    "normalize",
    "objectives",
    "params",
    "path",
    "program",
    "programs",
    "rao_blackwell",
    "reinforce",
    "reparam",
    "sample",
    "sample_and_log_prob",
    "scan",
    "smc",
    "strategies",
    "target",
    "targets",
    "value_and_grad",
    "vmap",
]
