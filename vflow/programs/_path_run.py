r"""How draws and their log densities behave while the path rule for any program is worked out.

An objective G with path units k (calls of `simulate`, each with a log density $\ell_k$ of its own
draw) is run in one of four ways:

* "trace": abstractly; draws and log densities are marked in the jaxpr (see `_linearity`);
* "plain": once; $\ell_k$ has derivatives along the draw alone. Enough where G is linear in $\ell$;
* "stop": draws and $\ell_k$ are returned without derivative, so that what is left of the derivative
  of G is that of all other uses of the parameters; the live draws are kept aside;
* "move": the draws are shifted by $\eta$, the $\ell_k$ of one unit by $-\delta$.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vflow._core import ProgramError
from vflow.programs._frame import Frame
from vflow.programs._linearity import tag


class NeedsPath(BaseException):
    """A path unit was met and it is not yet known how it is used; `expect` catches it."""


@dataclasses.dataclass
class Unit:
    """A call of `simulate` whose log density carries path gradients.

    Attributes:
        sizes: lengths of the random loops around it, outermost first.
        sites: labels of its draws.
        scanned: whether one of the loops is sequential.
        auto: whether the coefficient of the dropped score is estimated.
        fixed: why the rule for nonlinear objectives does not cover it, or None.
    """

    sizes: tuple[int, ...]
    scanned: bool
    auto: bool
    fixed: str | None
    sites: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class PathRun:
    """One of the four ways; shared by all frames of a run.

    Attributes:
        kind: "trace", "plain", "stop" or "move".
        mix: the coefficient of units with `gradient="auto"`: 0 is total, 1 is path.
        units: found in the run, by label.
        redraw: labels of draws whose distribution depends on others: recomputed in "move".
        stored: label -> what "stop" kept aside.
        estimates: whether log densities with an unbiased estimate use it: the objective is linear
            in them.
        estimated: whether one was met.
        eta: label -> shift of the draw.
        active: the unit whose log density is shifted, by `delta`.
        element: the position of that unit in its loops.
    """

    kind: str
    mix: Any = None
    units: dict[str, Unit] = dataclasses.field(default_factory=dict)
    redraw: frozenset[str] = frozenset()
    stored: dict[str, Any] = dataclasses.field(default_factory=dict)
    estimates: bool = False
    estimated: bool = False
    eta: dict[str, Any] = dataclasses.field(default_factory=dict)
    active: str | None = None
    delta: Any = None
    element: tuple[Any, ...] = ()

    def meet(
        self,
        frame: Frame,
        unit: str,
        gradient: str,
        sites: set[str],
        fixed: str | None = None,
    ) -> None:
        """Note a path unit and the labels of its draws."""
        auto = gradient == "auto"
        known = self.units.setdefault(unit, Unit(frame.sizes, any(frame.sequential), auto, fixed))
        known.sites |= sites

    def weight(self, gradient: str) -> Any:
        """The share of the score that is dropped: None for all of it."""
        return self.mix if gradient == "auto" else None

    def shift(self, frame: Frame, label: str, x: Any) -> Any:
        """The draw moved by its eta, where it has one."""
        if label not in self.eta:
            return x
        eta = at(self.eta[label], frame.position)
        live = self._live(frame)
        return jax.tree.map(lambda x, e: x + jnp.where(live, e, 0), x, eta)

    def lower(self, frame: Frame, unit: str, log_q: Any) -> Any:
        """The log density less delta, where it is the active unit's."""
        if unit != self.active:
            return log_q
        return log_q - jnp.where(self._live(frame), self.delta, 0).astype(jnp.result_type(log_q))

    def _live(self, frame: Frame) -> Any:
        """In sequential loops the element is picked at the site; in parallel ones where they end."""
        live = True
        for depth, (index, sequential) in enumerate(
            zip(frame.position, frame.sequential, strict=True)
        ):
            if sequential and depth < len(self.element):
                live = live & (index == self.element[depth])
        return live

    def pick(self, frame: Frame, block: str, tree: Any) -> Any:
        """Leave one element of a parallel loop alive, if the active unit is inside it."""
        if self.active is None or not self.active.startswith(block):
            return tree
        element = self.element[len(frame.position)]

        def one(leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                return leaf
            mine = jnp.arange(leaf.shape[0]) == element
            mine = mine.reshape((-1,) + (1,) * (leaf.ndim - 1))
            return jnp.where(mine, leaf, jax.lax.stop_gradient(leaf))

        return jax.tree.map(one, tree)


def at(tree: Any, position: tuple[Any, ...]) -> Any:
    """The entry of stacked leaves at a position of the loops."""
    for index in position:
        tree = jax.tree.map(lambda leaf, i=index: leaf[i], tree)
    return tree


@jax.custom_jvp
def _one(x: Any) -> Any:
    """Ones, whose derivative is refused."""
    return jnp.ones_like(x)


@_one.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ProgramError(
        'a second derivative of a log density with gradient="path" would be wrong: the score is a '
        'number to JAX. Use gradient="total".'
    )


@jax.custom_jvp
def _along(score: Any, x: Any) -> Any:
    return jnp.zeros((), jnp.result_type(*jax.tree.leaves(x)))


@_along.defjvp
def _slope(primals: Any, tangents: Any) -> Any:
    zero = _along(*primals)
    moves = jax.tree.map(lambda s, x, dx: jnp.vdot(s * _one(x), dx), *primals, tangents[1])
    return zero, jnp.asarray(sum(jax.tree.leaves(moves)), zero.dtype)


def along(score: Any, x: Any) -> Any:
    r"""Zero, with the derivative $\langle \mathrm{score}, dx \rangle$; its second one is refused.

    Args:
        score: a pytree of constants.
        x: a pytree of the same structure.
    """
    return _along(jax.lax.stop_gradient(score), x)


def slope_of(x: Any) -> Any:
    """Zero, with the derivative of `x`."""
    return x - jax.lax.stop_gradient(x)


def draw_scored(
    frame: Frame,
    label: str,
    gradient: str,
    total: Callable[[], tuple[Any, Any]],
    scored: Callable[..., tuple[Any, Any, Any]],
    fixed: str | None = None,
    estimated: Callable[[], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """The draw of a flow and its log density, in the way of the run.

    Args:
        frame: the running one.
        label: full name of the call, which is also the unit.
        gradient: "total", "path" or "auto".
        total: draws with live derivatives, `() -> (x, log_q)`.
        scored: `(live=) -> (x, log_q, score)`: the same draw, live, its log density, live or
            stopped, and its score.
        fixed: why the rule for nonlinear objectives does not cover it, or None.
        estimated: `total` with an unbiased estimate of the log density, where there is a cheaper one.
    """
    run = frame.run.path
    estimated = estimated if gradient == "total" else None
    if run is None:
        if gradient != "total" or estimated is not None:
            raise NeedsPath
        return total()
    run.estimated = run.estimated or estimated is not None
    weight = run.weight(gradient)
    if gradient != "total":
        run.meet(frame, label, gradient, {label}, fixed)
    if run.kind == "plain":
        if gradient == "total":
            return estimated() if run.estimates and estimated is not None else total()
        x, log_q, score = scored(live=weight is not None)
        if weight is None:
            return x, log_q + along(score, x)
        return x, log_q + weight * (along(score, x) - slope_of(log_q))
    if run.kind == "trace":
        x, log_q = total()
        x = tag("value", label, x)
        log_q = log_q if estimated is None else tag("estimate", label, log_q)
        return x, tag("draw" if gradient == "total" else "log_q", label, log_q)
    if run.kind == "stop":
        live = gradient == "total" or weight is not None
        x, log_q, score = scored(live=live)
        frame.exports[label] = {"x": x, "log_q": log_q, "score": score}
        if not live:
            return jax.lax.stop_gradient(x), log_q
        left = slope_of(log_q) - along(score, x)
        share = 1.0 if weight is None else 1.0 - weight
        return jax.lax.stop_gradient(x), jax.lax.stop_gradient(log_q) + share * left
    kept = at(run.stored[label], frame.position)
    x, log_q = total() if label in run.redraw else (kept["x"], kept["log_q"])
    moved = run.shift(frame, label, x)
    log_q = log_q + jnp.vdot(kept["score"], moved - x)
    return moved, run.lower(frame, label, log_q)


def draw_site(frame: Frame, site: Any, value: Any) -> Any:
    """The value of a site in the way of the run; `site.drawn_log_prob` follows it.

    Args:
        frame: the running one.
        site: the random choice, whose strategy has just drawn.
        value: what it drew.
    """
    run, label = frame.run.path, frame.scope + site.name
    leaves = jax.tree.leaves(value)
    continuous = all(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves)
    if run.kind == "trace" and not continuous:
        return tag("discrete", label, value)
    if run.kind == "plain" or not continuous:
        return value
    log_q = site.drawn_log_prob
    if run.kind == "trace":
        site.drawn_log_prob = None if log_q is None else tag("draw", label, log_q)
        return tag("value", label, value)
    if run.kind == "stop":
        frame.exports[label] = {"x": value}
        still = jax.lax.stop_gradient(value)
        if log_q is not None:  # less its derivative along the draw
            score = jax.lax.stop_gradient(site.view.dist.score(still))
            frame.exports[label]["score"] = score
            site.drawn_log_prob = log_q - along(score, value)
        return still
    moved = run.shift(frame, label, value)
    if log_q is not None:
        kept = at(run.stored[label], frame.position)
        site.drawn_log_prob = log_q + jnp.vdot(kept["score"], moved - value)
    return moved
