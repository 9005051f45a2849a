"""How steeply a log density falls far out: along axes, or with the other coordinates integrated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from vflow._core._compile import jit_once

_RADII = 10.0 ** np.arange(2, 6.5, 0.5)  # in standard deviations; two decades at the end are used
_STEPS = 60


def _ascend(log_density: Callable[[Array], Array], x: Array, free: Array) -> Array:
    """Newton ascent over the coordinates where `free` is one, with |eigenvalues| for curvature."""
    fractions = jnp.append(0.5 ** jnp.arange(0.0, 24.0), 0.0)

    def step(state):
        count, x, _ = state
        slope, curvature = _derivatives(log_density, x, free)
        values, vectors = jnp.linalg.eigh(curvature)
        size = jnp.maximum(jnp.abs(values), 1e-300 + 1e-14 * jnp.max(jnp.abs(values)))
        direction = vectors @ ((vectors.T @ slope) / size) * free
        points = jax.vmap(lambda fraction: x + fraction * direction)(fractions)
        heights = jax.vmap(log_density)(points)
        best = jnp.argmax(jnp.where(jnp.isnan(heights), -jnp.inf, heights))
        gain = heights[best] - heights[-1]
        rising = ~(gain <= 1e-12 * (1 + jnp.abs(heights[-1])))
        return count + 1, points[best], rising

    def more(state):
        return state[2] & (state[0] < _STEPS)

    return jax.lax.while_loop(more, step, (0, x, jnp.array(True)))[1]


def _derivatives(
    log_density: Callable[[Array], Array], x: Array, free: Array
) -> tuple[Array, Array]:
    """Gradient and minus the Hessian over the free coordinates; the unit matrix on the others."""
    slope = jax.grad(log_density)
    hessian, gradient = jax.jacfwd(lambda x: (slope(x),) * 2, has_aux=True)(x)
    curvature = -jnp.nan_to_num(hessian) * jnp.outer(free, free)
    return jnp.nan_to_num(gradient) * free, curvature + jnp.diag(1 - free)


def _laplace(log_density: Callable[[Array], Array], dim: int) -> tuple[Array, Array]:
    """The mode and a square root of the covariance of the Gaussian there."""
    free = jnp.ones((dim,))

    @jit_once
    def climb(x):
        mode = _ascend(log_density, x, free)
        values, vectors = jnp.linalg.eigh(_derivatives(log_density, mode, free)[1])
        return mode, log_density(mode), values, vectors

    mode, height, values, vectors = climb(jnp.zeros((dim,)))
    if not bool(jnp.isfinite(height) & jnp.all(values > 0)):
        raise ValueError(
            "tails: no mode of the target was found from zero; pass draws of a fit instead."
        )
    return mode, vectors @ jnp.diag(1 / jnp.sqrt(values))


def _mode(log_density: Callable[[Array], Array], dim: int) -> tuple[Array, Array]:
    """The mode and the marginal standard deviations of the Gaussian there."""
    mode, root = _laplace(log_density, dim)
    return mode, jnp.linalg.norm(root, axis=1)


def gaussian_at_mode(log_density: Callable[[Array], Array], dim: int) -> tuple[NDArray, NDArray]:
    """Location and lower Cholesky factor of the Gaussian at the mode, shapes (dim,), (dim, dim)."""
    mode, root = map(np.asarray, _laplace(log_density, dim))
    upper = np.linalg.qr(root.T)[1]
    return mode, (upper * np.where(np.diag(upper) < 0, -1.0, 1.0)[:, None]).T


def _slopes(log_height: NDArray) -> NDArray:
    """Minus the slopes over the last two decades but one and the last, from a curve over radii."""
    decade = np.log(10.0)
    height = np.where(np.isfinite(log_height), log_height, -1e300)
    before = (height[..., -5] - height[..., -3]) / decade
    last = (height[..., -3] - height[..., -1]) / decade
    return np.stack([before, last], axis=-1)


def _both_sides(curve: Callable[[Array, float], Array], dim: int) -> NDArray:
    """The slopes of `curve(i, sign)` for every coordinate and both sides."""
    run = jit_once(
        lambda: jax.lax.map(lambda i: jnp.stack([curve(i, -1.0), curve(i, 1.0)]), jnp.arange(dim))
    )
    return _slopes(np.asarray(run()))


def slice_slopes(log_density: Callable[[Array], Array], dim: int) -> NDArray:
    r"""$-d\log p/d\log r$ along both directions of every axis through the mode.

    Returns:
        Shape (dim, 2, 2): coordinate, side (below, above), decade (last but one, last).
    """
    mode, scale = _mode(log_density, dim)
    radii = jnp.asarray(_RADII)

    def curve(i, sign):
        move = sign * scale[i] * jax.nn.one_hot(i, dim)
        return jax.lax.map(lambda r: log_density(mode + r * move), radii)

    return _both_sides(curve, dim)


def integrated_slopes(log_density: Callable[[Array], Array], dim: int) -> NDArray:
    r"""The same for $\log p_i(r) \approx \max_{x_{-i}} \log p - \tfrac12\log\det(-\nabla^2_{-i}\log p)$.

    The maximum is followed outwards from radius to radius, started in proportion to the last one.

    Returns:
        Shape (dim, 2, 2): coordinate, side (below, above), decade (last but one, last).
    """
    mode, scale = _mode(log_density, dim)
    growth = jnp.asarray(np.diff(np.log(_RADII), prepend=np.log(_RADII[0])))

    def curve(i, sign):
        free = 1 - jax.nn.one_hot(i, dim)

        def at(offset, inputs):
            radius, grow = inputs
            start = jnp.where(free > 0, offset * jnp.exp(grow), sign * radius * scale[i])
            x = _ascend(log_density, mode + start, free)
            values = jnp.linalg.eigvalsh(_derivatives(log_density, x, free)[1])
            height = log_density(x) - 0.5 * jnp.sum(jnp.log(jnp.where(values > 0, values, jnp.nan)))
            return x - mode, height

        return jax.lax.scan(at, jnp.zeros((dim,)), (jnp.asarray(_RADII), growth))[1]

    return _both_sides(curve, dim)
