"""Small line and dot plots as SVG, without a plotting library."""

import html
import math
from typing import Any

import numpy as np

BLUE, ORANGE, PALE = "#2563a8", "#d97706", "#b9cde4"
_LEFT, _BELOW = 52, 20


class Axes:
    """A plot of fixed size in pixels; what is drawn outside of the limits is cut off.

    Args:
        x: limits of the horizontal axis, numbers.
        y: limits of the vertical axis, numbers.
        width: of the plot proper, in pixels.
        height: likewise.
        flat: without labels of the vertical axis.
        bare: without any labels.
        power: the limits are logarithms to base ten, and labelled so.
    """

    def __init__(
        self,
        x: tuple[Any, Any],
        y: tuple[Any, Any],
        width: int,
        height: int,
        *,
        flat: bool = False,
        bare: bool = False,
        power: bool = False,
    ):
        self.x, self.y = _apart(x), _apart(y)
        self.width, self.height = width, height
        self.flat, self.bare, self.power = flat or bare, bare, power
        self.marks: list[str] = []

    def _at(self, x: Any, y: Any) -> tuple[Any, Any]:
        right = (np.asarray(x) - self.x[0]) / (self.x[1] - self.x[0]) * self.width
        up = (np.asarray(y) - self.y[0]) / (self.y[1] - self.y[0]) * self.height
        limit = 10 * max(self.width, self.height)
        return np.clip(right, -limit, limit), np.clip(self.height - up, -limit, limit)

    def line(self, x: np.ndarray, y: np.ndarray, color: str) -> None:
        """A line through points."""
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*self._at(x, y), strict=True))
        self.marks.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')

    def dots(self, x: np.ndarray, y: np.ndarray, color: str) -> None:
        """A dot at each point but NaN, as one path of round line ends."""
        points = zip(*self._at(x, y), strict=True)
        path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in points if math.isfinite(a + b))
        self.marks.append(
            f'<path d="{path}" stroke="{color}" stroke-width="3" stroke-linecap="round" '
            'stroke-opacity="0.5" fill="none"/>'
        )

    def figure(self, caption: str) -> str:
        """The plot as an HTML figure."""
        left, below = 0 if self.flat else _LEFT, 0 if self.bare else _BELOW
        labels = []
        if not self.bare:
            labels += [
                f'<text x="{self._at(t, 0)[0]:.1f}" y="{self.height + 15}" '
                f'text-anchor="middle">{self._label(t)}</text>'
                for t in ticks(*self.x, 4)
            ]
        if not self.flat:
            labels += [
                f'<text x="-6" y="{self._at(0, t)[1] + 4:.1f}" '
                f'text-anchor="end">{self._label(t)}</text>'
                for t in ticks(*self.y, 4)
            ]
        # An inner svg element cuts off what lies outside of it.
        plot = (
            f'<svg width="{self.width}" height="{self.height}" overflow="hidden" '
            f'style="overflow: hidden">{"".join(self.marks)}</svg>'
        )
        frame = f'<rect width="{self.width}" height="{self.height}" fill="none" stroke="#999"/>'
        text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        return (
            f'<figure><svg width="{self.width + left + 4}" height="{self.height + below + 4}" '
            f'viewBox="{-left - 2} -2 {self.width + left + 4} {self.height + below + 4}" '
            f'font-size="11" fill="#444" role="img" aria-label="{html.escape(caption)}">'
            f"{plot}{frame}{''.join(labels)}</svg>{text}</figure>"
        )

    def _label(self, tick: float) -> str:
        return f"{10**tick:.3g}" if self.power else f"{tick:.6g}"


def _apart(limits: tuple[Any, Any]) -> tuple[float, float]:
    low, high = float(limits[0]), float(limits[1])
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers between two limits."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]
