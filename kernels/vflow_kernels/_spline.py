"""The monotone rational-quadratic spline, with identity tails."""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow_kernels._filled import filled, materialised

_MIN_BIN = 1e-3  # least width and height of a bin, as a fraction of the interval
_MIN_SLOPE = 1e-3
# Raw slopes are shifted by this much, so that a raw zero is the slope one.
_SHIFT = math.log(math.expm1(1 - _MIN_SLOPE))


def spline_forward(
    x: Float[Array, "*s"], raw: Float[Array, "p *s"], bound: float
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    r"""A monotone rational-quadratic spline on $[-B, B]$ and the identity outside, elementwise.

    In a bin with corner $(x_0, y_0)$, width $w$, height $h$ and slopes $d_0, d_1$ at its ends, with
    $s = h/w$ and $\theta = (x - x_0)/w$,

    $$y = y_0 + h\,\frac{s\theta^2 + d_0\theta(1-\theta)}{s + (d_0 + d_1 - 2s)\,\theta(1-\theta)}.$$

    The K widths and K heights are softmaxes with a floor of $2B/1000$, the K - 1 inner slopes
    softplus values with a floor of 1/1000, the outer slopes one. Raw zeros give the identity. The
    map is continuously differentiable, at knots and bounds too.

    Cost: 2K exponentials, one logarithm and about 20 K flops per element, one pass over `raw`. The
    derivative of the bin in `raw` has a rule of its own, one exponential per entry and no searches;
    derivatives of every order and mode follow from it.

    Args:
        x: points, any shape.
        raw: K widths, K heights and K - 1 slopes before their constraints, along the first axis.
        bound: $B > 0$.

    Returns:
        `(y, log_derivative)` of the shape of `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import spline_forward
        >>> y, log_derivative = spline_forward(jnp.array([0.5, 7.0]), jnp.zeros((23, 2)), 5.0)
        >>> print(jnp.round(y, 5), jnp.round(jnp.abs(log_derivative), 5))
        [0.5 7. ] [0. 0.]

    Source:
        Durkan, Bekasov, Murray & Papamakarios 2019 (arXiv 1906.04032), equations 4 and 5.
    """
    inside = (x > -bound) & (x < bound)
    safe = jnp.clip(x, -bound, bound)
    widths, heights, slopes = _split(raw)
    left, width, bottom, height, d0, d1 = _bin(safe, widths, heights, slopes, bound)
    theta = (safe - left) / width
    rise, log_derivative = _bin_map(theta, height / width, d0, d1)
    y = bottom + height * rise
    return jnp.where(inside, y, x), log_derivative * inside


def spline_inverse(
    y: Float[Array, "*s"], raw: Float[Array, "p *s"], bound: float
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    r"""The inverse of `spline_forward`, elementwise, by the stable root of a quadratic.

    Cost: that of `spline_forward` and one square root per element.

    Args:
        y: values, any shape.
        raw: as for `spline_forward`.
        bound: $B > 0$.

    Returns:
        `(x, log_derivative)` of the shape of `y`; the second is that of the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import spline_forward, spline_inverse
        >>> raw = jnp.cos(jnp.arange(23.0))[:, None]
        >>> y, _ = spline_forward(jnp.array([0.5]), raw, 5.0)
        >>> print(jnp.round(spline_inverse(y, raw, 5.0)[0], 4))
        [0.5]

    Source:
        Durkan, Bekasov, Murray & Papamakarios 2019 (arXiv 1906.04032), equations 6 to 8.
    """
    inside = (y > -bound) & (y < bound)
    safe = jnp.clip(y, -bound, bound)
    widths, heights, slopes = _split(raw)
    bottom, height, left, width, d0, d1 = _bin(safe, heights, widths, slopes, bound)
    s, rise = height / width, (safe - bottom) / height
    bend = d0 + d1 - 2 * s
    a, b, c = s - d0 + rise * bend, d0 - rise * bend, -s * rise
    root = jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, jnp.finfo(y.dtype).tiny))
    theta = -2 * c / (b + root)
    _, log_derivative = _bin_map(theta, s, d0, d1)
    return jnp.where(inside, left + width * theta, y), -log_derivative * inside


def _split(raw: Array) -> tuple[Array, Array, Array]:
    num_bins = (raw.shape[0] + 1) // 3
    widths, heights, slopes = jax.lax.split(raw, (num_bins, num_bins, num_bins - 1))
    return widths, heights, slopes


def _bin_map(theta: Array, s: Array, d0: Array, d1: Array) -> tuple[Array, Array]:
    """The rise as a fraction of the bin's height, and the log-derivative."""
    product = theta * (1 - theta)
    down = 1 / (s + (d0 + d1 - 2 * s) * product)
    rise = (s * theta**2 + d0 * product) * down
    curve = d1 * theta**2 + 2 * s * product + d0 * (1 - theta) ** 2
    return rise, jnp.log((s * down) ** 2 * curve)


def _search(z: Array, along: Array, across: Array, slopes: Array, bound: float):
    """The bin of z along one axis: its number, softmax weights below it and in it, raw slopes.

    Slices and comparisons only, which XLA fuses into a loop for each output; a search or a gather
    for every element, or reductions over the short axis of bins, take two to three times as long on
    a CPU.
    """
    num_bins = along.shape[0]
    tops = [jax.lax.stop_gradient(jnp.max(a, 0)) for a in (along, across)]
    weights = [jnp.exp(a - top[None]) for a, top in zip((along, across), tops, strict=True)]
    totals = [sum(rows[1:], rows[0]) for rows in weights]
    free = 2 * bound * (1 - _MIN_BIN * num_bins)
    floor = 2 * bound * _MIN_BIN / free * totals[0]
    reached = (z + bound) / free * totals[0]
    knot = weights[0][0]
    number = (reached >= knot + floor).astype(z.dtype)
    for k in range(2, num_bins):
        knot = knot + weights[0][k - 1]
        number = number + (reached >= knot + k * floor)
    # In memory, or the search for it would be repeated for every output.
    number = materialised(number)
    past = [number > k - 0.5 for k in range(1, num_bins)]

    zero = filled(number, 0.0)

    def below(rows):
        total = zero
        for beyond, row in zip(past, rows, strict=False):
            total = total + beyond * row
        return total

    def here(rows):
        found = rows[0]
        for beyond, row in zip(past, rows[1:], strict=True):
            found = jnp.where(beyond, row, found)
        return found

    shares = [
        part(rows) / total
        for rows, total in zip(weights, totals, strict=True)
        for part in (below, here)
    ]
    raw_slopes = [here(rows) + _SHIFT for rows in ([zero, *slopes], [*slopes, zero])]
    return number, weights, totals, shares, raw_slopes


def _outputs(number: Array, shares: list, raw_slopes: list, bound: float, num_bins: int) -> tuple:
    floor = 2 * bound * _MIN_BIN
    free = 2 * bound - floor * num_bins
    starts = [free * share + number * floor - bound for share in shares[::2]]
    sizes = [free * share + floor for share in shares[1::2]]
    # A softplus, without its array of zeros (see `filled`); the least slope makes up for log1p.
    ends = [jnp.maximum(r, 0) + jnp.log(1 + jnp.exp(-jnp.abs(r))) + _MIN_SLOPE for r in raw_slopes]
    return starts[0], sizes[0], starts[1], sizes[1], *ends


@ft.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _bin(z: Array, along: Array, across: Array, slopes: Array, bound: float) -> tuple[Array, ...]:
    """Start and size of z's bin along the one axis and the other, and the slopes at its ends."""
    number, _, _, shares, raw_slopes = _search(z, along, across, slopes, bound)
    return _outputs(number, shares, raw_slopes, bound, along.shape[0])


@_bin.defjvp
def _bin_jvp(bound: float, primals: tuple, tangents: tuple) -> tuple:
    # The bin does not depend on z but through its number.
    z, along, across, slopes = primals
    num_bins = along.shape[0]
    number, weights, totals, shares, raw_slopes = _search(z, along, across, slopes, bound)
    free = 2 * bound * (1 - _MIN_BIN * num_bins)
    per_share = [total / free for total in totals]
    per_slope = [1 + jnp.exp(jnp.minimum(-r, 60)) for r in raw_slopes]
    moved = _moved(number, weights, shares, per_share, per_slope, tangents[1:])
    return _outputs(number, shares, raw_slopes, bound, num_bins), moved


@ft.partial(jax.checkpoint, prevent_cse=False)
def _moved(
    number: Array, weights: list, shares: list, per_share: list, per_slope: list, tangents: tuple
) -> tuple:
    """The tangents of the bin: sums over all bins, masked.

    Their transpose is one elementwise pass. Where the sums are divided, XLA stops fusing: otherwise
    it would compute everything that leads to a cotangent again for every bin. The checkpoint
    keeps the number of the bin for the transpose, not the masks.
    """
    num_bins = tangents[0].shape[0]
    bins = jnp.arange(num_bins, dtype=number.dtype).reshape((-1,) + (1,) * number.ndim)
    before, here = bins < number[None] - 0.5, jnp.abs(bins - number[None]) < 0.5
    moved = []
    for i in range(2):
        weighted = tangents[i] * weights[i]
        everywhere = jnp.sum(weighted, 0)
        for mask, share in ((before, shares[2 * i]), (here, shares[2 * i + 1])):
            moved.append((jnp.sum(mask * weighted, 0) - share * everywhere) / per_share[i])
    for mask, per in zip((here[1:], here[:-1]), per_slope, strict=True):
        moved.append(jnp.sum(mask * tangents[2], 0) / per)
    return tuple(moved)
