"""The monotone rational-quadratic spline, with identity tails."""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow_kernels._filled import filled

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
    return raw[:num_bins], raw[num_bins : 2 * num_bins], raw[2 * num_bins :]


def _bin_map(theta: Array, s: Array, d0: Array, d1: Array) -> tuple[Array, Array]:
    """The rise as a fraction of the bin's height, and the log-derivative."""
    product = theta * (1 - theta)
    down = 1 / (s + (d0 + d1 - 2 * s) * product)
    rise = (s * theta**2 + d0 * product) * down
    curve = d1 * theta**2 + 2 * s * product + d0 * (1 - theta) ** 2
    return rise, jnp.log((s * down) ** 2 * curve)


def _search(z: Array, along: Array, across: Array, slopes: Array, bound: float):
    """The bin of z along one axis: sums of unnormalised softmax weights below it and in it.

    Slices and comparisons only, which XLA fuses into one loop; a search or a gather for every
    element, or reductions over the short axis of bins, take two to three times as long on a CPU.
    """
    num_bins = along.shape[0]
    tops = [jax.lax.stop_gradient(jnp.max(a, 0)) for a in (along, across)]
    first, second = jnp.exp(along - tops[0][None]), jnp.exp(across - tops[1][None])
    totals = sum(first[1:], first[0]), sum(second[1:], second[0])
    free = 2 * bound * (1 - _MIN_BIN * num_bins)
    floor = 2 * bound * _MIN_BIN / free * totals[0]
    reached = (z + bound) / free * totals[0]
    zero = filled(z, 0.0)
    index, knot, below, other_below = zero, zero, zero, zero
    weight, other_weight, low, high = first[0], second[0], zero, slopes[0]
    for k in range(1, num_bins):
        knot = knot + first[k - 1]
        right = reached >= knot + k * floor
        index = index + right.astype(z.dtype)
        below = below + right * first[k - 1]
        other_below = other_below + right * second[k - 1]
        weight = jnp.where(right, first[k], weight)
        other_weight = jnp.where(right, second[k], other_weight)
        low = jnp.where(right, slopes[k - 1], low)
        high = jnp.where(right, slopes[k] if k < num_bins - 1 else zero, high)
    shares = (below / totals[0], weight / totals[0])
    other_shares = (other_below / totals[1], other_weight / totals[1])
    return index, tops, totals, (*shares, *other_shares), (low + _SHIFT, high + _SHIFT)


def _outputs(index: Array, shares: tuple, raw_slopes: tuple, bound: float, num_bins: int) -> tuple:
    floor = 2 * bound * _MIN_BIN
    free = 2 * bound - floor * num_bins
    starts = [free * share + index * floor - bound for share in shares[::2]]
    sizes = [free * share + floor for share in shares[1::2]]
    # softplus, without its array of zeros: see `filled`
    ends = [jnp.maximum(r, 0) + jnp.log1p(jnp.exp(-jnp.abs(r))) + _MIN_SLOPE for r in raw_slopes]
    return starts[0], sizes[0], starts[1], sizes[1], *ends


@ft.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _bin(z: Array, along: Array, across: Array, slopes: Array, bound: float) -> tuple[Array, ...]:
    """Start and size of z's bin along the one axis and the other, and the slopes at its ends."""
    index, _, _, shares, raw_slopes = _search(z, along, across, slopes, bound)
    return _outputs(index, shares, raw_slopes, bound, along.shape[0])


@_bin.defjvp
def _bin_jvp(bound: float, primals: tuple, tangents: tuple) -> tuple:
    # The bin does not depend on z but through its number. Each tangent is a masked sum over the
    # bins, whose transpose is one elementwise pass. Where the sums are divided, XLA stops fusing:
    # otherwise it would compute everything that leads to a cotangent again for every bin.
    z, along, across, slopes = primals
    num_bins = along.shape[0]
    index, tops, totals, shares, raw_slopes = _search(z, along, across, slopes, bound)
    out = _outputs(index, shares, raw_slopes, bound, num_bins)
    number = jnp.arange(num_bins, dtype=z.dtype).reshape((-1,) + (1,) * z.ndim)
    place = (index * totals[0] / totals[0])[None]
    before, here = number < place - 0.5, jnp.abs(number - place) < 0.5
    free = 2 * bound * (1 - _MIN_BIN * num_bins)

    def total(mask, values):
        return jnp.sum(mask * values, 0)

    moved = []
    for i, raw in enumerate((along, across)):
        weighted = tangents[i + 1] * jnp.exp(raw - tops[i][None])
        everywhere = jnp.sum(weighted, 0)
        for mask, share in ((before, shares[2 * i]), (here, shares[2 * i + 1])):
            moved.append((total(mask, weighted) - share * everywhere) / (totals[i] / free))
    for mask, r in ((here[1:], raw_slopes[0]), (here[:-1], raw_slopes[1])):
        moved.append(total(mask, tangents[3]) / (1 + jnp.exp(jnp.minimum(-r, 60))))
    return out, tuple(moved)
