"""Triangular systems by sweeps: fixed points and roots whose Jacobian is triangular."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_batching.custom_vmap
def _anywhere(flag: Array) -> Array:
    """Under vmap: whether the flag is set for any member, so that a loop has one condition.

    With one for each member, vmap would keep those that are done as they are, by a selection among all
    that the loop carries in every sweep. Further sweeps do them no harm.
    """
    return flag


@_anywhere.def_vmap
def _(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return _anywhere(jnp.any(flag)), False


def _sweep(
    update: Callable[[Array], Array], start: Array, tolerance: float | None
) -> tuple[Array, Array]:
    """The fixed point and the number of sweeps made."""
    least = 100 * jnp.finfo(start.dtype).eps if tolerance is None else tolerance

    def unfinished(carry):
        count, value, change, before = carry
        # Sweeps of a nilpotent map converge ever faster, so the next change is below this one.
        next_change = jnp.where(before < jnp.inf, change * jnp.minimum(1, change / before), change)
        size = jnp.max(jnp.abs(value), initial=0)
        return _anywhere((count < start.size) & ~(next_change <= least * size))

    def sweep(carry):
        count, value, change, _ = carry
        new = update(value)
        return count + 1, new, jnp.max(jnp.abs(new - value), initial=0), change

    unknown = jnp.full_like(start, jnp.inf, shape=())
    carry = (jnp.zeros_like(start, dtype=int, shape=()), start, unknown, unknown)
    count, value, _, _ = jax.lax.while_loop(unfinished, sweep, carry)
    return value, count


def _nilpotent_solve(nilpotent: Callable[[Array], Array], b: Array) -> Array:
    """`v + nilpotent(v) = b` for a linear map, differentiable in all it closes over."""

    def solve(_, b):
        return _sweep(lambda v: b - nilpotent(v), b, None)[0]

    def transpose_solve(_, b):
        transposed = jax.linear_transpose(nilpotent, b)
        return _sweep(lambda v: b - transposed(v)[0], b, None)[0]

    return jax.lax.custom_linear_solve(
        lambda v: v + nilpotent(v), b, solve, transpose_solve=transpose_solve
    )


def triangular_fixed_point(
    update: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    start: Float[Array, " d"],
    *,
    tolerance: float | None = None,
) -> Float[Array, " d"]:
    r"""The fixed point $v = U(v)$ of a map whose Jacobian is strictly triangular.

    In some order of the coordinates the i-th output of $U$ depends on those before it only, so that
    repeated application (Jacobi sweeps) is exact after d sweeps from any start, rounding included:
    each coordinate is computed afresh from final ones. Sweeps stop early once the next change,
    foretold from the last two, is below `tolerance` relative to the largest entry. Derivatives of any
    order in everything that `update` closes over are implicit: linear systems of the same kind.

    Cost: one call of `update` a sweep, at most d; under vmap as many as the slowest member needs.

    Args:
        update: $U$, of a vector and with values of its shape and dtype.
        start: a first guess.
        tolerance: relative error at which sweeps stop; 100 machine epsilons by default (1.2e-5 in
            float32, 2.2e-14 in float64), 0 for all d sweeps.

    Returns:
        The fixed point, shape of `start`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import triangular_fixed_point
        >>> shift = lambda v: jnp.concatenate([jnp.ones(1), 2 * v[:-1]])
        >>> print(triangular_fixed_point(shift, jnp.zeros(4)))
        [1. 2. 4. 8.]
    """
    return jax.lax.custom_root(
        lambda v: v - update(v),
        start,
        lambda _, start: _sweep(update, start, tolerance)[0],
        lambda linear, b: _nilpotent_solve(lambda v: linear(v) - v, b),
    )


def triangular_root(
    forward: Callable[[Float[Array, " d"]], tuple[Float[Array, " d"], Float[Array, " d"]]],
    solve: Callable[[Float[Array, " d"]], tuple[Float[Array, " d"], Float[Array, ""]]],
    y: Float[Array, " d"],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The inverse $x = T^{-1}(y)$ of a triangular map, found by `solve`, with implicit derivatives.

    $$dx = J^{-1}\,(dy - \partial_\theta T\,d\theta), \qquad
      dl = \partial_x l\,dx + \partial_\theta l\,d\theta, \qquad l = \sum_i\log\partial_i T_i$$

    at the solution: nothing is differentiated through `solve`, and a gradient costs one pass of
    `forward` and a triangular solve by sweeps (each one product with $J$ or its transpose). Values
    cost what `solve` costs.

    Args:
        forward: $x \mapsto (T(x), \log\partial_i T_i(x))$, with a Jacobian that is triangular in some
            order of the coordinates and has a positive diagonal.
        solve: $y \mapsto (x, l(x))$ at $x = T^{-1}(y)$, without a derivative.
        y: where to invert.

    Returns:
        `(x, log_det)`: x of the shape of y, and $l(x) = \log\det\partial T(x)$, both of its dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from vflow_kernels import triangular_root
        >>> slopes = jnp.array([1.0, 2.0])
        >>> forward = lambda x: (slopes * x, jnp.log(slopes))
        >>> solve = lambda y: (y / slopes, jnp.sum(jnp.log(slopes)))
        >>> x, log_det = triangular_root(forward, solve, jnp.ones(2))
        >>> print(x, jnp.exp(log_det))
        [1.  0.5] 2.0
    """

    def residual(root):
        x, log_det = root
        value, log_slope = forward(x)
        # Scaled to a unit diagonal. The root, and so its derivatives, do not depend on the scale.
        error = (value - y) * jax.lax.stop_gradient(jnp.exp(-log_slope))
        return error.astype(y.dtype), log_det - jnp.sum(log_slope).astype(y.dtype)

    def tangent_solve(linear, b):
        b_x, b_log_det = b
        zero = jnp.zeros_like(b_log_det)
        x = _nilpotent_solve(lambda v: linear((v, zero))[0] - v, b_x)
        return x, b_log_det - linear((x, zero))[1]

    start = (y, jnp.zeros_like(y, shape=()))
    return jax.lax.custom_root(residual, start, lambda _, start: solve(start[0]), tangent_solve)
