"""Floor 4: flows by name; each constructor returns a `vf.distributions.Flow`."""

from vflow.flows import stochastic as stochastic
from vflow.flows._autoregressive import inverse_autoregressive as inverse_autoregressive
from vflow.flows._autoregressive import masked_autoregressive as masked_autoregressive
from vflow.flows._block_autoregressive import block_autoregressive as block_autoregressive
from vflow.flows._continuous import continuous as continuous
from vflow.flows._coupling import coupling as coupling
from vflow.flows._gaussian import gaussian as gaussian
from vflow.flows._heavy_tail import heavy_tail as heavy_tail
from vflow.flows._injective import injective as injective
from vflow.flows._kernelised import kernelised as kernelised
from vflow.flows._mixture import mixture as mixture
from vflow.flows._planar import planar as planar
from vflow.flows._planar import radial as radial
from vflow.flows._planar import sylvester as sylvester
from vflow.flows._residual import residual as residual
from vflow.flows._stochastic import stochastic_flow as stochastic_flow
from vflow.flows._tail_adaptive import tail_adaptive as tail_adaptive

__all__ = [
    "block_autoregressive",
    "continuous",
    "coupling",
    "gaussian",
    "heavy_tail",
    "injective",
    "inverse_autoregressive",
    "kernelised",
    "masked_autoregressive",
    "mixture",
    "planar",
    "radial",
    "residual",
    "stochastic",
    "stochastic_flow",
    "sylvester",
    "tail_adaptive",
]
