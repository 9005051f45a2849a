"""The verdict on a fit of globals and locals, on all rows."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow.diagnostics import psis
from vflow.fit._local_draws import RowDrawer
from vflow.fit._verdict import Verdict, Witness, judge
from vflow.targets._rows import Rows
from vflow.targets._site import Site

_EVALUATIONS = 2e8  # densities of one row that a verdict may cost
_DRAWS = (1000, 16384)  # fewest and most draws of the globals in a verdict
_LOOKED_AT = 64  # rows whose own weights are judged
OF_ROWS = "locals of some rows"  # name of a witness


def judge_rows(drawer: RowDrawer, flow: Any, key: PRNGKeyArray) -> Verdict:
    """The verdict on all rows: of the globals' weights, and of the locals of some rows."""
    rows = drawer.rows
    cost = rows.size * drawer.inner
    num_draws = int(np.clip(_EVALUATIONS / cost, *_DRAWS))
    parts = []
    for i, n in enumerate(_portions(num_draws, drawer.batch)):
        x, log_w = drawer.weighted(flow, jax.random.fold_in(key, i), n)
        parts.append((x[:, rows.global_index], log_w))
    g, log_w = (np.concatenate(part) for part in zip(*parts, strict=True))
    verdict = judge(log_w, draws=np.asarray(g, np.float64), sites=_global_sites(rows))
    if not rows.num_locals:
        return verdict
    order = np.random.default_rng(np.asarray(jax.random.key_data(key))).permutation(rows.size)
    numbers = np.sort(order[:_LOOKED_AT])
    weights = drawer.by_row(flow, jax.random.fold_in(key, 1 << 20), numbers, 4096)
    smoothed = [psis(np.asarray(column, np.float64)) for column in weights.T]
    bad = [s.reason is not None or not s.khat < s.threshold for s in smoothed]
    told = (
        f"The locals of {len(numbers)} of {rows.size} rows were judged one by one, given the globals: "
        f"k-hat is at most {max(s.khat for s in smoothed):.2f}. The others enter by their sum only."
    )
    if any(bad):
        worst = numbers[int(np.argmax([s.khat for s in smoothed]))]
        reason = (
            f"the locals of {sum(bad)} of {len(numbers)} rows that were looked at have weights that "
            f"cannot be trusted (k-hat up to {max(s.khat for s in smoothed):.2f}, at row {worst} of plate "
            f"{rows.plate!r}): their conditional posterior is far from a Gaussian."
        )
        status = "failed" if verdict.status == "failed" else "suspect"
        verdict = verdict._replace(status=status, reasons=(*verdict.reasons, reason))
    witness = Witness(OF_ROWS, told, not any(bad))
    return verdict._replace(witnesses=(*verdict.witnesses, witness))


def _global_sites(rows: Rows) -> list[Site]:
    """The sites outside the plate, with their places among the globals."""
    place = {int(x): i for i, x in enumerate(rows.global_index)}
    return [
        dataclasses.replace(s, start=place[s.start], stop=place[s.start] + s.stop - s.start)
        for s in rows.whole.sites
        if s.start in place and s.stop > s.start
    ]


def _portions(n: int, size: int) -> list[int]:
    """n in pieces of at most `size`: the draws themselves are dropped between them."""
    return [size] * (n // size) + ([n % size] if n % size else [])
