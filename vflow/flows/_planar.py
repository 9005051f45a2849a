"""Planar, radial and Sylvester flows."""

import jax
from jaxtyping import PRNGKeyArray

from vflow.bijections import (
    AbstractBijection,
    Chain,
    Elementwise,
    Planar,
    Radial,
    Sylvester,
)
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_count, check_widths
from vflow.flows._splits import orders
from vflow.flows._stack import stack, unit_affine


def planar(
    key: PRNGKeyArray,
    dim: int,
    *,
    num_layers: int = 8,
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
    condition_dim: int | None = None,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A stack of planar layers on a base with trained location and scale, started at the base.

    Each layer shifts along one direction, by an amount that depends on one projection: cheap
    ($2d + 1$ parameters), weak alone, useful in numbers. The tails are those of the base. With a
    condition, the affine map and each layer have a network of their own.

    Args:
        key: PRNG key of the planes, and of the conditioners.
        dim: number of coordinates.
        num_layers: number of planar layers.
        hidden: widths of each conditioner's hidden layers (unused without a condition).
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
        >>> flow = vf.flows.planar(jax.random.key(0), 2, num_layers=4)
        >>> print(f"{flow.log_prob(jnp.zeros(2)):.4f}")
        -1.8379

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770).
    """
    base, last = check_common(
        "planar", dim, num_layers=num_layers, condition_dim=condition_dim, base=base, tails=tails
    )
    hidden = check_widths("planar", "hidden", hidden)
    options = {"hidden": hidden, "activation": activation, "condition_dim": condition_dim}
    first_key, key = jax.random.split(key)
    first = unit_affine(dim) if condition_dim is None else Elementwise(first_key, dim, **options)
    layers = stack(lambda key: Planar(key, dim, **options), key, num_layers)
    return Flow(base, Chain([first, layers, *last]))


def radial(
    key: PRNGKeyArray,
    dim: int,
    *,
    num_layers: int = 8,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A stack of radial layers on a base with trained location and scale, started at the base.

    Each layer expands or contracts space around one point ($d + 2$ parameters). The inverse is
    closed-form, so that densities of given points are as cheap as draws. The tails are those of the
    base.

    Args:
        key: PRNG key of the centres.
        dim: number of coordinates.
        num_layers: number of radial layers.
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.radial(jax.random.key(0), 2, num_layers=4)
        >>> print(f"{flow.log_prob(jnp.zeros(2)):.4f}")
        -1.8379

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770).
    """
    base, last = check_common("radial", dim, num_layers=num_layers, base=base, tails=tails)
    layers = stack(lambda key: Radial(key, dim), key, num_layers)
    return Flow(base, Chain([unit_affine(dim), layers, *last]))


def sylvester(
    key: PRNGKeyArray,
    dim: int,
    *,
    rank: int | None = None,
    num_layers: int = 4,
    variant: str = "orthogonal",
    num_reflections: int = 8,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""A stack of Sylvester layers on a base with trained location and scale, started at the base.

    A layer is a planar one of rank $M$: it does the work of several planar layers in one pass, with
    $dM + M^2$ parameters and more. The tails are those of the base.

    Args:
        key: PRNG key of the layers.
        dim: number of coordinates.
        rank: number of hidden units $M$ of a layer, 1 to dim; min(dim, 2) by default.
        num_layers: number of Sylvester layers.
        variant: how the orthonormal directions are made: "orthogonal" (QR of a free matrix),
            "householder" (product of reflections) or "triangular" (coordinates themselves, in an
            order that changes from layer to layer and does not depend on the key).
        num_reflections: number of reflections of "householder".
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.sylvester(jax.random.key(0), 2)
        >>> print(f"{flow.log_prob(jnp.zeros(2)):.4f}")
        -1.8379

    Source:
        van den Berg, Hasenclever, Tomczak & Welling 2018 (arXiv 1803.05649).
    """
    base, last = check_common("sylvester", dim, num_layers=num_layers, base=base, tails=tails)
    rank = min(dim, 2) if rank is None else rank
    check_count("sylvester", "rank", rank)
    check_count("sylvester", "num_reflections", num_reflections)
    options = {"rank": rank, "variant": variant, "num_reflections": num_reflections}
    options_each = ()
    if variant == "triangular":
        options_each = (orders(dim, num_layers)[:, :rank],)
    layers = stack(
        lambda key, order=None: Sylvester(key, dim, order=order, **options),
        key,
        num_layers,
        *options_each,
    )
    return Flow(base, Chain([unit_affine(dim), layers, *last]))
