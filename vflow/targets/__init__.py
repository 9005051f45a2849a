"""Floor 6: from a program to a log density on unconstrained R^d."""

from vflow.targets._decentre import decentre as decentre
from vflow.targets._decentre import funnels as funnels
from vflow.targets._preflight import preflight as preflight
from vflow.targets._preflight import site_table as site_table
from vflow.targets._site import Site as Site
from vflow.targets._target import Target as Target
from vflow.targets._target import target as target

__all__ = ["Site", "Target", "decentre", "funnels", "preflight", "site_table", "target"]
