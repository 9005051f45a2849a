"""A picture of a posterior: the history of the objective and the marginals."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

_MAX_PANELS = 24
_COLUMNS = 4


def plot(posterior: Any, draws: Mapping[str, np.ndarray], path: str | os.PathLike | None) -> Any:
    """A figure with one panel for the history and one for each of the first scalar marginals."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'posterior.plot() needs matplotlib: pip install "vflow-jax[plots]".'
        ) from error

    panels = [
        (f"{site}[{','.join(map(str, index))}]" if index else site, values[:, *index])
        for site, values in draws.items()
        for index in np.ndindex(values.shape[1:])
    ]
    left_out, panels = len(panels[_MAX_PANELS:]), panels[:_MAX_PANELS]
    rows = math.ceil((len(panels) + 1) / _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    steps = np.flatnonzero(np.isfinite(posterior.history))
    axes[0].plot(steps, posterior.history[steps], linewidth=0.8)
    if len(steps):  # the first steps are off the scale of all others
        low, high = np.quantile(posterior.history[steps], (0.1, 1.0))
        margin = 0.1 * (high - low) + 1e-3
        axes[0].set_ylim(low - margin, high + margin)
    axes[0].set(title="objective", xlabel="step")
    for axis, (name, values) in zip(axes[1:], panels, strict=False):
        axis.set(title=name, yticks=[])
        finite = np.asarray(values[np.isfinite(values)], np.float64)
        if len(finite):
            low, high = np.quantile(finite, (0.001, 0.999))
            margin = 0.0 if high > low else 0.5
            axis.hist(finite, bins=60, range=(low - margin, high + margin), density=True)
    for axis in axes[len(panels) + 1 :]:
        axis.set_axis_off()
    more = f", {left_out} more marginals not shown" if left_out else ""
    figure.suptitle(f"status {posterior.status}, k-hat {posterior.khat:.2f}{more}")
    if path is not None:
        figure.savefig(path)
    return figure
