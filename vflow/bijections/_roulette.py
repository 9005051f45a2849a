"""The Russian-roulette estimate of a log-determinant."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@jax.custom_jvp
def _one(x: Array) -> Array:
    """One, whose derivative is refused."""
    return jnp.ones_like(x)


@_one.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "a second derivative of an estimated log-determinant would be biased: use the exact one."
    )


@jax.custom_jvp
def _with_slope(value: Array, slope: Array) -> Array:
    """`value`, with the first derivative of `slope`."""
    return value


@_with_slope.defjvp
def _slope_rule(primals, tangents):
    value, slope = primals
    return value, _one(slope) * tangents[1]


def roulette_log_det(
    key: PRNGKeyArray,
    contraction: Callable[[Array], Array],
    frozen: Callable[[Array], Array],
    x: Float[Array, " d"],
    lipschitz: float,
) -> Float[Array, ""]:
    r"""An unbiased estimate of $\log\det(I + A)$, $A = \partial g(x)$, and of its first derivative.

    $$\sum_{k=1}^{N} \frac{(-1)^{k+1}}{k\,P(N \ge k)}\, v^\top A^k v, \qquad
      P(N \ge k) = c^{k-1}, \qquad v_i = \pm 1$$

    with derivative $w^\top (\partial A)\, v$, $w = v + \sum_{k \le N} (-1)^k (A^\top)^k v / P(N \ge k)$: the
    Neumann series, of which nothing is stored. With $\|A\| \le c$ the k-th term is at most
    $c\,|v|^2/k$ in size, so the value has variance, and the derivative too.

    Cost: N products with $A^\top$, $1/(1-c)$ on average (the largest of a batch under vmap), and one
    with $A$.
    """
    survive_key, probe_key = jax.random.split(key)
    probe = jax.random.rademacher(probe_key, x.shape, x.dtype)
    uniform = jax.random.uniform(survive_key, (), x.dtype, jnp.finfo(x.dtype).tiny)
    length = 1 + jnp.floor(jnp.log(uniform) / jnp.log(lipschitz))
    _, pull = jax.vjp(frozen, jax.lax.stop_gradient(x))

    def unfinished(carry):
        return carry[0] <= length

    def step(carry):
        k, power, value, solution = carry  # power: (-A^T / c)^(k-1) v
        (power,) = pull(-power / lipschitz)
        power = power.astype(probe.dtype)
        # (-A^T)^k v / P(N >= k) = c power
        value = value - lipschitz * jnp.vdot(power, probe) / k
        return k + 1, power, value, solution + lipschitz * power

    start = (jnp.ones_like(length), probe, jnp.zeros_like(length), probe)
    _, _, value, solution = jax.lax.while_loop(unfinished, step, start)
    value, solution = jax.lax.stop_gradient((value, solution))
    _, push = jax.jvp(contraction, (x,), (probe,))
    return _with_slope(value, jnp.vdot(solution, push).astype(value.dtype))
