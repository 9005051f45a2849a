"""Layers of one kind as one compiled body, and the affine map that flows end with."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow.bijections import AbstractBijection, Affine, Scan


def stack(
    make_layer: Callable[..., AbstractBijection],
    key: PRNGKeyArray,
    num_layers: int,
    *options: Array | np.ndarray,
) -> Scan:
    """Layers `make_layer(key, *options)` with a key each and row i of each of `options`."""
    keys = jax.random.split(key, num_layers)
    return Scan(eqx.filter_vmap(make_layer)(keys, *map(jnp.asarray, options)))


def unit_affine(dim: int) -> Affine:
    """A free elementwise affine map that starts at the identity."""
    return Affine(jnp.zeros((dim,)), jnp.ones((dim,)))
