"""Layers of one structure in one compiled body."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from vflow.flows.stochastic._transition import AbstractTransition

# One layer: (transition, cancels, carry, per-layer inputs) -> (carry, per-layer output).
Step = Callable[[AbstractTransition, bool, Any, Any], tuple[Any, Any]]


class Segment(eqx.Module):
    """A group of layers, repeated: a scan over the repeats, the group written out in its body.

    Attributes:
        layers: the group; with repeats, every array leaf has them along its leading axis.
        cancels: per layer of the group, whether it cancels out of the weight.
        repeats: how often; 1 is not scanned.
    """

    layers: tuple[AbstractTransition, ...]
    cancels: tuple[bool, ...] = eqx.field(static=True)
    repeats: int = eqx.field(static=True)

    @property
    def size(self) -> int:
        """Number of layers."""
        return len(self.layers) * self.repeats

    def run(self, step: Step, carry: Any, inputs: Any, *, reverse: bool) -> tuple[Any, Any]:
        """Thread `carry` through the layers; `inputs` and outputs are stacked, in layer order."""
        group = len(self.layers)
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        grouped = jax.tree.map(
            lambda leaf: leaf.reshape(self.repeats, group, *leaf.shape[1:]), inputs
        )

        def body(carry, xs):
            arrays, inputs = xs
            layers, outputs = eqx.combine(arrays, static), [None] * group
            for j in reversed(range(group)) if reverse else range(group):
                own = jax.tree.map(lambda leaf, j=j: leaf[j], inputs)
                carry, outputs[j] = step(layers[j], self.cancels[j], carry, own)
            return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

        if self.repeats == 1:
            own = jax.tree.map(lambda leaf: leaf[0], grouped)
            return body(carry, (arrays, own))
        carry, outputs = jax.lax.scan(body, carry, (arrays, grouped), reverse=reverse)
        return carry, jax.tree.map(lambda leaf: leaf.reshape(self.size, *leaf.shape[2:]), outputs)

    def unstacked(self) -> list[AbstractTransition]:
        """The layers one by one."""
        if self.repeats == 1:
            return list(self.layers)
        pick = lambda i: lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf
        return [t for i in range(self.repeats) for t in jax.tree.map(pick(i), self.layers)]


def segments_of(
    layers: Sequence[AbstractTransition], cancels: Sequence[bool], alone: Sequence[bool]
) -> tuple[Segment, ...]:
    """Group layers so that what repeats is compiled once.

    At each position the group is taken that covers most layers by repeating, the shortest of them.

    Args:
        layers: in order.
        cancels: per layer, kept apart from those that do not.
        alone: per layer, whether it must not be scanned.
    """
    kinds = [
        _kind(t, c) if not a else object() for t, c, a in zip(layers, cancels, alone, strict=True)
    ]
    found, start, n = [], 0, len(layers)
    while start < n:
        best, group = 1, 1
        for size in range(1, (n - start) // 2 + 1):
            repeats = 1
            while (
                kinds[start + repeats * size : start + (repeats + 1) * size]
                == kinds[start : start + size]
            ):
                repeats += 1
            if repeats > 1 and repeats * size > best * group:
                best, group = repeats, size
        members = tuple(layers[start : start + group])
        if best > 1:
            rounds = [
                tuple(layers[start + i * group : start + (i + 1) * group]) for i in range(best)
            ]
            arrays, static = zip(*(eqx.partition(r, eqx.is_array) for r in rounds), strict=True)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
            members = eqx.combine(stacked, static[0])
        found.append(Segment(members, tuple(cancels[start : start + group]), best))
        start += best * group
    return tuple(found)


def _kind(layer: AbstractTransition, cancels: bool) -> Any:  # noqa: FBT001
    """What two layers must share to be stacked."""
    arrays, static = eqx.partition(layer, eqx.is_array)
    shapes = tuple((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(arrays))
    return jax.tree.structure(layer), str(static), shapes, cancels
