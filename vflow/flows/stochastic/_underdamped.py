"""Underdamped Langevin layers: refreshed momentum and leapfrog steps."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.flows.stochastic._transition import (
    AbstractTransition,
    LogDensity,
    check_steps,
    log_of,
    noise,
    square,
)


class UnderdampedLangevin(AbstractTransition):
    r"""Unadjusted underdamped Langevin steps: part of the momentum is renewed, then one leapfrog step.

    $$\tilde m = a\,m + \sqrt{1-a^2}\,\varepsilon,\quad a = e^{-\gamma h}; \qquad
    (x, m) \leftarrow \mathrm{leapfrog}_h(x, \tilde m)$$

    The momentum is drawn from N(0, I) where the layer begins and dropped where it ends. Leapfrog
    steps preserve volume and refreshment is reversible, so that $\Delta S$ is the change of
    $\|m\|^2/2$ over the leapfrog steps, with the other sign. Its gradient along the draw is
    unbiased; it takes second derivatives of the target. One gradient of the target per step.

    Args:
        num_steps: number of steps.
        step_size: h, at the start; trained (as its logarithm).
        friction: $\gamma$, at the start; trained (as its logarithm).

    Raises:
        ValueError: an argument that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.flows.stochastic.UnderdampedLangevin(num_steps=5, step_size=0.1)
        >>> y, dS = layer.forward(jax.random.key(0), jnp.zeros(2), lambda x: -jnp.sum(x**2))
        >>> print(y.shape, dS.shape)
        (2,) ()

    Source:
        Thin, Kotelevskii, Doucet, Durmus, Moulines & Panov 2021, Monte Carlo Variational
        Auto-Encoders (arXiv 2106.15921); Zhang et al. 2021, Differentiable Annealed Importance
        Sampling (arXiv 2107.10211).
    """

    log_step: Array
    log_friction: Array
    num_steps: int = eqx.field(static=True)
    reparameterised: ClassVar[bool] = True
    tempered: ClassVar[bool] = True

    def __init__(self, *, num_steps: int, step_size: float, friction: float = 2.0):
        owner = "UnderdampedLangevin"
        check_steps(owner, num_steps=num_steps)
        self.num_steps, self.log_step = num_steps, log_of(owner, "step_size", step_size)
        self.log_friction = log_of(owner, "friction", friction)

    def forward(self, key: PRNGKeyArray, x: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(y, dS)`: shapes of `x` and `()`."""
        return self.forward_along(noise(key, self.num_steps + 1, x), x, log_density)[:2]

    def reverse(self, key: PRNGKeyArray, y: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(x, dS)` of the reversed step: leapfrog steps undone, then the momentum renewed."""
        return self.reverse_along(noise(key, self.num_steps + 1, y), y, log_density)[:2]

    def _constants(self, x: Array) -> tuple[Array, Array, Array]:
        h = jnp.exp(self.log_step).astype(x.dtype)
        decay = h * jnp.exp(self.log_friction).astype(x.dtype)
        return h, jnp.exp(-decay), jnp.sqrt(-jnp.expm1(-2 * decay))

    def forward_along(
        self, noise: Array, x: Array, log_density: LogDensity
    ) -> tuple[Array, Array, Array]:
        """`(y, dS, noise of the reversed path)` for given noise, the first momentum in front."""
        slope = jax.grad(log_density)
        h, keep, renew = self._constants(x)

        def move(carry, eps):
            x, g, m, total = carry
            fresh = keep * m + renew * eps
            x, after, g = leapfrog(x, fresh, g, h, slope)
            back = (m - keep * fresh) / renew
            return (x, g, after, total + 0.5 * (square(fresh) - square(after))), back

        start = (x, slope(x), noise[0], jnp.zeros_like(x, shape=()))
        (y, _, m, total), back = jax.lax.scan(move, start, noise[1:])
        return y, total, jnp.concatenate([m[None], back[::-1]])

    def reverse_along(
        self, noise: Array, y: Array, log_density: LogDensity
    ) -> tuple[Array, Array, Array]:
        """`(x, dS, noise of the forward path)` for given noise, the last momentum in front."""
        slope = jax.grad(log_density)
        h, keep, renew = self._constants(y)

        def move(carry, eps):
            y, g, m, total = carry
            x, flipped, g = leapfrog(y, -m, g, h, slope)
            before = -flipped
            total = total + 0.5 * (square(m) - square(before))
            earlier = keep * before + renew * eps
            return (x, g, earlier, total), (before - keep * earlier) / renew

        start = (y, slope(y), noise[0], jnp.zeros_like(y, shape=()))
        (x, _, m, total), back = jax.lax.scan(move, start, noise[1:])
        return x, total, jnp.concatenate([m[None], back[::-1]])


def leapfrog(
    x: Array, m: Array, g: Array, h: Array, slope: Callable[[Array], Array]
) -> tuple[Array, Array, Array]:
    """One step of size h: `(x, m, slope(x))` after it, of those before it."""
    m = m + 0.5 * h * g
    x = x + h * m
    g = slope(x)
    return x, m + 0.5 * h * g, g
