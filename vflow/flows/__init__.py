"""Floor 4: flows by name; each constructor returns a `vf.distributions.Flow`."""

from vflow.flows._continuous import continuous as continuous
from vflow.flows._coupling import coupling as coupling
from vflow.flows._gaussian import gaussian as gaussian
from vflow.flows._injective import injective as injective
from vflow.flows._kernelised import kernelised as kernelised

__all__ = [
    "continuous",
    "coupling",
    "gaussian",
    "injective",
    "kernelised",
]
