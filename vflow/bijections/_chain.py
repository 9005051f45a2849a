"""Composition of bijections, written out or scanned."""

from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels._filled import materialised

from vflow._core._mlp import MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._permute import Permute, permuted


def _condition_for(layer: AbstractBijection, condition: Array | None) -> Array | None:
    return None if layer.condition_shape is None else condition


class Chain(AbstractBijection):
    r"""The composition $T_n \circ \dots \circ T_1$: the first layer acts first on a base sample.

    Layers may be conditional or not; those that are share one condition.

    Args:
        layers: bijections of one shape, at least one.

    Raises:
        ValueError: no layer, or layers whose shapes or condition shapes differ.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> double = vf.bijections.Affine(jnp.zeros(1), 2 * jnp.ones(1))
        >>> chain = vf.bijections.Chain([double, double])
        >>> print(chain.forward_and_log_det(jnp.ones(1))[0])
        [4.]
    """

    layers: tuple[AbstractBijection, ...]
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, layers: Sequence[AbstractBijection]):
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("Chain: layers is empty; use Identity(shape).")
        conditions = [b.condition_shape for b in self.layers if b.condition_shape is not None]
        for position, layer in enumerate(self.layers):
            if layer.shape != self.layers[0].shape:
                raise ValueError(
                    f"Chain: layer {position} ({type(layer).__name__}) has shape {layer.shape}, "
                    f"the first has {self.layers[0].shape}."
                )
            if layer.condition_shape not in (None, *conditions[:1]):
                raise ValueError(
                    f"Chain: layer {position} ({type(layer).__name__}) has condition_shape "
                    f"{layer.condition_shape}, an earlier one has {conditions[0]}."
                )
        self.shape = self.layers[0].shape
        self.condition_shape = conditions[0] if conditions else None

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The layers in order; log-dets add up."""
        total = jnp.zeros_like(x, shape=())
        for layer in self.layers:
            x, log_det = layer.forward_and_log_det(x, _condition_for(layer, condition))
            total = total + log_det
        return x, total

    @property
    def estimated(self) -> bool:
        """Whether a layer estimates its log-det."""
        return any(layer.estimated for layer in self.layers)

    def forward_and_estimate(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """The layers in order, each with a key of its own."""
        total = jnp.zeros_like(x, shape=())
        keys = jax.random.split(key, len(self.layers))
        for layer, mine in zip(self.layers, keys, strict=True):
            x, log_det = layer.forward_and_estimate(mine, x, _condition_for(layer, condition))
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The inverses in reverse order; log-dets add up."""
        total = jnp.zeros_like(y, shape=())
        for layer in reversed(self.layers):
            y, log_det = layer.inverse_and_log_det(y, _condition_for(layer, condition))
            total = total + log_det
        return y, total

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The score is threaded through the layers, each by its own rule."""
        return self._thread("push_score", x, score, condition)

    def forward_with_score(
        self, x: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """Layer by layer, so that each layer's two evaluations stand side by side."""
        return self._thread("forward_with_score", x, score, condition, live=live)

    def inverse_with_score(
        self, y: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """Layer by layer in reverse order."""
        return self._thread("inverse_with_score", y, score, condition, live=live)

    def _thread(
        self, method: str, x: Array, score: Array, condition: Array | None, **options: bool
    ) -> tuple[Array, Array, Array]:
        total = jnp.zeros_like(x, shape=())
        for layer in self.layers[:: -1 if method.startswith("inverse") else 1]:
            condition_here = _condition_for(layer, condition)
            x, log_det, score = getattr(layer, method)(x, score, condition_here, **options)
            total = total + log_det
        return x, total, score


def _in_memory(layer: Any) -> Any:
    """Vectors of which a layer's elementwise part is full; matrices are there anyway.

    Networks see to their own.
    """

    def one(leaf):
        small = eqx.is_inexact_array(leaf) and leaf.ndim == 1
        return materialised(leaf) if small else leaf

    return jax.tree.map(one, layer, is_leaf=lambda node: isinstance(node, MLP))


def _batch_last(layer: AbstractBijection, *carry: Array) -> tuple[Array, ...]:
    """What a loop starts with, laid out in memory as the loop will leave it.

    A layer that permutes leaves a batch last. XLA would copy, and takes a fifth of a second to compile
    that copy of 256 rows of 100; a gather without effect does the same.
    """
    is_permute = lambda node: isinstance(node, Permute)
    if not any(map(is_permute, jax.tree.leaves(layer, is_leaf=is_permute))):
        return carry
    order = jnp.arange(carry[0].size)
    return tuple(permuted(x, order, order) for x in carry)


class Scan(AbstractBijection):
    r"""The composition of layers of one structure, stacked: one compiled body for all of them.

    Compile time and program size do not grow with the depth. Build it with `Scan.stack`, or from a
    vmapped constructor: `Scan(eqx.filter_vmap(make_layer)(keys))`.

    Args:
        layers: one bijection whose array leaves have a leading axis over the layers; entry 0 acts
            first on a base sample.

    Raises:
        ValueError: no array leaves, or leading axes that differ.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> double = vf.bijections.Affine(jnp.zeros(1), 2 * jnp.ones(1))
        >>> scan = vf.bijections.Scan.stack([double, double, double])
        >>> print(scan.forward_and_log_det(jnp.ones(1))[0])
        [8.]
    """

    layers: AbstractBijection
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, layers: AbstractBijection):
        leaves = jax.tree.leaves(eqx.filter(layers, eqx.is_array))
        lengths = {leaf.shape[:1] for leaf in leaves}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                "Scan: every array leaf of layers needs the same leading axis, one entry a layer; "
                f"found leading axes {sorted(lengths)}. Use Scan.stack([layer, ...])."
            )
        self.layers = layers
        self.shape = layers.shape
        self.condition_shape = layers.condition_shape

    @classmethod
    def stack(cls, layers: Iterable[AbstractBijection]) -> "Scan":
        """Stack layers of one structure.

        Args:
            layers: bijections that differ only in the values of their arrays.

        Returns:
            The scanned composition; the first layer acts first on a base sample.

        Raises:
            ValueError: no layer, or layers of different structure.

        Example:
            >>> import jax.numpy as jnp, vflow as vf
            >>> shifts = [vf.bijections.Affine(jnp.ones(1) * i) for i in range(3)]
            >>> print(vf.bijections.Scan.stack(shifts).forward_and_log_det(jnp.zeros(1))[0])
            [3.]
        """
        layers = tuple(layers)
        if not layers:
            raise ValueError("Scan.stack: layers is empty; use Identity(shape).")
        arrays, statics = zip(*(eqx.partition(b, eqx.is_array) for b in layers), strict=True)
        shapes = [jax.tree.map(jnp.shape, a) for a in arrays]
        for position in range(1, len(layers)):
            same = eqx.tree_equal(statics[position], statics[0]) is True
            if not same or shapes[position] != shapes[0]:
                raise ValueError(
                    f"Scan.stack: layer {position} ({type(layers[position]).__name__}) differs in "
                    f"structure from layer 0 ({type(layers[0]).__name__}); use Chain."
                )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
        return cls(eqx.combine(stacked, statics[0]))

    def _scan(self, method: str, carry: Any, condition: Array | None, **options: bool) -> Any:
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(carry, arrays):
            total, x, *score = carry
            layer = eqx.combine(_in_memory(arrays), static)
            y, log_det, *score = getattr(layer, method)(x, *score, condition=condition, **options)
            return (total + log_det, y, *score), None

        total, reverse = jnp.zeros_like(carry[0], shape=()), method.startswith("inverse")
        carry = _batch_last(self.layers, *carry)
        (total, y, *score), _ = jax.lax.scan(step, (total, *carry), arrays, reverse=reverse)
        # In memory: the loop may leave its arrays batch last, and whoever reads them so is slow.
        return materialised(y), total, *score

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The layers in order; log-dets add up."""
        return self._scan("forward_and_log_det", (x,), condition)

    @property
    def estimated(self) -> bool:
        """Whether the layers estimate their log-dets."""
        return self.layers.estimated

    def forward_and_estimate(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """The layers in order; the key is part of the carry."""
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(carry, arrays):
            total, x, key = carry
            key, mine = jax.random.split(key)
            layer = eqx.combine(arrays, static)
            y, log_det = layer.forward_and_estimate(mine, x, condition)
            return (total + log_det, y, key), None

        total = jnp.zeros_like(x, shape=())
        (total, y, _), _ = jax.lax.scan(step, (total, x, key), arrays)
        return y, total

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The inverses in reverse order; log-dets add up."""
        return self._scan("inverse_and_log_det", (y,), condition)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The score is part of the carry."""
        return self._scan("push_score", (x, score), condition)

    def forward_with_score(
        self, x: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """One scan whose body holds a layer's two evaluations."""
        return self._scan("forward_with_score", (x, score), condition, live=live)

    def inverse_with_score(
        self, y: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """The same scan in reverse order."""
        return self._scan("inverse_with_score", (y, score), condition, live=live)
