"""Branching on random values."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vflow._core import ProgramError
from vflow.programs._frame import current_frame, running


def cond(
    pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any
) -> Any:
    """`jax.lax.cond` for branches with random choices.

    Args:
        pred: a boolean scalar, random or not.
        true_fun: a program of `operands`.
        false_fun: another, of the same output.
        operands: what they are called with.

    Returns:
        The output of the branch taken.

    Raises:
        ProgramError: outside a program, or, where the values of sites are recorded or given (inside
            a guide or a model), if the branches do not have the same sites.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     b = vf.sample("b", dist.Bernoulli(probs=t), vf.enum())
        ...     return vf.cond(b == 1, lambda: vf.sample("x", dist.Normal(t, 1.0)), lambda: 2 * t)
        >>> value = vf.expect(objective)(jax.random.key(0), 0.7)
    """
    frame = current_frame("vf.cond")
    block = frame.label("cond")
    frame.check_trace(block)
    key = None if frame.key is None else frame.key_for(block, "cond")

    def branch(fun, tag, like=None, kept=None):
        def run(key, *operands):
            child = frame.child(f"{block}/{tag}", key)
            with running(child):
                out = fun(*operands)
            totals, records = child.totals, child.records
            if like is not None:
                # A branch not taken leaves the lanes of its enumerated sites: share them out.
                other = f"{frame.scope}{block}/{'false' if tag == 'true' else 'true'}/"
                plan = frame.run.plan
                sizes = (
                    []
                    if plan is None
                    else [n for s, n in plan.enums.items() if s.startswith(other)]
                )
                if sizes:
                    child.add("log_weight", -math.log(math.prod(sizes)))
                totals = {k: jnp.asarray(totals.get(k, 0.0), s.dtype) for k, s in like.items()}
            exports = child.exports
            if kept is not None:  # the draws of the branch not taken: zeros, of no weight
                zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), kept)
                exports = {**zeros, **exports}
            return out, totals, records, exports

        return run

    shapes = [
        jax.eval_shape(branch(fun, tag), key, *operands)
        for fun, tag in ((true_fun, "true"), (false_fun, "false"))
    ]
    if frame.recorder is not None and set(shapes[0][2]) != set(shapes[1][2]):
        raise ProgramError(
            f"vf.cond: the branches of a guide or model must have the same sites, got "
            f"{sorted(shapes[0][2])} and {sorted(shapes[1][2])}."
        )
    like = {**shapes[0][1], **shapes[1][1]}
    if frame.run.plan is not None and frame.run.plan.enums:
        like.setdefault("log_weight", jax.ShapeDtypeStruct((), jnp.result_type(float)))
    kept = {**shapes[0][3], **shapes[1][3]}
    out, totals, records, exports = jax.lax.cond(
        pred,
        branch(true_fun, "true", like, kept),
        branch(false_fun, "false", like, kept),
        key,
        *operands,
    )
    frame.absorb(totals, records)
    frame.exports.update(exports)
    return out
