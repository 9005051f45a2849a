"""Where a fit may run, and whether the family that is handed to it is sound."""

import dataclasses
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PRNGKeyArray

from vflow.bijections import AbstractBijection
from vflow.distributions import Flow

_FIRST: list[int] = []  # the process of the first fit
_NUM_POINTS = 16


def check_process(owner: str, key: PRNGKeyArray) -> None:
    """Refuse to start inside a transformation, or in a process forked from one that has fitted.

    Raises:
        TypeError: called under `jax.jit`, `jax.vmap` or the like.
        RuntimeError: in a forked process, where JAX would wait forever for threads it no longer has.
    """
    if _FIRST and os.getpid() != _FIRST[0]:
        raise RuntimeError(
            f"{owner}: this process was forked from one in which JAX had been at work, whose threads "
            "it lacks: JAX would hang. Start processes with multiprocessing.get_context('spawn')."
        )
    if isinstance(key, Tracer) or isinstance(jnp.zeros(0), Tracer):
        raise TypeError(
            f"{owner}: a fit runs on the host, between compiled steps: call it outside jax.jit, "
            "jax.vmap and other transformations."
        )
    if not _FIRST:
        _FIRST.append(os.getpid())


def check_sound(owner: str, flow: Any) -> None:
    """Refuse a family with NaN among its leaves, or whose own layers are not undone by their inverse.

    vflow's own bijections are tested; others are tried at draws of the base, once.

    Raises:
        ValueError: the leaf, or the layer, is named.
        TypeError: a layer has a static field that cannot be hashed.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(flow):
        floating = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if floating and np.isnan(np.asarray(leaf)).any():
            raise ValueError(f"{owner}: flow{jax.tree_util.keystr(path)} is NaN before training.")
    strangers = [layer for layer in _layers(flow) if _foreign(layer)]
    for layer in strangers:
        _check_static(owner, layer)
    if not strangers or not isinstance(flow, Flow):
        return
    try:
        z, back = _there_and_back(flow)
    except NotImplementedError:  # no inverse: only its log-determinant is used
        return
    off = np.abs(back - z).max() / (1 + np.abs(z).max())
    if not off < 0.01:
        names = ", ".join(sorted({type(layer).__name__ for layer in strangers}))
        raise ValueError(
            f"{owner}: the bijection of flow, with layers of your own ({names}), is "
            f"not undone by its inverse: draws of the base come back {off:.2g} off. Its density is "
            "wrong then; vf.diagnostics.check_bijection(layer, key) tells more."
        )


def _check_static(owner: str, layer: AbstractBijection) -> None:
    for field in dataclasses.fields(layer):
        if not field.metadata.get("static", False):
            continue
        try:
            hash(getattr(layer, field.name))
        except TypeError:
            raise TypeError(
                f"{owner}: static field {field.name!r} of {type(layer).__name__} cannot be hashed: "
                "make it a tuple, or a field that is not static."
            ) from None


@eqx.filter_jit
def _there_and_back(flow: Flow):
    def one(key):
        z = flow.base.sample(key)
        y, _ = flow.bijection.forward_and_log_det(z)
        return z, flow.bijection.inverse_and_log_det(y)[0]

    return jax.vmap(one)(jax.random.split(jax.random.key(0), _NUM_POINTS))


def _layers(tree: Any):
    """Every bijection in a tree, at any depth."""
    found = []

    def look(node):
        if isinstance(node, AbstractBijection):
            found.append(node)
        return False

    jax.tree.leaves(tree, is_leaf=look)
    return found


def _foreign(layer: AbstractBijection) -> bool:
    return not type(layer).__module__.startswith("vflow.")
