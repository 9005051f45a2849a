"""Sequential programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vflow._core import ProgramError
from vflow.programs._frame import current_frame, running
from vflow.programs._vmap import block_keys


def scan(
    body: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
) -> tuple[Any, Any]:
    """`jax.lax.scan` for a body with random choices; a cost depends on the earlier steps only.

    Args:
        body: `(carry, x) -> (carry, y)`.
        init: the first carry.
        xs: a pytree whose leaves have the steps along their leading axis, or None.
        length: number of steps, where `xs` does not tell.

    Returns:
        (the last carry, the ys stacked).

    Raises:
        ProgramError: outside a program, or where the number of steps is not clear.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     def step(total, _):
        ...         return total + vf.sample("x", dist.Normal(t, 1.0), vf.reinforce()), None
        ...     return vf.scan(step, jnp.zeros(()), length=3)[0]
        >>> value = vf.expect(objective)(jax.random.key(0), 0.7)
    """
    frame = current_frame("vf.scan")
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(xs)}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1 or None in lengths:
        raise ProgramError(
            "vf.scan: the leaves of xs and length must agree on the number of steps, got "
            f"{lengths}."
        )
    n = int(lengths.pop())  # pyright: ignore[reportArgumentType]
    if n < 1:
        raise ProgramError("vf.scan needs at least one step.")
    block, keys = block_keys(frame, "scan", n)

    def step(carry, element):
        key, index, x = element
        child = frame.child(block, key, (index, n), sequential=True)
        with running(child):
            carry, y = body(carry, x)
        return carry, (y, child.totals, child.records, child.exports)

    carry, (ys, totals, records, exports) = jax.lax.scan(step, init, (keys, jnp.arange(n), xs))
    frame.absorb(totals, records, sequential=True)
    frame.exports.update(exports)
    return carry, ys
