"""Deterministic layers of a stochastic flow."""

from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from vflow.bijections import AbstractBijection
from vflow.flows._checks import check_count
from vflow.flows._coupling import coupling
from vflow.flows.stochastic._transition import AbstractTransition, LogDensity


class Deterministic(AbstractTransition):
    """A bijection as a layer: the pair of kernels without noise."""

    bijection: AbstractBijection
    reparameterised: ClassVar[bool] = True
    tempered: ClassVar[bool] = False

    def forward(self, key: PRNGKeyArray, x: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """The map and its log-determinant; key and log density are not used."""
        return self.bijection.forward_and_log_det(x)

    def reverse(self, key: PRNGKeyArray, y: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """The inverse and its log-determinant; key and log density are not used."""
        return self.bijection.inverse_and_log_det(y)


class _Couplings(eqx.Module):
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def build(self, key: PRNGKeyArray, dim: int) -> Deterministic:
        return Deterministic(coupling(key, dim, **dict(self.options)).bijection)


def couplings(
    *,
    num_layers: int,
    transformer: str = "affine",
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
) -> _Couplings:
    """Coupling layers between the sampling layers of a stochastic flow, started at the identity.

    Args:
        num_layers: number of coupling layers; 2 transform every coordinate once.
        transformer: "affine" or "spline".
        hidden: widths of each conditioner's hidden layers.
        activation: their activation, as in "silu", "tanh", "relu".

    Returns:
        A block for the list that `vf.flows.stochastic_flow` takes; listed twice, it is two blocks
        with weights of their own. Any bijection may stand in that list as well.

    Raises:
        ValueError: num_layers is not a positive integer.

    Example:
        >>> import jax, vflow as vf
        >>> S = vf.flows.stochastic
        >>> blocks = [S.couplings(num_layers=2), S.Langevin(num_steps=5, step_size=0.02)]
        >>> snf = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks * 2)
    """
    check_count("couplings", "num_layers", num_layers)
    options = {
        "num_layers": num_layers,
        "transformer": transformer,
        "hidden": tuple(hidden),
        "activation": activation,
    }
    return _Couplings(tuple(options.items()))
