"""Continuous flows."""

from jaxtyping import PRNGKeyArray

from vflow.bijections import AbstractBijection, Chain, Continuous
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_widths
from vflow.flows._stack import unit_affine


def continuous(
    key: PRNGKeyArray,
    dim: int,
    *,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
    condition_dim: int | None = None,
    tolerance: float = 1e-5,
    adjoint: str = "recursive",
    trace: str = "exact",
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A velocity field integrated from time 0 to 1, then a free elementwise affine map.

    The log density is exact up to the tolerance of the solver, also of a draw found by going
    backwards. With `trace="hutchinson"` draws in objectives that are linear in $\log q$, as the ELBO
    is, have an unbiased estimate instead; the density of a point, importance-weighted objectives, the
    verdict of a fit and `resample` stay exact, and there is no path gradient. Needs diffrax, the `cnf`
    extra.

    Args:
        key: PRNG key of the network.
        dim: number of coordinates; the trace costs `dim` Jacobian columns per evaluation.
        hidden: widths of the hidden layers of the velocity.
        activation: their activation; smooth.
        condition_dim: length of the condition vector, or None.
        tolerance: relative and absolute tolerance of the solver.
        adjoint: "recursive", or "direct" where forward mode or second derivatives are needed.
        trace: "exact", or "hutchinson" for estimates where the objective allows them.
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ImportError: diffrax is not installed.
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.continuous(jax.random.key(0), 2, hidden=(8,))
        >>> print(f"{flow.log_prob(jnp.zeros(2)):.4f}")
        -1.8379

    Source:
        Chen et al. 2018 (arXiv 1806.07366); Grathwohl et al. 2019 (arXiv 1810.01367).
    """
    base, last = check_common(
        "continuous", dim, condition_dim=condition_dim, base=base, tails=tails
    )
    layer = Continuous(
        key,
        dim,
        hidden=check_widths("continuous", "hidden", hidden),
        activation=activation,
        condition_dim=condition_dim,
        tolerance=tolerance,
        adjoint=adjoint,
        trace=trace,
    )
    return Flow(base, Chain([layer, unit_affine(dim), *last]))
