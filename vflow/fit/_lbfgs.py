"""Many starts climbed to modes side by side."""

from collections.abc import Callable

import numpy as np

_MEMORY = 10
_ARMIJO = 1e-4
_FLAT = 1e-5  # largest gradient at a mode
_STILL = 1e-10  # relative rise of a step that counts as none
_TRIALS = 20


def climb(
    value_and_grad: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    starts: np.ndarray,
    num_steps: int = 200,
) -> np.ndarray:
    """Modes that L-BFGS reaches from each start, with backtracking; shape (n, dim).

    All starts share each call of the density, which is what costs time on the host. A point whose
    density or gradient is not finite is never stepped to.

    Args:
        value_and_grad: of points (n, dim): values (n,) and gradients (n, dim).
        starts: shape (n, dim), with finite values and gradients.
        num_steps: at most.

    Source:
        Liu & Nocedal 1989, On the limited memory BFGS method for large scale optimization.
    """
    x = np.array(starts, np.float64)
    value, grad = value_and_grad(x)
    shifts = np.zeros((0, *x.shape))
    turns = np.zeros((0, *x.shape))
    rising = np.abs(grad).max(axis=1) > _FLAT
    for _ in range(num_steps):
        if not rising.any():
            break
        step = _direction(grad, shifts, turns)
        slope = (step * grad).sum(axis=1)
        lost = ~(slope > 0) | ~np.isfinite(step).all(axis=1)
        plain = grad / np.maximum(np.linalg.norm(grad, axis=1, keepdims=True), 1.0)
        step = np.where(lost[:, None], plain, step)
        slope = np.where(lost, (plain * grad).sum(axis=1), slope)
        new_x, new_value, new_grad, moved = _search(
            value_and_grad, x, value, grad, step, slope, rising
        )
        shifts = np.concatenate([shifts, (new_x - x)[None]])[-_MEMORY:]
        turns = np.concatenate([turns, (grad - new_grad)[None]])[-_MEMORY:]
        rise = new_value - value
        x, value, grad = new_x, new_value, new_grad
        # A failed search forgets its curvature and tries the gradient once before it gives up.
        tired = rising & ~moved & (np.abs(shifts[:-1]).sum(axis=(0, 2)) > 0)
        shifts[:, tired], turns[:, tired] = 0.0, 0.0
        still = rise <= _STILL * np.maximum(np.abs(value), 1.0)
        rising &= tired | ~(still | (np.abs(grad).max(axis=1) <= _FLAT))
    return x


def _direction(grad: np.ndarray, shifts: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The ascent direction of each row; pairs without positive curvature count for nothing."""
    bend = (shifts * turns).sum(axis=-1)
    sizes = np.linalg.norm(shifts, axis=-1) * np.linalg.norm(turns, axis=-1)
    sound = bend > 1e-10 * sizes
    inverse = np.where(sound, 1 / np.where(sound, bend, 1.0), 0.0)
    out, parts = grad.copy(), []
    scale = 1 / np.maximum(
        np.linalg.norm(grad, axis=1), 1.0
    )  # the first step has length one at most
    for s, y, r in zip(shifts[::-1], turns[::-1], inverse[::-1], strict=True):
        a = r * (s * out).sum(axis=1)
        out -= a[:, None] * y
        parts.append(a)
    for s, y, ok in zip(shifts, turns, sound, strict=True):  # the last sound pair sets the scale
        scale = np.where(ok, (s * y).sum(axis=1) / np.where(ok, (y * y).sum(axis=1), 1.0), scale)
    out *= scale[:, None]
    for s, y, r, a in zip(shifts, turns, inverse, parts[::-1], strict=True):
        b = r * (y * out).sum(axis=1)
        out += (a - b)[:, None] * s
    return out


def _search(
    value_and_grad: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    value: np.ndarray,
    grad: np.ndarray,
    step: np.ndarray,
    slope: np.ndarray,
    rising: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points higher up along the steps, where there are any within `_TRIALS` halvings."""
    x, value, grad = x.copy(), value.copy(), grad.copy()
    origin, before = x.copy(), value.copy()
    size = np.ones(len(x))
    open_ = rising.copy()
    for _ in range(_TRIALS):
        rows = np.flatnonzero(open_)
        if not rows.size:
            break
        trial = origin[rows] + size[rows, None] * step[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            found, slopes = value_and_grad(trial)
        finite = np.isfinite(found) & np.isfinite(slopes).all(axis=1)
        good = finite & (found >= before[rows] + _ARMIJO * size[rows] * slope[rows])
        taken = rows[good]
        x[taken], value[taken], grad[taken] = trial[good], found[good], slopes[good]
        open_[taken] = False
        # The maximum of the parabola through value, slope and trial, kept within bounds.
        fall = before[rows] + size[rows] * slope[rows] - np.where(finite, found, np.nan)
        ratio = size[rows] * slope[rows] / np.where(fall > 0, 2 * fall, np.nan)
        ratio = np.where(np.isfinite(ratio), np.clip(ratio, 0.1, 0.5), 0.1)
        size[rows] *= ratio
    return x, value, grad, rising & ~open_
