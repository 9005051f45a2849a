"""The root of a strictly increasing scalar function, with implicit derivatives."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

_MAX_STEPS = 200
_MAX_DOUBLINGS = 60


def monotone_root(
    f: Callable[[Array, Any], Array],
    args: Any,
    y: Float[Array, "*s"],
    lower: ArrayLike | None = None,
    upper: ArrayLike | None = None,
    start: ArrayLike | None = None,
) -> Float[Array, "*s"]:
    r"""The solution $x$ of $f(x, \theta) = y$ for a function strictly increasing in $x$.

    Newton steps inside a bracket that shrinks with every evaluation; a step that leaves the bracket
    or does not halve the one before gives way to bisection. The result is as exact as $f$ is. Its
    derivatives, of any order and in both modes, come from the implicit function theorem,

    $$\dot x = \frac{\dot y - \partial_\theta f\,\dot\theta}{\partial_x f},$$

    one more evaluation of $f$ and its derivative, however many steps the solution took. `lower`,
    `upper` and `start` have no influence on the result and get no derivative.

    Cost: typically 5 to 10 evaluations of $f$ and $\partial_x f$; up to about 70 where $f$ bends so
    sharply that only bisection helps. Under `jax.vmap` all take as many as the slowest.

    Args:
        f: `f(x, args)`, elementwise in x, for example of one scalar; finite wherever it is asked.
            It must not close over traced arrays: pass them in `args`.
        args: $\theta$, any pytree of arrays; derivatives reach all its floating-point leaves.
        y: right-hand side, any shape.
        lower: a point below the root, broadcast against y. None: found by doubling steps down from
            `start`, up to $2^{60}$ of its size.
        upper: a point above the root, likewise.
        start: first guess; by default the middle of the bracket, or y where an end is unknown.

    Returns:
        The root, shape and dtype of `y`; where the bracket does not hold it, the nearest end; NaN
        where f or y is NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from vflow_kernels import monotone_root
        >>> cube = lambda x, scale: scale * x**3 + x
        >>> root = lambda y: monotone_root(cube, jnp.asarray(1.0), y)
        >>> print(root(jnp.asarray(10.0)), f"{jax.grad(root)(jnp.asarray(10.0)):.4f}")
        2.0 0.0769
    """
    ends = [None if a is None else jnp.asarray(a, y.dtype) for a in (lower, upper, start)]
    ends = [None if a is None else jnp.broadcast_to(a, y.shape) for a in ends]
    return _root(f, args, y, *ends)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _root(
    f: Callable, args: Any, y: Array, lower: Array | None, upper: Array | None, start: Array | None
) -> Array:
    if start is None:
        start = y if lower is None or upper is None else 0.5 * (lower + upper)
    if lower is None:
        lower = _end(lambda x: f(x, args) > y, start, -1)
    if upper is None:
        upper = _end(lambda x: f(x, args) < y, start, 1)
    return _solve(f, args, y, lower, upper, jnp.clip(start, lower, upper))


@_root.defjvp
def _root_jvp(f: Callable, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    args = primals[0]
    x = _root(f, *primals)
    _, slope = jax.jvp(lambda x: f(x, args), (x,), (jnp.ones_like(x),))
    _, moved = jax.jvp(lambda args: f(x, args), (args,), (tangents[0],))
    return x, (tangents[1] - moved) / slope


def _end(beyond: Callable[[Array], Array], start: Array, sign: int) -> Array:
    """The first of start + sign * size * (1, 3, 7, ...) that the root is not beyond."""

    def step(state):
        count, x, size = state
        return count + 1, jnp.where(beyond(x), x + sign * size, x), 2 * size

    def more(state):
        return jnp.any(beyond(state[1])) & (state[0] < _MAX_DOUBLINGS)

    size = jnp.maximum(jnp.abs(start), 1)
    return jax.lax.while_loop(more, step, (0, start + sign * size, 2 * size))[1]


def _solve(f: Callable, args: Any, y: Array, lower: Array, upper: Array, start: Array) -> Array:
    eps = jnp.finfo(y.dtype).eps

    def step(state):
        count, x, lower, upper, last, done = state
        value, slope = jax.jvp(lambda x: f(x, args), (x,), (jnp.ones_like(x),))
        rest = value - y
        lower = jnp.where(rest < 0, x, lower)
        upper = jnp.where(rest > 0, x, upper)
        newton = -rest / slope
        inside = (x + newton >= lower) & (x + newton <= upper)
        good = inside & (jnp.abs(newton) <= 0.5 * jnp.abs(last))
        move = jnp.where(good, newton, 0.5 * (lower + upper) - x)
        # The error left by a Newton step is of the order of its square: a step this short is the
        # last. A closed bracket ends the search where rounding errors of f hide the root.
        size = jnp.abs(x)
        short = good & (jnp.abs(newton) <= eps**0.75 * size + eps)
        closed = upper - lower <= 2 * eps * size + eps
        end = (rest == 0) | short | closed | jnp.isnan(rest)
        move = jnp.where(jnp.isnan(rest), jnp.nan, jnp.where(rest == 0, 0, move))
        x = jnp.where(done, x, x + move)
        return count + 1, x, lower, upper, jnp.where(done, last, move), done | end

    def more(state):
        return jnp.any(~state[-1]) & (state[0] < _MAX_STEPS)

    state = (0, start, lower, upper, 2 * (upper - lower) + 1, jnp.zeros_like(y, bool))
    return jax.lax.while_loop(more, step, state)[1]
