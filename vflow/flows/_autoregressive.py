"""Masked and inverse autoregressive flows."""

from jaxtyping import Array, PRNGKeyArray

from vflow.bijections import (
    AbstractBijection,
    AbstractTransformer,
    Chain,
    Elementwise,
    Invert,
    MaskedAutoregressive,
    SinhArcsinhTransformer,
)
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_widths
from vflow.flows._splits import orders
from vflow.flows._stack import stack, unit_affine


def masked_autoregressive(
    key: PRNGKeyArray,
    dim: int,
    *,
    transformer: str | AbstractTransformer = "affine",
    num_layers: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    condition_dim: int | None = None,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A masked autoregressive flow: the density of data in one pass a layer. Identity start.

    $$x_i = \tau^{-1}(u_i; \phi_i(x_{<i}, c))$$

    For density estimation. Its draws go through the coordinates one by one (the flops are those of
    two passes, but in dim steps); `inverse_autoregressive` draws in one pass. Layers alternate between an
    order of the coordinates and its reverse, and a free elementwise affine map follows; see `coupling`
    for one coordinate, and `vf.bijections.MaskedAutoregressive` for the formulas.

    Args:
        key: PRNG key of the networks' weights; the orders do not depend on it.
        dim: number of coordinates.
        transformer: "affine", or a transformer object.
        num_layers: number of autoregressive layers.
        hidden: widths of each network's hidden layers.
        activation: their activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector, or None.
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.masked_autoregressive(jax.random.key(0), 3, num_layers=2, hidden=(8,))
        >>> print(f"{flow.log_prob(jnp.zeros(3)):.4f}")
        -2.7568

    Source:
        Papamakarios, Pavlakou & Murray 2017 (arXiv 1705.07057), section 3.
    """
    options = (transformer, num_layers, hidden, activation, condition_dim, base, tails)
    return _autoregressive("masked_autoregressive", Invert, key, dim, *options)


def inverse_autoregressive(
    key: PRNGKeyArray,
    dim: int,
    *,
    transformer: str | AbstractTransformer = "affine",
    num_layers: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    condition_dim: int | None = None,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""An inverse autoregressive flow: draws and their density in one pass a layer. Identity start.

    $$x_i = \tau(z_i; \phi_i(z_{<i}, c))$$

    For variational inference. The density of a point that is not its own draw takes dim steps; see
    `masked_autoregressive`, whose layers run the other way, for the options.

    Args:
        key: PRNG key of the networks' weights; the orders do not depend on it.
        dim: number of coordinates.
        transformer: "affine", or a transformer object.
        num_layers: number of autoregressive layers.
        hidden: widths of each network's hidden layers.
        activation: their activation, as in "silu", "tanh", "relu".
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
        >>> flow = vf.flows.inverse_autoregressive(jax.random.key(0), 3, num_layers=2, hidden=(8,))
        >>> x, log_q = flow.sample_and_log_prob(jax.random.key(1))
        >>> print(x.shape, log_q.shape)
        (3,) ()

    Source:
        Kingma et al. 2016 (arXiv 1606.04934), section 3.
    """
    options = (transformer, num_layers, hidden, activation, condition_dim, base, tails)
    return _autoregressive("inverse_autoregressive", lambda layer: layer, key, dim, *options)


def _autoregressive(
    owner, direct, key, dim, transformer, num_layers, hidden, activation, condition_dim, base, tails
) -> Flow:
    """Either flow; `direct` turns a layer round or leaves it."""
    base, last = check_common(
        owner, dim, num_layers=num_layers, condition_dim=condition_dim, base=base, tails=tails
    )
    if dim == 1 and transformer == "affine":
        transformer = SinhArcsinhTransformer()
    options = {
        "transformer": transformer,
        "hidden": check_widths(owner, "hidden", hidden),
        "activation": activation,
        "condition_dim": condition_dim,
    }

    def make_layer(key: PRNGKeyArray, order: Array) -> AbstractBijection:
        if dim == 1:
            return Elementwise(key, 1, **options)
        return direct(MaskedAutoregressive(key, dim, order=order, **options))

    layers = stack(make_layer, key, num_layers, orders(dim, num_layers))
    return Flow(base, Chain([layers, unit_affine(dim), *last]))
