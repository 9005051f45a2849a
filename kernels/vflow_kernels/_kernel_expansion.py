"""Radial kernels with exact derivatives at distance zero, and expansions in them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Beyond this squared distance every kernel here is zero in float64 too; the bound keeps 0 * inf out.
_FAR = 1e8


@jax.custom_jvp
def _matern12(q: Array) -> Array:
    return jnp.exp(-jnp.sqrt(q))


@_matern12.defjvp
def _(primals, tangents):
    (q,), (tangent,) = primals, tangents
    # The slope is infinite at zero; 0 there makes the gradient in the points 0, the mean of both sides.
    r = jnp.sqrt(jnp.where(q > 0, q, 1))
    return _matern12(q), jnp.where(q > 0, -0.5 * jnp.exp(-r) / r, 0) * tangent


@jax.custom_jvp
def _matern32(q: Array) -> Array:
    r = jnp.sqrt(3 * q)
    return (1 + r) * jnp.exp(-r)


@_matern32.defjvp
def _(primals, tangents):
    (q,), (tangent,) = primals, tangents
    return _matern32(q), -1.5 * _matern12(3 * q) * tangent


@jax.custom_jvp
def _matern52(q: Array) -> Array:
    r = jnp.sqrt(5 * q)
    return (1 + r + r**2 / 3) * jnp.exp(-r)


@_matern52.defjvp
def _(primals, tangents):
    (q,), (tangent,) = primals, tangents
    return _matern52(q), -5 / 6 * _matern32(5 / 3 * q) * tangent


_KERNELS = {
    "rbf": lambda q: jnp.exp(-0.5 * q),
    "matern12": _matern12,
    "matern32": _matern32,
    "matern52": _matern52,
}


def radial_kernel(squared_distance: Float[Array, "*s"], kernel: str = "rbf") -> Float[Array, "*s"]:
    r"""A radial kernel $\kappa$ of the squared distance $q = r^2$, with $\kappa(0) = 1$.

    $$\text{rbf: } e^{-q/2}, \quad \text{matern12: } e^{-r}, \quad
      \text{matern32: } (1 + \sqrt3 r)\,e^{-\sqrt3 r}, \quad
      \text{matern52: } (1 + \sqrt5 r + \tfrac53 r^2)\,e^{-\sqrt5 r}$$

    Matern kernels are not smooth functions of $q$ at 0, where the derivative of the square root is
    infinite. Their derivatives are therefore given by the identities
    $\kappa_{5/2}'(q) = -\tfrac56 \kappa_{3/2}(\tfrac53 q)$ and
    $\kappa_{3/2}'(q) = -\tfrac32 \kappa_{1/2}(3q)$, exact at 0 too: as functions of the points, "matern32"
    and "matern52" have the right gradient and Hessian at distance zero. "matern12" has a kink there; its
    gradient is taken as 0.

    Cost: one exp and at most one square root per element.

    Args:
        squared_distance: $q \ge 0$, any shape.
        kernel: "rbf", "matern12", "matern32" or "matern52".

    Returns:
        $\kappa(q)$ in [0, 1], shape of `squared_distance`.

    Raises:
        ValueError: an unknown kernel.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from vflow_kernels import radial_kernel
        >>> hessian = jax.hessian(lambda x: radial_kernel(x**2, "matern32"))(jnp.zeros(()))
        >>> print(radial_kernel(jnp.zeros(2), "matern32"), hessian)
        [1. 1.] -3.0

    Source:
        Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, equations 4.9 and 4.17.
    """
    if kernel not in _KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}, got {kernel!r}.")
    return _KERNELS[kernel](jnp.minimum(squared_distance, _FAR))


def kernel_expansion(
    point: Float[Array, " d"],
    centres: Float[Array, "n d"],
    log_lengthscale: Float[Array, " d"],
    coefficients: Float[Array, "n m"],
    kernel: str = "rbf",
) -> Float[Array, " m"]:
    r"""A sum of kernels around centres, $\sum_i \kappa(\|(u - w_i)/\ell\|^2)\,A_i$.

    The distances are sums of squared differences; expanded into scalar products they would lose half
    of the digits near the centres, and turn negative.

    Cost: `n (3 d + 2 m)` flops and n kernels; memory n d, which XLA fuses away.

    Args:
        point: $u$.
        centres: $w$, one a row.
        log_lengthscale: $\log\ell$, one for each coordinate of the point.
        coefficients: $A$, one row for each centre.
        kernel: as for `radial_kernel`.

    Returns:
        The m sums.

    Raises:
        ValueError: an unknown kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import kernel_expansion
        >>> one = jnp.ones((1, 1))
        >>> print(f"{kernel_expansion(jnp.zeros(1), one, jnp.zeros(1), one)[0]:.4f}")  # exp(-1/2)
        0.6065

    Source:
        English, Kirchler & Lippert 2024 (arXiv 2307.14839), the kernel expansion of a layer.
    """
    difference = (point[None] - centres) * jnp.exp(-log_lengthscale)[None]
    return radial_kernel(jnp.sum(difference**2, axis=-1), kernel) @ coefficients


def median_lengthscale(points: Float[Array, "n d"]) -> Float[Array, " d"]:
    r"""The median heuristic for the lengthscales of a kernel.

    $$\ell_j = \sigma_j \sqrt{\tfrac12 \operatorname{median}_{a<b} \|(w_a - w_b)/\sigma\|^2}$$

    $\sigma_j$ is the standard deviation of coordinate j (1 where it is zero), so that coordinates
    in different units count alike. Pairs at distance zero are left out, and the median is the lower
    one, a distance that occurs.

    Cost: `3 n^2 d` flops, memory n^2, one sort.

    Args:
        points: $w$, at least two, one a row.

    Returns:
        One positive lengthscale a coordinate.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import median_lengthscale
        >>> print(jnp.round(median_lengthscale(jnp.array([[0.0, 0.0], [1.0, 10.0]])), 4))
        [ 1. 10.]

    Source:
        Garreau, Jitkrittum & Kanagawa 2018 (arXiv 1707.07269), the median heuristic.
    """
    spread = jnp.where(jnp.ptp(points, axis=0) > 0, jnp.std(points, axis=0), 1)
    scaled = points / spread[None]
    squared = jnp.sum((scaled[:, None] - scaled[None]) ** 2, axis=-1)
    # Not `squared > 0`: a fused multiply and add may leave the rounding of a product.
    apart = jnp.any(points[:, None] != points[None], axis=-1)
    count = jnp.sum(apart)  # each pair twice
    ordered = jnp.sort(jnp.where(apart, squared, jnp.inf), axis=None)
    return spread * jnp.sqrt(0.5 * jnp.where(count > 0, ordered[count // 2 - 1], 2))
