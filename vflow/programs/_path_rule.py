r"""The unbiased path gradient of any program.

Let G be an objective of draws $x_k$ and of their own log densities $\ell_k = \log q_k(x_k)$. With
$\ell_k$ replaced by $\log q_k(x_k; \mathrm{stop}\,\phi) - \delta_k$,

$$\nabla_\phi\,\mathbb{E}\,G = \mathbb{E}\Big[\frac{d}{d\phi} G(0, x(\phi); \phi)
    - \sum_k \frac{d}{d\phi} \frac{\partial G}{\partial \delta_k}(0, x^{(k)}(\phi);
    \mathrm{stop}\,\phi)\Big],$$

where in $x^{(k)}$ only the sampling path of $x_k$ is live, and what is drawn from distributions that
depend on $x_k$ is drawn anew from it, with $\phi$ stopped and the same noise. The dropped score term
is $-\sum_k \mathbb{E}[h(x_k) \nabla_\phi \log q_k(x_k)]$ with $h = \partial G/\partial\delta_k$, and
$\mathbb{E}[h(x) \nabla_\phi \log q(x)] = \mathbb{E}[\tfrac{d}{d\phi} h(x(\phi))]$ with the parameters
inside h fixed. Where G is linear in $\ell$ with coefficients that no draw enters, the second term is
zero: this is read off the jaxpr, and costs nothing.

With shifts $\eta_k$ of the draws the rule is

$$\nabla_\phi G\big|_{x, \ell\ \mathrm{fixed}}
    + \sum_k \Big\langle \nabla_{\eta_k}\Big(G - \frac{\partial G}{\partial\delta_k}\Big),
    \frac{\partial x_k}{\partial\phi} \Big\rangle,$$

two runs: "stop" for the first term, and "move" for the gradient in $\eta$, in which each element of
`vf.vmap` is a lane from the end of the loop on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import ProgramError
from vflow.programs._linearity import Report
from vflow.programs._path_run import PathRun, Unit, along


class Rule(NamedTuple):
    """How the path units of a program are treated.

    Attributes:
        plain: a single run is enough.
        linear: the second term of the rule is zero.
        redraw: labels of draws whose distribution depends on other draws.
        auto: whether a coefficient is to be estimated.
        estimates: whether log densities may be estimated.
    """

    plain: bool
    linear: bool
    redraw: frozenset[str]
    auto: bool
    estimates: bool


def rule_for(report: Report, units: dict[str, Unit]) -> Rule:
    """The cheapest unbiased way.

    Raises:
        ProgramError: there is none.
    """
    if report.refusal is not None:
        names = sorted(unit.rstrip("/") for unit in units)
        raise ProgramError(
            f"the path gradient of {', '.join(names)} would be biased: {report.refusal}. Use "
            "gradient='total'."
        )
    tied = [unit for unit, found in units.items() if _depends(unit, found, report.inputs)]
    plain = report.linear and not tied
    fixed = [unit for unit, found in units.items() if found.fixed]
    if fixed and not plain:
        raise ProgramError(
            f"the path gradient of {', '.join(sorted(fixed))} would be biased in this objective: "
            f"{units[fixed[0]].fixed}. Use gradient='total'."
        )
    redraw = frozenset(label for label, draws in report.inputs.items() if draws)
    auto = any(unit.auto for unit in units.values())
    return Rule(plain, report.linear, redraw, auto, report.estimates)


def _depends(label: str, unit: Unit, inputs: dict[str, frozenset[str]]) -> bool:
    """Whether a draw of the unit depends on draws outside it, or on those of earlier steps."""

    def foreign(draw: str) -> bool:
        return unit.scanned or not (label.endswith("/") and draw.startswith(label))

    return any(foreign(draw) for site in unit.sites for draw in inputs.get(site, ()))


def by_rule(execute: Callable[..., Any], rule: Rule, mix: Any) -> tuple[Array, dict[str, Array]]:
    """One run of the objective with its path gradient.

    Args:
        execute: `(path_run, frozen) -> (value, coefficients, exports)` runs the objective, with
            its arguments behind `stop_gradient` if `frozen`.
        rule: what `rule_for` found.
        mix: the coefficient of units with `gradient="auto"`.

    Returns:
        The value and the coefficients of baselines, as `execute` has them.
    """
    if rule.plain:
        run = PathRun("plain", mix, estimates=rule.estimates)
        value, coefficients, _ = execute(run, frozen=False)
        return value, coefficients
    stop = PathRun("stop", mix)
    value, coefficients, exports = execute(stop, frozen=False)
    stored = jax.lax.stop_gradient(exports)
    zeros = jax.tree.map(jnp.zeros_like, {label: kept["x"] for label, kept in stored.items()})

    def moved(eta: Any, active: str | None = None, delta: Any = None, element: Any = ()) -> Array:
        run = PathRun(
            "move",
            redraw=rule.redraw,
            stored=stored,
            eta=eta,
            active=active,
            delta=delta,
            element=element,
        )
        return execute(run, frozen=True)[0]

    pulls: dict[str, Any] = {}
    for label, unit in stop.units.items() if not rule.linear else ():
        weight = 1.0 if mix is None or not unit.auto else mix
        pulls |= _pull_of_unit(moved, label, unit, zeros, weight)
    rest = {label: zero for label, zero in zeros.items() if label not in pulls}
    if rest:
        pulls |= jax.grad(moved)(rest)
    moves = [along(pulls[label], exports[label]["x"]) for label in exports]
    return value + sum(moves, jnp.zeros_like(value)), coefficients


def _pull_of_unit(
    moved: Callable[..., Array], label: str, unit: Unit, zeros: dict[str, Any], weight: Any
) -> dict[str, Any]:
    r"""$\nabla_\eta (G - \mathrm{weight}\,\partial G/\partial\delta)$ of the draws of one unit."""

    def one(eta: Any, *element: Array) -> Array:
        zero = jnp.zeros(())
        value, slope = jax.jvp(
            lambda delta: moved(eta, label, delta, element), (zero,), (jnp.ones_like(zero),)
        )
        return value - weight * slope

    def total(eta: Any) -> Array:
        lanes: Callable[..., Array] = lambda *element: one(eta, *element)
        for depth in range(len(unit.sizes)):
            axes = tuple(0 if i == depth else None for i in range(len(unit.sizes)))
            lanes = jax.vmap(lanes, in_axes=axes)
        return jnp.sum(lanes(*[jnp.arange(size) for size in unit.sizes]))

    return jax.grad(total)({site: zeros[site] for site in unit.sites})
