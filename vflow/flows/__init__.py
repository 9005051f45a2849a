"""Floor 4: flows by name; each constructor returns a `vf.distributions.Flow`."""

from vflow.flows._coupling import coupling as coupling
from vflow.flows._gaussian import gaussian as gaussian

__all__ = ["coupling", "gaussian"]
