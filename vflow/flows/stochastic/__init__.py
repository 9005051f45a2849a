"""Layers of stochastic flows: sampling steps between and after bijections."""

from vflow.flows.stochastic._couplings import couplings as couplings
from vflow.flows.stochastic._flow import StochasticFlow as StochasticFlow
from vflow.flows.stochastic._flow import Trajectory as Trajectory
from vflow.flows.stochastic._langevin import ControlledLangevin as ControlledLangevin
from vflow.flows.stochastic._langevin import Langevin as Langevin
from vflow.flows.stochastic._metropolis import HMC as HMC
from vflow.flows.stochastic._metropolis import MALA as MALA
from vflow.flows.stochastic._metropolis import Metropolis as Metropolis
from vflow.flows.stochastic._proposal import Proposal as Proposal
from vflow.flows.stochastic._smc import Particles as Particles
from vflow.flows.stochastic._smc import sequential_monte_carlo as sequential_monte_carlo
from vflow.flows.stochastic._transition import AbstractTransition as AbstractTransition
from vflow.flows.stochastic._underdamped import UnderdampedLangevin as UnderdampedLangevin

__all__ = [
    "HMC",
    "MALA",
    "AbstractTransition",
    "ControlledLangevin",
    "Langevin",
    "Metropolis",
    "Particles",
    "Proposal",
    "StochasticFlow",
    "Trajectory",
    "UnderdampedLangevin",
    "couplings",
    "sequential_monte_carlo",
]
