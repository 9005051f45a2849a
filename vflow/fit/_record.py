"""What a file knows about a posterior, and the way back."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vflow._core import Estimate
from vflow.fit._codec import NotOurs, decode, encode
from vflow.fit._dtype import cast, default_dtype, scope
from vflow.fit._save import read_file, restore, vflow_version
from vflow.fit._verdict import SiteShift, Verdict, Witness
from vflow.targets import Target


def record(posterior: Any) -> tuple[dict[str, Any], Any]:
    """The header and the tree of a posterior's file."""
    target, dtype = posterior.target, posterior.settings["dtype"]
    probe = posterior._drawer.plain(posterior.flow, jax.random.key(0), 1)[0]
    try:
        structure, foreign = encode(posterior.flow), None
    except NotOurs as error:
        structure, foreign = None, str(error)
    header = {
        "vflow": vflow_version(),
        "dim": target.dim,
        "sites": _sites(target),
        "terms": _terms(target, probe, dtype),
        "structure": structure,
        "foreign": foreign,
        "verdict": posterior.verdict._asdict(),
        "settings": posterior.settings,
        "float": default_dtype(),
        "num_history": len(posterior.history),
    }
    history = np.asarray(posterior.history, np.float64)
    return header, (np.asarray(probe, np.float64), history, posterior.flow)


def read_record(path: str | os.PathLike, target: Target, template: Any) -> tuple[Any, ...]:
    """`(flow, verdict, history, settings)` of a file, for the target that it was fitted to."""
    header, leaves = read_file(path, "posterior")
    if header["sites"] != _sites(target):
        raise ValueError(
            f"{path} is a fit of another model: its sites are {_told(header['sites'])}, those of "
            f"the given one {_told(_sites(target))}."
        )
    if template is None:
        if header["structure"] is None:
            raise ValueError(
                f"{path} holds a flow that is not made of vflow's own parts ({header['foreign']}): "
                "build one of the same structure and pass it, vf.load(path, model, flow=...), or the "
                "guide that was fitted, vf.load(path, model, guide=..., params=...)."
            )
        try:
            template = decode(header["structure"])
        except ValueError as error:
            raise ValueError(
                f"{path}, written by vflow {header['vflow']}, cannot be read by vflow "
                f"{vflow_version()}: {error}."
            ) from error
    with jax.enable_x64(True):  # leaves come in the types in which they were written
        template = cast(template, header["float"])
        like = (np.zeros(header["dim"]), np.zeros(header["num_history"]), template)
        probe, history, flow = restore(path, leaves, like)
    terms = _terms(target, probe, header["settings"]["dtype"])
    changed = [name for name in header["terms"] | terms if _differ(name, header["terms"], terms)]
    if changed:
        raise ValueError(
            f"{path} is a fit of another model or of other data: at one point the log density by "
            f"site is {_pick(header['terms'], changed)} in the file, {_pick(terms, changed)} now."
        )
    verdict = header["verdict"] | {
        "reasons": tuple(header["verdict"]["reasons"]),
        "elbo": Estimate(*header["verdict"]["elbo"]),
        "log_evidence": Estimate(*header["verdict"]["log_evidence"]),
        "witnesses": tuple(Witness(*w) for w in header["verdict"].get("witnesses", ())),
        "sites": tuple(SiteShift(*s) for s in header["verdict"].get("sites", ())),
    }
    return cast(flow, default_dtype()), Verdict(**verdict), history, header["settings"]


def _sites(target: Target) -> list[list[Any]]:
    return [[s.name, list(s.shape), s.start, s.stop, s.support] for s in target.sites]


def _told(sites: list[list[Any]]) -> str:
    return ", ".join(f"{name} {tuple(shape)} {support}" for name, shape, _, _, support in sites)


def _terms(target: Target, x: np.ndarray, dtype: str) -> dict[str, float]:
    """The log density by site at one point: differs when prior or data do."""
    with scope(dtype):
        terms = jax.jit(target.terms)(jnp.asarray(x, dtype))
        return {name: float(jnp.sum(value)) for name, value in terms.items()}


def _differ(name: str, old: dict[str, float], new: dict[str, float]) -> bool:
    a, b = old.get(name, math.inf), new.get(name, -math.inf)
    return not (a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 0.01 * (1 + abs(a)))


def _pick(terms: dict[str, float], names: list[str]) -> dict[str, float]:
    return {name: round(terms[name], 4) for name in names if name in terms}
