"""Coupling flows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.bijections import (
    LOFT,
    AbstractBijection,
    AbstractTransformer,
    ActNorm,
    Affine,
    Chain,
    Coupling,
    Elementwise,
    Householder,
    LULinear,
    Permute,
    Scan,
    SharedCoupling,
    SinhArcsinhTransformer,
)
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_widths
from vflow.flows._splits import swaps
from vflow.flows._stack import stack, unit_affine

_MIXINGS = {
    "permute": lambda key, dim: [],
    "lu": lambda key, dim: [LULinear(dim)],
    "householder": lambda key, dim: [Householder(key, dim)],
}
_DRAWS = 1024  # of the base, that set the normalisations


def coupling(
    key: PRNGKeyArray,
    dim: int,
    *,
    transformer: str | AbstractTransformer = "affine",
    num_layers: int = 8,
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
    condition_dim: int | None = None,
    mixing: str = "permute",
    actnorm: bool = False,
    loft: float | None = None,
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
        mixing: what stands between layers: "permute", a fixed permutation; "lu" or "householder", the
            permutation and a trained `LULinear` or `Householder` map that starts at the identity.
        actnorm: a trained `ActNorm` before each layer. Draws of a given base set them, so that the
            layers see values of location 0 and spread 1, and the last affine map starts at what
            undoes it. With the default or a conditional base all start at the identity.
        loft: threshold of a `LOFT` between the layers and the last affine map, for deep stacks; 100 is
            its author's choice. None: no such layer.
        shared_trunk: one network for all layers, with a small head, gates and an embedding for each
            (`vf.bijections.SharedCoupling`): fewer parameters in deep stacks. Without effect where
            dim is 1. Not together with `mixing` or `actnorm`.
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
        Dinh, Sohl-Dickstein & Bengio 2017 (arXiv 1605.08803); Kingma & Dhariwal 2018 (arXiv
        1807.03039) for `mixing` and `actnorm`; Andrade 2024 (arXiv 2402.16408) for `loft`.
    """
    given_base = base
    base, last = check_common(
        "coupling", dim, num_layers=num_layers, condition_dim=condition_dim, base=base, tails=tails
    )
    hidden = check_widths("coupling", "hidden", hidden)
    if mixing not in _MIXINGS:
        raise ValueError(
            f"coupling: mixing must be one of {', '.join(map(repr, _MIXINGS))}, got {mixing!r}."
        )
    if shared_trunk and (actnorm or mixing != "permute"):
        raise ValueError("coupling: shared_trunk has neither actnorm nor mixing; leave them out.")
    if dim == 1 and transformer == "affine":
        transformer = SinhArcsinhTransformer()
    options = {
        "transformer": transformer,
        "hidden": hidden,
        "activation": activation,
        "condition_dim": condition_dim,
    }

    def make_layer(key: PRNGKeyArray, permutation: Array) -> AbstractBijection:
        norm = [ActNorm(dim)] if actnorm else []
        if dim == 1:
            return Chain([*norm, Elementwise(key, 1, **options)])
        mix = _MIXINGS[mixing](key, dim)
        return Chain([*norm, Coupling(key, dim, **options), Permute(permutation), *mix])

    permutations, affine = swaps(dim, num_layers), unit_affine(dim)
    if shared_trunk and dim > 1:
        layers = SharedCoupling(key, dim, jnp.asarray(permutations), **options)
    else:
        layers = stack(make_layer, key, num_layers, permutations)
        if actnorm and given_base is not None and base.condition_shape is None:
            layers, affine = _whitened(jax.random.fold_in(key, num_layers), base, layers)
    middle = [] if loft is None else [LOFT(dim, loft)]
    return Flow(base, Chain([layers, *middle, affine, *last]))


def _whitened(
    key: PRNGKeyArray, base: AbstractDistribution, layers: Scan
) -> tuple[AbstractBijection, Affine]:
    """The layers with normalisations set by draws of the base, and the affine map that undoes them."""
    draws = jax.vmap(base.sample)(jax.random.split(key, _DRAWS))
    shape = layers.condition_shape
    whitened = ActNorm.whiten(layers, draws, None if shape is None else jnp.zeros(shape))
    first = whitened.layers.layers[0]  # the others see what it has normalised
    return whitened, Affine(first.loc[0], jnp.exp(-first.log_scale[0]))
