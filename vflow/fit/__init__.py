"""Floor 7: the training loop, the fit and what it returns."""

from vflow.fit._density import DensityFit as DensityFit
from vflow.fit._density import fit_density as fit_density
from vflow.fit._fit import fit as fit
from vflow.fit._fit_fn import Fitted as Fitted
from vflow.fit._fit_fn import fit_fn as fit_fn
from vflow.fit._load import load as load
from vflow.fit._loop import Progress as Progress
from vflow.fit._maximize import Maximum as Maximum
from vflow.fit._maximize import maximize as maximize
from vflow.fit._posterior import Posterior as Posterior
from vflow.fit._refine import Refined as Refined
from vflow.fit._summary import Summary as Summary

__all__ = [
    "DensityFit",
    "Fitted",
    "Maximum",
    "Posterior",
    "Progress",
    "Refined",
    "Summary",
    "fit",
    "fit_density",
    "fit_fn",
    "load",
    "maximize",
]
