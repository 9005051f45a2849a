"""Which leaves of a module are trained, and how they are updated."""

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax

T = TypeVar("T")


def stop_gradient(tree: Any) -> Any:
    """Every array leaf behind `jax.lax.stop_gradient`; other leaves unchanged."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


class Frozen(eqx.Module, Generic[T]):
    """A subtree that is carried along but never trained.

    `vf.params` skips it, and `value` passes its arrays through `stop_gradient`, so that
    a gradient taken by hand is zero there too.

    Args:
        tree: any pytree.
    """

    tree: T

    @property
    def value(self) -> T:
        """The subtree behind `stop_gradient`."""
        return stop_gradient(self.tree)


def _is_frozen(node: Any) -> bool:
    return isinstance(node, Frozen)


def _trainable_spec(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: not _is_frozen(leaf) and eqx.is_inexact_array(leaf),
        tree,
        is_leaf=_is_frozen,
    )


def partition(tree: Any) -> tuple[Any, Any]:
    """Split a pytree into (trainable leaves, the rest); `combine` is the inverse."""
    return eqx.partition(tree, _trainable_spec(tree))


def combine(trainable: Any, static: Any) -> Any:
    """Put back together what `partition` took apart."""
    return eqx.combine(trainable, static)


def params(module: Any) -> Any:
    """The trainable leaves of a module: floating-point arrays not inside `Frozen`.

    Args:
        module: a flow, a bijection, or any pytree.

    Returns:
        The same structure with every other leaf replaced by None, as optax wants it.

    Example:
        >>> import jax, optax, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> state = optax.adam(1e-3).init(vf.params(flow))
    """
    return partition(module)[0]


def apply_updates(module: Any, updates: Any) -> Any:
    """Add `updates` to the trainable leaves of `module`, keeping each leaf's dtype.

    Args:
        module: a flow, a bijection, or any pytree.
        updates: a tree shaped like `vf.params(module)`, as an optax update returns it.

    Returns:
        The module with updated leaves.

    Example:
        >>> import jax, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> zeros = jax.tree.map(lambda x: 0 * x, vf.params(flow))
        >>> same = vf.apply_updates(flow, zeros)
    """
    trainable, static = partition(module)
    trainable = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), trainable, updates)
    return combine(trainable, static)
