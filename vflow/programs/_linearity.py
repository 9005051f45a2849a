"""How an objective depends on the log densities of its path sites, read off its jaxpr."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_PREFIX = "vflow path "
# Linear in every operand that depends on the shifts, as long as the others do not.
_LINEAR = frozenset(
    "add add_any sub neg copy copy_p convert_element_type reshape squeeze broadcast_in_dim "
    "transpose slice rev reduce_sum cumsum concatenate pad expand_dims real reduce_precision "
    "optimization_barrier sharding_constraint pvary device_put".split()
)
_BILINEAR = frozenset(("mul", "dot_general"))
_INDEXED = frozenset(("gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add"))
_KINKED = frozenset(
    "max min clamp reduce_max reduce_min cummax cummin abs sign sort floor ceil round rem top_k "
    "approx_top_k".split()
)
_STEPS = frozenset(("sign", "floor", "ceil", "round"))
_PEAKS = frozenset(("max", "reduce_max", "cummax"))
_KINKED_FUNCTIONS = frozenset(("relu",))
_CALLS = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_lin named_call".split()
)
_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


class Fact(NamedTuple):
    """What is known of one array of a program.

    Attributes:
        draws: labels of the drawn values it depends on.
        order: in the shifts of the log densities: 0 free of them, 1 linear with coefficients that
            no draw enters, 2 anything else.
        hidden: whether a draw enters through `stop_gradient`, where no derivative sees it.
        step: whether a draw enters through a comparison.
        blind, jump: the same of its derivative in the shifts.
        peak: whether it is a maximum; stopped, it is the rescaling that cancels in a logsumexp.
        folded: whether it is an absolute value, whose logarithm has no kink.
        noise: in the estimated log densities, `stop_gradient` or not: 0 free of them, 1 linear with
            coefficients free of them, 2 anything else.
    """

    draws: frozenset[str] = frozenset()
    order: int = 0
    hidden: bool = False
    step: bool = False
    blind: bool = False
    jump: bool = False
    peak: bool = False
    folded: bool = False
    noise: int = 0


class Report(NamedTuple):
    """What the analysis found.

    Attributes:
        linear: the weights of the log densities depend on no draw.
        refusal: why no path rule is unbiased, or None.
        inputs: label of a drawn value -> labels of the draws that its distribution depends on.
        estimates: the objective is linear in the estimated log densities.
    """

    linear: bool
    refusal: str | None
    inputs: dict[str, frozenset[str]]
    estimates: bool


def tag(kind: str, label: str, x: Any) -> Any:
    """Mark arrays in the jaxpr: "value", "log_q", "draw", "score", "discrete" or "estimate"."""
    return jax.tree.map(
        lambda leaf: checkpoint_name(jnp.asarray(leaf), f"{_PREFIX}{kind} {label}"), x
    )


def analyse(function: Any, *args: Any) -> Report:
    """Trace `function(*args) -> scalar` abstractly and follow the marks through it."""
    closed = jax.make_jaxpr(function)(*args)
    inputs: dict[str, frozenset[str]] = {}
    (out,) = _walk(closed.jaxpr, [Fact()] * len(closed.jaxpr.invars), inputs)
    refusal = None
    if out.order and (out.jump or out.folded):
        refusal = (
            "the weight of a log density jumps where log weights or draws are clipped, truncated, "
            "sorted or compared (max, min, clip, abs, where), and no derivative sees the jump"
        )
    elif out.order and out.blind:
        refusal = (
            "the weight of a log density depends on a draw through jax.lax.stop_gradient, where "
            "no derivative sees it"
        )
    return Report(out.order < 2, refusal, inputs, out.noise < 2)


def _walk(jaxpr: Any, ins: list[Fact], inputs: dict[str, frozenset[str]]) -> list[Fact]:
    facts: dict[Any, Fact] = dict.fromkeys(jaxpr.constvars, Fact())
    facts.update(zip(jaxpr.invars, ins, strict=True))

    def read(atom: Any) -> Fact:
        return Fact() if hasattr(atom, "val") else facts[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(eqn, [read(atom) for atom in eqn.invars], inputs)
        for var, fact in zip(eqn.outvars, outs, strict=True):
            inexact = jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.inexact)
            facts[var] = fact if inexact else Fact(fact.draws, noise=2 * bool(fact.noise))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, ins: list[Fact], inputs: dict[str, frozenset[str]]) -> list[Fact]:
    name, params = eqn.primitive.name, eqn.params
    n = len(eqn.outvars)
    if name == "name" and params["name"].startswith(_PREFIX):
        return [_marked(params["name"][len(_PREFIX) :], ins[0], inputs)]
    if name in _CALLS:
        return _walk(_open(params.get("jaxpr", params.get("call_jaxpr"))), ins, inputs)
    if name == "scan":
        return _scan(params, ins, inputs)
    if name == "while":
        return _while(params, ins, inputs)
    if name == "cond":
        branches = [_walk(_open(b), ins[1:], inputs) for b in params["branches"]]
        return [_choice(ins[0], list(case)) for case in zip(*branches, strict=True)]
    return [_primitive(name, eqn, ins)._replace(noise=_noise(name, eqn, ins))] * n


def _marked(mark: str, x: Fact, inputs: dict[str, frozenset[str]]) -> Fact:
    kind, label = mark.split(" ", 1)
    if kind == "estimate":
        return x._replace(noise=2 if x.noise else 1)
    if kind == "discrete":  # how it depends on other draws, its score or its lanes tell
        return Fact(noise=2 * bool(x.noise))
    if kind == "score":  # the box that multiplies costs by a score: derivatives see its draws
        return x._replace(hidden=False, step=False)
    if kind == "value":
        inputs[label] = inputs.get(label, frozenset()) | x.draws
    order = (2 if x.order else 1) if kind == "log_q" else x.order
    noise = 2 if x.noise and kind == "value" else x.noise
    return Fact(x.draws | {label}, order, noise=noise)


def _noise(name: str, eqn: Any, ins: list[Fact]) -> int:
    """The degree in estimated log densities after a primitive."""
    most = max((x.noise for x in ins), default=0)
    if most == 0 or _guards(name, eqn):
        return 0
    if name == "stop_gradient" or name in _LINEAR:
        return most
    if name in _BILINEAR:
        return most if sum(x.noise > 0 for x in ins) == 1 else 2
    if name in ("div", "select_n", *_INDEXED):
        fixed = ins[:1] if name == "select_n" else ins[1:]
        if name.startswith(("scatter", "dynamic_update")):
            fixed = [x for x, atom in zip(ins, eqn.invars, strict=True) if _discrete(atom)]
        return 2 if any(x.noise for x in fixed) else most
    return 2


def _primitive(name: str, eqn: Any, ins: list[Fact]) -> Fact:
    out = _join(ins)
    if name == "stop_gradient":
        return Fact(out.draws, 0, out.hidden or bool(out.draws and not ins[0].peak), out.step)
    if _guards(name, eqn):
        return Fact()
    if name == "select_n":
        return _choice(ins[0], ins[1:])
    if name == "log" or (name == "abs" and not out.order):
        return _curved(out._replace(jump=any(x.jump for x in ins)))
    if name == "abs":
        return _curved(out)._replace(folded=True)
    if name in _LINEAR:
        if name == "convert_element_type" and _discrete(eqn.invars[0]):
            return Fact(out.draws, step=bool(out.draws))
        if sum(not hasattr(atom, "val") for atom in eqn.invars) == 1:  # the same, rearranged
            folded, jump = any(x.folded for x in ins), any(x.jump for x in ins)
            return out._replace(peak=any(x.peak for x in ins), folded=folded, jump=jump)
        return out
    if out.order == 0:
        steps = name in _STEPS and bool(out.draws)
        return out._replace(peak=name in _PEAKS, step=out.step or steps)
    if name in _BILINEAR or (name == "div" and not ins[1].order):
        first, second = ins
        factor = second if first.order else first
        if (first.order and second.order) or factor.draws:
            return _curved(out)
        return out
    if name in _INDEXED:
        places = [x for x, atom in zip(ins, eqn.invars, strict=True) if _discrete(atom)]
        return _curved(out, jump=True) if any(x.draws for x in places) else out
    if name in _KINKED:
        return _curved(out, jump=True)._replace(peak=name in _PEAKS)
    return _curved(out, jump=name in _CUSTOM and _function_name(eqn) in _KINKED_FUNCTIONS)


def _join(ins: list[Fact]) -> Fact:
    """All that enters: the union; a fold that is used otherwise than by a logarithm is a jump."""
    return Fact(
        frozenset().union(*(x.draws for x in ins)),
        max((x.order for x in ins), default=0),
        any(x.hidden for x in ins),
        any(x.step for x in ins),
        any(x.blind for x in ins),
        any(x.jump or (x.folded and x.order > 0) for x in ins),
        noise=max((x.noise for x in ins), default=0),
    )


def _curved(out: Fact, *, jump: bool = False) -> Fact:
    """A nonlinear function of the shifts: what enters its argument enters its derivative."""
    if not out.order:
        return out
    return out._replace(order=2, blind=out.blind or out.hidden, jump=jump or out.jump or out.step)


def _choice(pred: Fact, cases: list[Fact]) -> Fact:
    """A choice between cases that depend on the shifts, made by a draw, jumps."""
    out = _join(cases)
    noise = 2 if pred.noise else out.noise
    out = out._replace(peak=any(case.peak for case in cases), noise=noise)
    if not pred.draws:
        return out
    constants = not out.draws
    out = out._replace(draws=out.draws | pred.draws, step=out.step or constants)
    return _curved(out, jump=True)


def _guards(name: str, eqn: Any) -> bool:
    """A test for finiteness or NaN: the same for almost all draws."""
    if name == "is_finite":
        return True
    if name not in ("ne", "eq"):
        return False
    first, second = eqn.invars
    if first is second:
        return True
    values = [atom.val for atom in (first, second) if hasattr(atom, "val")]
    return any(jnp.ndim(v) == 0 and abs(float(v)) == float("inf") for v in values)


def _discrete(atom: Any) -> bool:
    return not jnp.issubdtype(getattr(atom.aval, "dtype", jnp.float32), jnp.inexact)


def _open(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one; its constants depend on no draw."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _function_name(eqn: Any) -> str:
    inner = _open(eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr")))
    return str(getattr(getattr(inner, "debug_info", None), "func_name", ""))


def _scan(params: Any, ins: list[Fact], inputs: dict[str, frozenset[str]]) -> list[Fact]:
    consts, carried = params["num_consts"], params["num_carry"]
    fixed, carry = ins[:consts], ins[consts : consts + carried]
    xs = ins[consts + carried :]
    while True:
        outs = _walk(_open(params["jaxpr"]), fixed + carry + xs, inputs)
        grown = [_union(a, b) for a, b in zip(carry, outs[:carried], strict=True)]
        if grown == carry:
            return carry + outs[carried:]
        carry = grown


def _while(params: Any, ins: list[Fact], inputs: dict[str, frozenset[str]]) -> list[Fact]:
    cond_n, body_n = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body = ins[:cond_n], ins[cond_n : cond_n + body_n]
    carry = ins[cond_n + body_n :]
    while True:
        outs = _walk(_open(params["body_jaxpr"]), for_body + carry, inputs)
        grown = [_union(a, b) for a, b in zip(carry, outs, strict=True)]
        if grown == carry:
            (pred,) = _walk(_open(params["cond_jaxpr"]), for_cond + carry, inputs)
            return [_choice(pred, [fact]) for fact in carry]
        carry = grown


def _union(a: Fact, b: Fact) -> Fact:
    return Fact(
        a.draws | b.draws,
        max(a.order, b.order),
        a.hidden or b.hidden,
        a.step or b.step,
        a.blind or b.blind,
        a.jump or b.jump,
        a.peak and b.peak,
        a.folded or b.folded,
        max(a.noise, b.noise),
    )
