"""Floor 7: the training loop, the fit and what it returns."""

from vflow.fit._load import load as load
from vflow.fit._posterior import Posterior as Posterior
from vflow.fit._summary import Summary as Summary

__all__ = ["Posterior", "Summary", "load"]
