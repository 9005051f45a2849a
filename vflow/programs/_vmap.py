"""Independent particles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vflow._core import ProgramError
from vflow.programs._frame import Frame, current_frame, magic, running


def vmap(
    body: Callable[..., Any],
    n: int,
    inputs: Any = None,
    control: str | Callable[[Any, Any], Any] | None = None,
) -> Any:
    r"""Run `body` n times with independent noise, vectorised; the form of `jax.vmap` for programs.

    Args:
        body: a program without arguments, or of one element of `inputs`.
        n: number of particles.
        inputs: a pytree whose leaves have leading axis n, or None.
        control: for particles with score-function sites, a control variate per particle: the rest
            of the program is run once more with the output of particle j replaced, which tells what
            particle j was worth. `"vimco"` replaces a log-weight by the mean of the others;
            `"loo"` does so for any tree of floating-point outputs; a function `fill(outputs, j)`
            returns a replacement of one's own, which must not depend on particle j.

    Returns:
        The outputs, stacked along a new leading axis of length n.

    Raises:
        ProgramError: outside a program, or where `control` does not fit the outputs.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     return vf.vmap(lambda: vf.sample("x", dist.Normal(t, 1.0)), 5).mean()
        >>> value = vf.expect(objective)(jax.random.key(0), 0.7)

    Source: Mnih and Rezende, Variational Inference for Monte Carlo Objectives (2016), for "vimco".
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"vf.vmap: n must be a positive integer, got {n!r}.")
    if isinstance(control, str) and control not in ("loo", "vimco"):
        raise ValueError(f'control must be "loo", "vimco" or a function, got {control!r}.')
    for leaf in jax.tree.leaves(inputs):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != n:
            raise ProgramError(
                f"vf.vmap: every leaf of inputs needs leading axis {n}, got shape "
                f"{jnp.shape(leaf)}."
            )
    frame = current_frame("vf.vmap")
    block, keys = block_keys(frame, "vmap", n)

    def one(key, index, element):
        child = frame.child(block, key, (index, n))
        with running(child):
            out = body() if inputs is None else body(element)
        return out, child.totals, child.records, child.exports

    outputs, totals, records, exports = jax.vmap(one)(keys, jnp.arange(n), inputs)
    frame.exports.update(exports)
    if frame.run.path is not None:
        outputs, totals, records = frame.run.path.pick(
            frame, f"{frame.scope}{block}/", (outputs, totals, records)
        )
    if control is None or "score" not in totals:
        frame.absorb(totals, records)
        return outputs
    fill = _leave_one_out(outputs, n, control) if isinstance(control, str) else control
    frame.absorb(totals, records)
    return _controlled(frame, block, outputs, totals["score"], fill)


def block_keys(frame: Frame, kind: str, n: int) -> tuple[str, Any]:
    """The name of a loop in program order, and one key per iteration (None where none is drawn)."""
    block = frame.label(kind)
    if frame.key is None:
        frame.check_trace(block)
        return block, None
    return block, jax.random.split(frame.key_for(block, kind), n)


def _leave_one_out(outputs: Any, n: int, control: str) -> Callable[[Any, Any], Any]:
    if n < 2:
        raise ProgramError(f"control={control!r} needs at least 2 particles, got {n}.")
    leaves = jax.tree.leaves(outputs)
    if not all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves):
        raise ProgramError(f"control={control!r} averages outputs, which must be floating-point.")
    if control == "vimco" and not (len(leaves) == 1 and leaves[0].shape == (n,)):
        raise ProgramError('control="vimco" wants the body to return one scalar, a log-weight.')

    def fill(outputs, index):
        return jax.tree.map(lambda x: (x.sum(axis=0) - x[index]) / (n - 1), outputs)

    return fill


def _controlled(frame: Frame, block: str, outputs: Any, scores: Any, fill: Callable) -> Any:
    """Lane j: the output of particle j is replaced, the weight is 1 - magic(its score)."""
    n = scores.shape[0]
    place = frame.star(block, n)
    if place is None:
        return outputs
    index, here = place
    frame.add("lane_weight", jnp.where(here, 1.0 - magic(scores[index]), 0.0))
    if "cost" in frame.totals:
        # A lane answers for what comes after the block only: earlier costs keep their own scores.
        frame.totals["cost"] = jnp.where(here, 0.0, frame.totals["cost"])
    replaced = jax.lax.stop_gradient(fill(outputs, index))

    def replace(leaf, other):
        mine = here & (jnp.arange(n) == index)
        return jnp.where(mine.reshape((n,) + (1,) * (leaf.ndim - 1)), other, leaf)

    return jax.tree.map(replace, outputs, replaced)
