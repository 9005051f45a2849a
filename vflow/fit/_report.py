"""A fit on one self-contained page: verdict, loss curve, weights, marginals and pairs."""

import html
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vflow.diagnostics import psis
from vflow.fit import _svg as svg
from vflow.fit._save import vflow_version, write_atomic

MAX_MARGINALS = 24
MAX_PAIRS = 4  # coordinates in the pair plot
_DOTS = 300

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.badge { padding: .1rem .6rem; border-radius: .4rem; color: #fff; }
.ok { background: #2b7a3d; } .suspect { background: #a86500; } .failed { background: #a62424; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: .4rem; vertical-align: top; }
figcaption { font-size: .85rem; } svg { display: block; overflow: visible; }
.pairs { display: grid; justify-content: start; } .pairs b { place-self: center; }
"""

_MEANING = {
    "ok": "The importance weights of fresh draws find nothing wrong: means and quantiles of "
    "<code>sample()</code> can be used, and <code>resample()</code> corrects what is left.",
    "suspect": "The fit differs from the posterior by more than can be trusted. "
    "<code>resample()</code> may correct it; read the reasons first.",
    "failed": "The draws are not draws from the posterior, and weights cannot correct them.",
}
_BLIND = (
    "What no weight can see: a mode of the posterior where the fit never draws. Fits from other keys "
    "that disagree in the log evidence are a sign of one."
)


def report(
    posterior: Any,
    draws: Mapping[str, np.ndarray],
    corrected: Mapping[str, np.ndarray] | None,
    log_w: np.ndarray,
    path: str | os.PathLike,
) -> None:
    """Write the page.

    Args:
        posterior: the fit.
        draws: draws of the fit, site -> (n, *site shape).
        corrected: the same after importance resampling; None where the weights are not usable.
        log_w: log importance weights of fresh draws, shape (n,).
        path: of the page.
    """
    write_atomic(path, page(posterior, draws, corrected, log_w).encode())


def page(
    posterior: Any,
    draws: Mapping[str, np.ndarray],
    corrected: Mapping[str, np.ndarray] | None,
    log_w: np.ndarray,
) -> str:
    """The page as text, with everything it needs inside."""
    parts = [_verdict(posterior), "<h2>Training</h2>", _history(posterior.history)]
    parts += ["<h2>Importance weights</h2>", _weights(log_w)]
    parts += _pictures(draws, corrected)
    parts += ["<h2>Sites</h2>", _table(posterior.summary())]
    parts += ["<h2>How it was fitted</h2>", _settings(posterior)]
    title = f"vflow: fit of {posterior.target.dim} coordinates, {posterior.status}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(posterior: Any) -> str:
    status, verdict = posterior.status, posterior.verdict
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in posterior.reasons)
    rows = {
        "evidence lower bound (nats)": f"{posterior.elbo}",
        "log evidence (nats)": f"{posterior.log_evidence}",
        "k-hat of the importance weights": f"{verdict.khat:.2f} (trusted below "
        f"{verdict.khat_threshold:.2f})",
        "effective draws in 100": f"{100 * verdict.ess_fraction:.1f}",
        "judged on": f"{verdict.num_draws} fresh draws",
    }
    return (
        f'<h1>Posterior: <span class="badge {status}">{status}</span></h1>'
        f"<p>{_MEANING[status]}</p>{f'<ul>{reasons}</ul>' if reasons else ''}"
        f"{_key_values(rows)}{_witnesses(verdict)}<p>{_BLIND}</p>"
    )


def _witnesses(verdict: Any) -> str:
    """What was looked at, and how far the weights move each site."""
    said = {True: "agrees", False: "objects", None: "not heard"}
    rows = {w.name: f"{said[w.agrees]}: {w.says}" for w in verdict.witnesses}
    moved = {
        row.site: f"mean by {row.mean:.3f} sd, sd by a factor of {math.exp(row.log_sd):.3f}"
        for row in verdict.sites
    }
    parts = [f"<h2>Witnesses</h2>{_key_values(rows)}"] if rows else []
    if moved:
        parts.append(f"<p>How far the weights move each site, at most:</p>{_key_values(moved)}")
    return "".join(parts)


def _history(history: np.ndarray) -> str:
    steps = np.flatnonzero(np.isfinite(history))
    if not steps.size:
        return "<p>No step was taken.</p>"
    values = history[steps]
    low, high = np.quantile(values, (0.1, 1.0))  # the first steps are off the scale of all others
    margin = 0.1 * (high - low) + 1e-3
    axes = svg.Axes((0, max(steps[-1], 1)), (low - margin, high + margin), 640, 220)
    window = max(len(values) // 100, 1)
    means = np.convolve(values, np.ones(window) / window, "valid")
    thin = np.unique(np.linspace(0, len(values) - 1, 600).astype(int))
    axes.line(steps[thin], values[thin], svg.PALE)
    axes.line(steps[window // 2 : window // 2 + len(means)], means, svg.BLUE)
    skipped = len(history) - len(steps)
    note = f"; {skipped} steps were skipped, not finite" if skipped else ""
    return axes.figure(f"objective by step, and its mean over {window} steps{note}")


def _weights(log_w: np.ndarray) -> str:
    """The largest weights against the Pareto law fitted to them, on a log-log scale."""
    smoothed = psis(log_w)
    if smoothed.reason is not None:
        return f"<p>The weights are not usable: {html.escape(smoothed.reason)}.</p>"
    n = log_w.size
    num_tail = int(min(n / 5, 3 * n**0.5))
    order = np.argsort(log_w)[-num_tail:]
    top = np.max(log_w) + math.log(np.mean(np.exp(log_w - np.max(log_w))))
    raw = (log_w[order] - top) / math.log(10)
    law = np.asarray(smoothed.log_weights, np.float64)[order]
    law = (law + math.log(n)) / math.log(10)
    exceed = np.log10(np.arange(num_tail, 0, -1) / n)
    spread = np.concatenate([raw, law])
    axes = svg.Axes((spread.min(), spread.max()), (exceed[-1], exceed[0]), 420, 240, power=True)
    axes.dots(raw, exceed, svg.BLUE)
    axes.line(law, exceed, svg.ORANGE)
    return axes.figure(
        f"share of draws above a weight (mean weight 1), log-log: the {num_tail} largest of {n} weights "
        f"of this page's own draws, and their Pareto law, k-hat {smoothed.khat:.2f} (straighter and "
        "flatter is worse)"
    )


def _pictures(
    draws: Mapping[str, np.ndarray], corrected: Mapping[str, np.ndarray] | None
) -> list[str]:
    panels = _scalars(draws)
    fixed = {} if corrected is None else _scalars(corrected)
    names = list(panels)
    legend = "draws of the fit (blue)"
    if fixed:
        legend += " and after importance resampling (orange)"
    more = len(names) - MAX_MARGINALS
    parts = [f"<h2>Marginals</h2><p>{legend}{f'; {more} more not shown' if more > 0 else ''}.</p>"]
    parts += [_marginal(name, panels[name], fixed.get(name)) for name in names[:MAX_MARGINALS]]
    varied = [name for name in names if np.unique(panels[name][:_DOTS]).size > 1][:MAX_PAIRS]
    if len(varied) < 2:
        return parts
    cells = []
    for i, row in enumerate(varied):
        for j, column in enumerate(varied):
            if i == j:
                cells.append(f"<b>{html.escape(row)}</b>")
                continue
            source, color = (panels, svg.BLUE) if i > j or not fixed else (fixed, svg.ORANGE)
            axes = svg.Axes(_span(panels[column]), _span(panels[row]), 130, 110, bare=True)
            axes.dots(source[column][:_DOTS], source[row][:_DOTS], color)
            cells.append(axes.figure(""))
    note = " (below the diagonal the fit, above it the resampled draws)" if fixed else ""
    style = f"grid-template-columns: repeat({len(varied)}, max-content)"
    return [
        *parts,
        f"<h2>Pairs</h2><p>The first {len(varied)} coordinates{note}.</p>",
        f'<div class="pairs" style="{style}">{"".join(cells)}</div>',
    ]


def _scalars(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every element of every site, as float64; NaN where a draw is not finite."""
    panels = {
        f"{site}[{','.join(map(str, index))}]" if index else site: values[:, *index]
        for site, values in draws.items()
        for index in np.ndindex(values.shape[1:])
    }
    panels = {name: np.asarray(values, np.float64) for name, values in panels.items()}
    return {name: np.where(np.isfinite(v), v, np.nan) for name, v in panels.items()}


def _span(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, (0.002, 0.998)) if known.size else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _marginal(name: str, values: np.ndarray, fixed: np.ndarray | None) -> str:
    low, high = _span(values)
    edges = np.linspace(low, high, 49)
    middle = 0.5 * (edges[1:] + edges[:-1])
    counts = [
        np.histogram(v[~np.isnan(v)], edges)[0] / (len(v) * (edges[1] - edges[0]))
        for v in (values, fixed)
        if v is not None
    ]
    axes = svg.Axes((low, high), (0, max(c.max() for c in counts) or 1.0), 190, 110, flat=True)
    for density, color in zip(counts, (svg.BLUE, svg.ORANGE), strict=False):
        axes.line(middle, density, color)
    return axes.figure(name)


def _table(summary: Any) -> str:
    rows = ["".join(f"<th>{title}</th>" for title in ("site", "mean", "sd", "5%", "50%", "95%"))]
    for name in summary:
        cells = "".join(f"<td>{x:.4g}</td>" for x in summary[name])
        rows.append(f"<td>{html.escape(name)}</td>{cells}")
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _settings(posterior: Any) -> str:
    import jax
    import numpyro

    settings = dict(posterior.settings)
    notes = settings.pop("notes", [])
    settings |= {"versions": f"vflow {vflow_version()}, jax {jax.__version__}, "}
    settings["versions"] += f"numpyro {numpyro.__version__}"
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return _key_values({k: _plain(v) for k, v in settings.items()}) + (
        f"<ul>{listed}</ul>" if notes else ""
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(x)}" for key, x in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _key_values(rows: Mapping[str, str]) -> str:
    cells = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
