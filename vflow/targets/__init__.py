"""Floor 6: from a program to a log density on unconstrained R^d."""

from vflow.targets._site import Site as Site
from vflow.targets._target import Target as Target
from vflow.targets._target import target as target

__all__ = ["Site", "Target", "target"]
