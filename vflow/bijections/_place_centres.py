"""Centres of kernelised layers moved to where their inputs are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._chain import Chain, Scan
from vflow.bijections._kernelised_coupling import KernelisedCoupling


def fresh_kernels(tree: Any) -> bool:
    """Whether a tree holds kernelised layers, all of them untrained (every coefficient is zero)."""
    layers = [
        node
        for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, KernelisedCoupling))
        if isinstance(node, KernelisedCoupling)
    ]
    coefficients = [(layer.scale_coefficients, layer.shift_coefficients) for layer in layers]
    return bool(layers) and not any(bool(jnp.any(a)) for a in jax.tree.leaves(coefficients))


def place_centres(
    bijection: AbstractBijection, key: PRNGKeyArray, y: Array, condition: Array | None
) -> tuple[AbstractBijection, Array]:
    """The bijection with the centres of its kernelised layers among their inputs at given outputs.

    Layers inside `Chain` and `Scan` are found; others are passed through as they are.

    Args:
        bijection: any map.
        key: PRNG key.
        y: points on the target side, (n, dim).
        condition: (n, condition_dim), or None.

    Returns:
        The map and the points on its base side.
    """
    if isinstance(bijection, Chain):
        layers = list(bijection.layers)
        for i, layer_key in reversed(list(enumerate(jax.random.split(key, len(layers))))):
            layers[i], y = place_centres(layers[i], layer_key, y, condition)
        return eqx.tree_at(lambda chain: chain.layers, bijection, tuple(layers)), y
    if isinstance(bijection, Scan):
        arrays, static = eqx.partition(bijection.layers, eqx.is_array)

        def step(y, inputs):
            layer_key, arrays = inputs
            layer, y = place_centres(eqx.combine(arrays, static), layer_key, y, condition)
            return y, eqx.filter(layer, eqx.is_array)

        keys = jax.random.split(key, len(jax.tree.leaves(arrays)[0]))
        y, arrays = jax.lax.scan(step, y, (keys, arrays), reverse=True)
        return eqx.tree_at(lambda s: s.layers, bijection, eqx.combine(arrays, static)), y
    if isinstance(bijection, KernelisedCoupling):
        bijection = bijection.place_centres(key, y, condition)
    if bijection.condition_shape is None:
        condition = None
    x, _ = jax.vmap(bijection.inverse_and_log_det)(y, condition)
    return bijection, x
