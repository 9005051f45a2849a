"""Estimated expectations inside an objective: a nonlinear function of one is biased, and refused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vflow._core import ProgramError
from vflow.programs._linearity import _CALLS, _INDEXED, _LINEAR, _open

_MARK = "vflow expectation "
_LOOPS = 10  # rounds to a fixed point: labels only grow


class _Use(NamedTuple):
    """How an array depends on estimated expectations: on which, and whether linearly in each."""

    labels: frozenset[str] = frozenset()
    linear: bool = True


def mark(value: Any, label: str) -> Any:
    """Make an estimated expectation known in the jaxpr of what uses it."""
    return checkpoint_name(value, _MARK + label)


def is_random(estimate: Callable[[Any], Any], key: Any) -> bool:
    """Whether `estimate(key)` depends on its key: not where all choices are enumerated."""
    jaxpr = jax.make_jaxpr(estimate)(key).jaxpr
    touched = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in touched for v in eqn.invars):
            touched.update(eqn.outvars)
    return any(not hasattr(v, "val") and v in touched for v in jaxpr.outvars)


def check_linear(total: Callable[..., Any], *args: Any) -> None:
    """Refuse an objective that is not linear in the estimates marked inside it.

    Raises:
        ProgramError: it is not; the estimate is named by its objective.
    """
    jaxpr = jax.make_jaxpr(total)(*args).jaxpr
    (out,) = _walk(jaxpr, [_Use()] * len(jaxpr.invars))
    if not out.linear:
        names = ", ".join(sorted({label.split(" ", 1)[1] for label in out.labels}))
        raise ProgramError(
            f"a nested vf.expect (of {names}) is used nonlinearly inside an objective: g(E f) has no "
            "unbiased estimate by g of an estimate. Draw its sites in the objective itself, particles "
            "with vf.vmap (a bound such as vf.objectives.iwelbo), or enumerate them: without noise "
            "any function is right."
        )


def _walk(jaxpr: Any, ins: list[_Use]) -> list[_Use]:
    uses: dict[Any, _Use] = dict.fromkeys(jaxpr.constvars, _Use())
    uses.update(zip(jaxpr.invars, ins, strict=True))

    def read(atom: Any) -> _Use:
        return _Use() if hasattr(atom, "val") else uses[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(eqn, [read(atom) for atom in eqn.invars])
        uses.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, ins: list[_Use]) -> list[_Use]:
    name, params = eqn.primitive.name, eqn.params
    if name == "name" and params["name"].startswith(_MARK):
        return [_Use(frozenset([params["name"][len(_MARK) :]]))]
    used = _join(ins)
    if not used.labels:
        return [_Use()] * len(eqn.outvars)
    inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
    if name in _CALLS or (name.startswith("custom_") and inner is not None):
        return _walk(_open(inner), ins)
    if name == "scan":
        return _scan(params, ins)
    if name == "cond":
        branches = [_walk(_open(b), ins[1:]) for b in params["branches"]]
        cases = [_join(list(case)) for case in zip(*branches, strict=True)]
        return [_bent(_join([ins[0], case])) if ins[0].labels else case for case in cases]
    return [_primitive(name, params, ins, used)] * len(eqn.outvars)


def _primitive(name: str, params: Any, ins: list[_Use], used: _Use) -> _Use:
    if name == "is_finite":  # the same for almost all draws
        return _Use()
    if name == "convert_element_type" and not jnp.issubdtype(params["new_dtype"], jnp.inexact):
        return _bent(used)
    if name == "stop_gradient" or name in _LINEAR or name in _INDEXED:
        return used
    if name in ("mul", "dot_general"):  # independent estimates have unbiased products
        first, second = ins
        return _bent(used) if first.labels & second.labels else used
    if name == "div":
        return _bent(used) if ins[1].labels else used
    if name == "select_n":
        return _bent(used) if ins[0].labels else used
    if name == "integer_pow" and params["y"] == 1:
        return used
    return _bent(used)


def _join(uses: list[_Use]) -> _Use:
    return _Use(frozenset().union(*(use.labels for use in uses)), all(use.linear for use in uses))


def _bent(use: _Use) -> _Use:
    return use._replace(linear=False)


def _scan(params: Any, ins: list[_Use]) -> list[_Use]:
    fixed, carried = params["num_consts"], params["num_carry"]
    consts, carry, xs = ins[:fixed], ins[fixed : fixed + carried], ins[fixed + carried :]
    outs = carry
    for _ in range(_LOOPS):
        outs = _walk(_open(params["jaxpr"]), consts + carry + xs)
        grown = [_join([a, b]) for a, b in zip(carry, outs[:carried], strict=True)]
        if grown == carry:
            break
        carry = grown
    return carry + outs[carried:]
