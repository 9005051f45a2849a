"""What a fit tries next when its verdict is not good enough, and whether that was worth it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vflow._core import FitError
from vflow._core._compile import filter_jit_once
from vflow.bijections import Chain, Freeze, SmoothHeavyTail
from vflow.diagnostics import tails
from vflow.distributions import Flow
from vflow.fit._dtype import scope
from vflow.fit._recipe import default_flow
from vflow.fit._verdict import Verdict, misses
from vflow.targets import Target

MORE = 2  # times as many draws behind each gradient
_MOST_PARTICLES = 2  # how often
_NATS = 0.1  # of evidence found anew that count as an improvement
_BULK = 0.3  # ESS fraction from which on the bulk is right
_TAIL_DIM = 64  # above, tails are not looked for
_RANK = {"failed": 0, "suspect": 1, "ok": 2}

SAID = {
    "first": "training",
    "longer": "another round of the same",
    "cover": "a spline flow that starts from draws of the covering mixture",
    "tails": "a layer with power tails",
    "weights": "maximum likelihood on importance-weighted draws from a wider base",
    "particles": "twice as many draws behind each gradient",
    "spline": "spline layers in front of the others",
}


def next_remedy(
    verdict: Verdict,
    tried: list[str],
    *,
    ours: bool,
    bent: bool,
    heavy: Callable[[], list[float | None] | None],
) -> dict[str, Any] | None:
    """The remedy for what the verdict objects to, of those not yet tried; None if there is none.

    Args:
        verdict: of the best flow so far.
        tried: names of the rounds so far.
        ours: whether family and objective were chosen here and may be changed.
        bent: whether it has spline layers already.
        heavy: finds df of each coordinate of the whitened target, None for a light one; None if all
            are light. Asked only where k-hat is too large.
    """
    if ours and misses(verdict) and "cover" not in tried and not bent:
        return {"name": "cover"}
    if ours and not verdict.khat < verdict.khat_threshold and "tails" not in tried:
        df = heavy()
        if df is not None:
            return {"name": "tails", "df": df}
    tails_alone = not verdict.khat < verdict.khat_threshold and verdict.ess_fraction > _BULK
    if ours and tails_alone and "weights" not in tried:
        return {"name": "weights"}
    if "particles" not in tried:
        return {"name": "particles"}
    if ours and not bent and "spline" not in tried and "cover" not in tried:
        return {"name": "spline"}
    if tried.count("particles") < _MOST_PARTICLES:
        return {"name": "particles"}
    return None


def better(new: Verdict, old: Verdict) -> bool:
    """Whether a verdict on fresh draws improves on another of the same target.

    A better status does; or more evidence than chance explains, as mass was missed before; or, with
    no less evidence, a larger effective sample size.
    """
    if _RANK[new.status] != _RANK[old.status]:
        return _RANK[new.status] > _RANK[old.status]
    rise = new.log_evidence.value - old.log_evidence.value
    error = np.hypot(new.log_evidence.standard_error, old.log_evidence.standard_error)
    if np.isfinite(rise) and abs(rise) > max(_NATS, 4 * error):
        return bool(rise > 0)
    return new.ess_fraction > old.ess_fraction


def heavy_tails(target: Target, flow: Any) -> list[float | None] | None:
    """df of each coordinate that the flow's last, frozen layer whitens; None if all are light."""
    layer = _last(flow)
    if target.dim > _TAIL_DIM:
        return None

    def log_density(z):
        return target.log_prob(z if layer is None else layer.forward_and_log_det(z)[0])

    try:
        with scope("float64"):
            report = tails(Target(log_density, target.dim))
    except (ValueError, FloatingPointError):  # no mode to start from
        return None
    if not report.heavy.any():
        return None
    return [float(df) if np.isfinite(df) else None for df in report.df]


def grown(flow: Any, remedy: dict[str, Any], key: Any) -> Any:
    """The flow with the layers that a remedy adds; it draws nearly what it drew before."""
    dim = flow.shape[0]
    if remedy["name"] == "spline":
        bend = default_flow(key, dim, bent=True)
        return Flow(flow.base, Chain([bend.bijection, flow.bijection]))
    if remedy["name"] == "tails":
        df = np.array([np.inf if df is None else df for df in remedy["df"]])
        layer = filter_jit_once(lambda: SmoothHeavyTail(dim, df=df, weight=0.1))()
        if _last(flow) is None:
            return Flow(flow.base, Chain([flow.bijection, layer]))
        *layers, last = flow.bijection.layers
        return Flow(flow.base, Chain([*layers, layer, last]))
    return flow


def _last(flow: Any) -> Freeze | None:
    bijection = getattr(flow, "bijection", None)
    if isinstance(bijection, Chain) and isinstance(bijection.layers[-1], Freeze):
        return bijection.layers[-1]
    return None


def told(number: int, remedy: dict[str, Any], old: Verdict, new: Verdict, *, kept: bool) -> str:
    """A sentence about a round of escalation."""
    change = (
        f"ESS fraction {old.ess_fraction:.3f} -> {new.ess_fraction:.3f}, k-hat {old.khat:.2f} -> "
        f"{new.khat:.2f}"
    )
    end = "kept" if kept else "no improvement, so what was there before is kept"
    return f"Round {number + 1} tried {SAID[remedy['name']]}: {change}; {end}."


def broken(number: int, remedy: dict[str, Any], error: FitError) -> str:
    """A sentence about a round of escalation whose training broke down."""
    why = str(error).split(". ")[0]
    said = SAID[remedy["name"]]
    return f"Round {number + 1} tried {said}, and broke down: {why}; what was there before is kept."
