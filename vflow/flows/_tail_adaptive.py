"""Tail-adaptive flows."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from vflow.bijections import (
    AbstractBijection,
    AbstractTransformer,
    BlockLU,
    Chain,
    MaskedAutoregressive,
    Permute,
    TailCoupling,
)
from vflow.distributions import Flow, StudentT
from vflow.flows._checks import check_common, check_widths
from vflow.flows._splits import swaps
from vflow.flows._stack import stack, unit_affine


def tail_adaptive(
    key: PRNGKeyArray,
    dim: int,
    *,
    df: ArrayLike,
    trainable_df: bool = True,
    conditioner: str = "coupling",
    transformer: str | AbstractTransformer = "affine",
    num_layers: int = 8,
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
    condition_dim: int | None = None,
) -> Flow:
    r"""A flow whose light marginals stay light while its heavy ones have power tails.

    Marginally tail-adaptive: a base of independent normal (infinite df) and Student-t coordinates,
    and layers through which a heavy coordinate never reaches a light one. Each layer is a
    `TailCoupling` or, with `conditioner="autoregressive"`, a `MaskedAutoregressive` with the light
    coordinates first, then a `BlockLU` and a permutation inside the two groups, light and heavy; a free
    elementwise affine map follows. It starts at its base. With `trainable_df` the degrees of freedom
    are trained from `df` on (mTAF), else fixed (its variant with a fixed df); all infinite, or none,
    is fine.

    The gradient of an ELBO hardly sees the tails, so df moves slowly: start from a good value, as
    `vf.diagnostics.tails(...).df` is, and judge by k-hat. Every heavy marginal can take the heaviest
    tail of the group, as `BlockLU` mixes them. Below df of about 2 `heavy_tail` works better.

    Args:
        key: PRNG key of the networks' weights; the splits do not depend on it.
        dim: number of coordinates.
        df: degrees of freedom of each coordinate, shape `(dim,)`, infinite for a light one; or one
            number for all.
        trainable_df: whether the finite df are trained.
        conditioner: "coupling", whose networks see heavy coordinates through arcsinh; or
            "autoregressive", which sees them as they are, as published, and draws in one pass
            (the density of other points takes dim steps).
        transformer: "affine", or a transformer object with a bounded slope.
        num_layers: number of layers; 2 transform every coordinate once.
        hidden: widths of each network's hidden layers.
        activation: their activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector, or None.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: df is traced.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.tail_adaptive(jax.random.key(0), 3, df=jnp.array([jnp.inf, 3.0, 3.0]))
        >>> print(flow.base.df, f"{flow.log_prob(jnp.zeros(3)):.4f}")
        [inf  3.  3.] -2.9207

    Source:
        Laszkiewicz, Lederer & Fischer 2022 (arXiv 2206.10311); Liang, Mahoney & Hodgkinson 2022
        (arXiv 2205.07918) for the df of each coordinate.
    """
    check_common("tail_adaptive", dim, num_layers=num_layers, condition_dim=condition_dim)
    hidden = check_widths("tail_adaptive", "hidden", hidden)
    if isinstance(df, Tracer):
        raise TypeError("tail_adaptive: df must be a concrete array; build it outside jit.")
    df = jnp.asarray(df, float)
    if df.shape not in ((), (dim,)):
        raise ValueError(f"tail_adaptive: df has shape {df.shape}, expected () or ({dim},).")
    if conditioner not in ("coupling", "autoregressive"):
        raise ValueError(
            f'tail_adaptive: conditioner must be "coupling" or "autoregressive", got {conditioner!r}.'
        )
    base = StudentT(jnp.broadcast_to(df, (dim,)), trainable=trainable_df)

    heavy = np.isin(np.arange(dim), base.heavy)
    grouped = np.argsort(heavy, kind="stable")
    sizes = int(dim - heavy.sum()), int(heavy.sum())
    options = {
        "transformer": transformer,
        "hidden": hidden,
        "activation": activation,
        "condition_dim": condition_dim,
    }

    def make_layer(key: PRNGKeyArray, permutation: Array) -> AbstractBijection:
        if conditioner == "coupling":
            layer = TailCoupling(key, *sizes, **options)
        else:
            layer = MaskedAutoregressive(key, dim, **options)
        return Chain([layer, *([BlockLU(sizes)] if dim > 1 else []), Permute(permutation)])

    layers = stack(make_layer, key, num_layers, _permutations(sizes, num_layers))
    ungroup = Permute(np.argsort(grouped))
    return Flow(base, Chain([Permute(grouped), layers, ungroup, unit_affine(dim)]))


def _permutations(sizes: tuple[int, int], num_layers: int) -> np.ndarray:
    """The permutation after each layer: inside the groups, the last one back to the start."""
    parts, first = [], 0
    for size in sizes:
        parts.append(first + swaps(size, num_layers))
        first += size
    return np.concatenate(parts, axis=1)
