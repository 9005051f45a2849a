"""Rows of data for density estimation: checked, split, standardised."""

from typing import Any, NamedTuple

import numpy as np

from vflow.bijections import Affine
from vflow.fit._dtype import default_dtype


class Rows(NamedTuple):
    """Some rows of the data, on the host.

    Attributes:
        x: (n, *event shape), float64.
        condition: (n, *condition shape), float64, or None.
        weights: (n,), float64, with mean one; or None.
    """

    x: np.ndarray
    condition: np.ndarray | None
    weights: np.ndarray | None

    def take(self, index: np.ndarray) -> "Rows":
        """The rows at `index`, their weights with mean one again."""
        condition = None if self.condition is None else self.condition[index]
        if self.weights is None:
            return Rows(self.x[index], condition, None)
        weights = self.weights[index]
        return Rows(self.x[index], condition, weights / weights.mean() if index.size else weights)


def check_rows(flow: Any, data: Any, condition: Any, weights: Any) -> Rows:
    """Data, conditions and weights as finite float64 arrays of fitting shapes.

    Raises:
        TypeError, ValueError: they are not; with the row and column.
    """
    x = _finite("data", data, flow.shape)
    if condition is not None and flow.condition_shape is None:
        raise ValueError("fit_density: a condition was given, but the flow is unconditional.")
    if flow.condition_shape is not None:
        if condition is None:
            raise ValueError(
                "fit_density: condition is missing: the flow is conditional and needs one row of shape "
                f"{flow.condition_shape} for each row of data."
            )
        condition = _finite("condition", condition, flow.condition_shape)
        if len(condition) != len(x):
            raise ValueError(
                f"fit_density: condition has {len(condition)} rows, data has {len(x)}."
            )
    if weights is not None:
        weights = _finite("weights", weights, ())
        if weights.shape != (len(x),) or weights.min() < 0 or weights.max() == 0:
            raise ValueError(
                f"fit_density: weights must be {len(x)} non-negative numbers, one a row of data, not "
                f"all zero; got shape {weights.shape}."
            )
        weights = weights / weights.mean()
    return Rows(x, condition, weights)


def split_rows(rows: Rows, fraction: float | int, permutation: np.ndarray) -> tuple[Rows, Rows]:
    """Rows for training and for validation.

    Raises:
        ValueError: the fraction is no fraction, or leaves too few rows.
    """
    if isinstance(fraction, bool) or not 0 <= fraction < 1:
        raise ValueError(
            f"fit_density: validation_fraction must be in [0, 1), got {fraction!r}; 0 trains on all "
            "rows, without early stopping."
        )
    n = len(rows.x)
    held_out = max(round(fraction * n), 1) if fraction > 0 else 0
    if n - held_out < 2:
        raise ValueError(
            f"fit_density: {n} rows of data leave {n - held_out} for training and {held_out} for "
            "validation; at least 2 are needed for training."
        )
    parts = permutation[held_out:], permutation[:held_out]
    for name, index in zip(("training", "validation"), parts, strict=True):
        if index.size and rows.weights is not None and not rows.weights[index].any():
            raise ValueError(f"fit_density: all weights of the rows for {name} are zero.")
    return rows.take(parts[0]), rows.take(parts[1])


def standardiser(rows: Rows) -> Affine:
    """The elementwise affine map from standardised coordinates to those of the data.

    Raises:
        ValueError: a column is constant.
    """
    loc = np.average(rows.x, axis=0, weights=rows.weights)
    scale = np.sqrt(np.average((rows.x - loc) ** 2, axis=0, weights=rows.weights))
    smallest = 1e-12 * np.abs(loc)  # what rounding leaves of a constant
    if (scale <= smallest).any():
        column = _first(scale <= smallest)
        value = rows.x[0][np.unravel_index(column, scale.shape)] if scale.shape else rows.x[0]
        raise ValueError(
            f"fit_density: column {column} of data is constant ({value:g}) in the {len(rows.x)} rows "
            "for training: it has no density. Leave it out."
        )
    dtype = default_dtype()
    return Affine(loc.astype(dtype), scale.astype(dtype))


def to_standard(rows: Rows, layer: Affine) -> Rows:
    """The rows on the base side of the affine layer, computed in float64."""
    loc, log_scale = np.asarray(layer.loc, np.float64), np.asarray(layer.log_scale, np.float64)
    return rows._replace(x=(rows.x - loc) * np.exp(-log_scale))


def _finite(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(value)
        if array.dtype.kind in "cmMSU":
            raise TypeError(f"got {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fit_density: {name} must be an array of numbers: {error}.") from None
    if array.ndim != 1 + len(shape) or array.shape[1:] != shape:
        wanted = ", ".join(["n", *map(str, shape)]) + ("," if not shape else "")
        raise ValueError(
            f"fit_density: {name} has shape {array.shape}, expected ({wanted}), one row an event."
        )
    broken = ~np.isfinite(array)
    if broken.any():
        row, *column = np.argwhere(broken)[0].tolist()
        where = f"row {row}" + (f", column {_plain(column)}" if column else "")
        rows = np.unique(np.argwhere(broken)[:, 0]).size
        raise ValueError(
            f"fit_density: {name} is not finite at {where} ({array[tuple([row, *column])]}), "
            f"{rows} of {len(array)} rows are affected. Leave them out or fill them in."
        )
    return array


def _plain(index: list[int]) -> Any:
    return index[0] if len(index) == 1 else tuple(index)


def _first(mask: np.ndarray) -> Any:
    return _plain(np.argwhere(mask)[0].tolist()) if mask.ndim else 0
