"""Gaussian families."""

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vflow.bijections import Affine, LowRankAffine, TriangularAffine
from vflow.distributions import Flow, Normal
from vflow.flows._checks import check_count

_COVARIANCES = ("diagonal", "full", "low_rank")


def gaussian(
    key: PRNGKeyArray, dim: int, covariance: str = "diagonal", rank: int | None = None
) -> Flow:
    r"""A Gaussian family $N(\mu, \Sigma)$, started at the standard normal.

    "diagonal": $\Sigma = \operatorname{diag}(\sigma^2)$, 2 dim parameters. "full": $\Sigma = LL^\top$,
    every Gaussian, a dense triangle. "low_rank": $\Sigma = D(I + FF^\top)D$ and more with `rank` columns
    in $F$, linear in dim.

    Args:
        key: PRNG key; "low_rank" draws its directions from it, the others ignore it.
        dim: number of coordinates.
        covariance: "diagonal", "full" or "low_rank".
        rank: number of directions of "low_rank", 1 to dim; min(dim, 10) by default.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range, or a rank where there is none to choose.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 3, covariance="full")
        >>> print(f"{flow.log_prob(jnp.zeros(3)):.4f}")
        -2.7568
    """
    check_count("gaussian", "dim", dim)
    if covariance not in _COVARIANCES:
        raise ValueError(f"gaussian: covariance must be one of {_COVARIANCES}, got {covariance!r}.")
    if covariance != "low_rank" and rank is not None:
        raise ValueError(f"gaussian: rank is for covariance='low_rank', not {covariance!r}.")
    if covariance == "diagonal":
        bijection = Affine(jnp.zeros((dim,)), jnp.ones((dim,)))
    elif covariance == "full":
        bijection = TriangularAffine(dim)
    else:
        rank = min(dim, 10) if rank is None else rank
        check_count("gaussian", "rank", rank)
        if rank > dim:
            raise ValueError(f"gaussian: rank must be at most dim = {dim}, got {rank}.")
        bijection = LowRankAffine(key, dim, rank=rank)
    return Flow(Normal(dim), bijection)
