"""Block neural autoregressive flows."""

from jaxtyping import PRNGKeyArray

from vflow.bijections import AbstractBijection, BlockAutoregressive, Chain, Flip
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_widths
from vflow.flows._stack import stack, unit_affine


def block_autoregressive(
    key: PRNGKeyArray,
    dim: int,
    *,
    num_layers: int = 2,
    hidden: tuple[int, ...] = (8, 8),
    condition_dim: int | None = None,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A block neural autoregressive flow: dense networks that are triangular monotone maps.

    Draws and their densities are one pass a layer; the density of another point solves one monotone
    equation a coordinate and layer. Layers run through the coordinates in alternating directions, and
    a free elementwise affine map follows. The flow starts near its base, not at it.

    Args:
        key: PRNG key of the weights.
        dim: number of coordinates.
        num_layers: number of layers.
        hidden: units *of each coordinate* in the hidden layers.
        condition_dim: length of the condition vector, or None.
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, vflow as vf
        >>> flow = vf.flows.block_autoregressive(jax.random.key(0), 2, num_layers=1, hidden=(3,))
        >>> print(flow.sample(jax.random.key(1)).shape)
        (2,)

    Source:
        De Cao, Titov & Aziz 2019 (arXiv 1904.04676).
    """
    owner = "block_autoregressive"
    base, last = check_common(
        owner, dim, num_layers=num_layers, condition_dim=condition_dim, base=base, tails=tails
    )
    hidden = check_widths(owner, "hidden", hidden)

    def make_layer(key: PRNGKeyArray) -> AbstractBijection:
        layer = BlockAutoregressive(key, dim, hidden=hidden, condition_dim=condition_dim)
        return Chain([layer, Flip(dim)])

    layers = stack(make_layer, key, num_layers)
    back = [Flip(dim)] if num_layers % 2 else []  # coordinates leave in their order
    return Flow(base, Chain([layers, *back, unit_affine(dim), *last]))
