"""Coupling flows."""

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.bijections import (
    AbstractBijection,
    AbstractTransformer,
    Chain,
    Coupling,
    Elementwise,
    Permute,
    SharedCoupling,
    SinhArcsinhTransformer,
)
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_widths
from vflow.flows._splits import swaps
from vflow.flows._stack import stack, unit_affine


def coupling(
    key: PRNGKeyArray,
    dim: int,
    *,
    transformer: str | AbstractTransformer = "affine",
    num_layers: int = 8,
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
    condition_dim: int | None = None,
    shared_trunk: bool = False,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A stack of coupling layers, started at the identity.

    Each layer holds half of the coordinates fixed and transforms the others given them; the halves
    change from layer to layer so that every coordinate soon meets every other. A free elementwise
    affine map follows. The layers are one compiled body (`vf.bijections.Scan`), so compile time
    does not grow with their number. With one coordinate there is nothing to split: the layers are then
    elementwise, and "affine" ones, which could only shift and scale, give way to
    `SinhArcsinhTransformer`.

    Args:
        key: PRNG key of the conditioners' weights; the splits do not depend on it.
        dim: number of coordinates.
        transformer: "affine", "spline", or a transformer object.
        num_layers: number of coupling layers; 2 transform every coordinate once.
        hidden: widths of each conditioner's hidden layers.
        activation: their activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector, or None.
        shared_trunk: one network for all layers, with a small head, gates and an embedding for each
            (`vf.bijections.SharedCoupling`): fewer parameters in deep stacks. Without effect where
            dim is 1.
        base: distribution on `(dim,)`; standard normal by default. Base coordinate i becomes
            coordinate i: layers hand coordinates back in their order.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.coupling(jax.random.key(0), 3, num_layers=4)
        >>> print(f"{flow.log_prob(jnp.zeros(3)):.4f}")
        -2.7568

    Source:
        Dinh, Sohl-Dickstein & Bengio 2017 (arXiv 1605.08803).
    """
    base, last = check_common(
        "coupling", dim, num_layers=num_layers, condition_dim=condition_dim, base=base, tails=tails
    )
    hidden = check_widths("coupling", "hidden", hidden)
    if dim == 1 and transformer == "affine":
        transformer = SinhArcsinhTransformer()
    options = {
        "transformer": transformer,
        "hidden": hidden,
        "activation": activation,
        "condition_dim": condition_dim,
    }

    def make_layer(key: PRNGKeyArray, permutation: Array) -> AbstractBijection:
        if dim == 1:
            return Elementwise(key, 1, **options)
        return Chain([Coupling(key, dim, **options), Permute(permutation)])

    permutations = swaps(dim, num_layers)
    if shared_trunk and dim > 1:
        layers = SharedCoupling(key, dim, jnp.asarray(permutations), **options)
    else:
        layers = stack(make_layer, key, num_layers, permutations)
    return Flow(base, Chain([layers, unit_affine(dim), *last]))
