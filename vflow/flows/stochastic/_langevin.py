"""Overdamped Langevin layers, without and with a learned control."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._mlp import MLP
from vflow.flows._checks import check_widths
from vflow.flows.stochastic._transition import (
    AbstractTransition,
    LogDensity,
    between,
    check_steps,
    log_of,
    noise,
)


class Langevin(AbstractTransition):
    r"""Unadjusted overdamped Langevin steps.

    $$y = x + \eta\,\nabla\log p_\lambda(x) + \sqrt{2\eta}\,\varepsilon$$

    The reversed kernel is the same with x and y exchanged, so that
    $\Delta S = (\|\varepsilon\|^2 - \|\tilde\varepsilon\|^2)/2$ with $\tilde\varepsilon = -\varepsilon -
    \sqrt{\eta/2}\,(\nabla\log p_\lambda(x) + \nabla\log p_\lambda(y))$, summed over the steps. Its
    gradient along the draw is unbiased; it takes second derivatives of the target. One gradient of
    the target per step.

    Args:
        num_steps: number of steps.
        step_size: $\eta$, at the start; trained (as its logarithm).

    Raises:
        ValueError: an argument that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.flows.stochastic.Langevin(num_steps=5, step_size=0.02)
        >>> y, dS = layer.forward(jax.random.key(0), jnp.zeros(2), lambda x: -jnp.sum(x**2))
        >>> print(y.shape, dS.shape)
        (2,) ()

    Source:
        Wu, Koehler & Noe 2020 (arXiv 2002.06707), section 4; Jarzynski 1997 for the weight.
    """

    log_step: Array
    num_steps: int = eqx.field(static=True)
    reparameterised: ClassVar[bool] = True
    tempered: ClassVar[bool] = True

    def __init__(self, *, num_steps: int, step_size: float):
        check_steps("Langevin", num_steps=num_steps)
        self.num_steps, self.log_step = num_steps, log_of("Langevin", "step_size", step_size)

    def forward(self, key: PRNGKeyArray, x: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(y, dS)`: shapes of `x` and `()`."""
        return self.forward_along(noise(key, self.num_steps, x), x, log_density)[:2]

    def reverse(self, key: PRNGKeyArray, y: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(x, dS)` of the reversed step: the same code, for the two kernels are the same."""
        return self.forward(key, y, log_density)

    def forward_along(
        self, noise: Array, x: Array, log_density: LogDensity, *, fixed: bool = False
    ) -> tuple[Array, Array, Array]:
        """`(y, dS, noise of the reversed path)` for given noise; `fixed`: see `_controlled_path`."""
        return _free_path(noise, x, log_density, jnp.exp(self.log_step), fixed=fixed)

    def reverse_along(
        self, noise: Array, y: Array, log_density: LogDensity
    ) -> tuple[Array, Array, Array]:
        """`(x, dS, noise of the forward path)` for given noise."""
        return self.forward_along(noise, y, log_density)


class ControlledLangevin(AbstractTransition):
    r"""Langevin steps with a learned drift, annealed as they go: controlled Monte Carlo diffusion.

    Step k of n moves towards $p_k$, k/n of the way from the temperature of the layer before to that
    of this one, with a network f of position and time:

    $$x_{k+1} = x_k + \eta\,[\nabla\log p_k(x_k) + f_k(x_k)] + \sqrt{2\eta}\,\varepsilon$$

    and the reversed kernel has the mean $y + \eta\,[\nabla\log p_k(y) - f_{k+1}(y)]$. The network
    starts at zero, which is annealed unadjusted Langevin. The gradient along the draw is unbiased.
    Two gradients of the target per step.

    Args:
        num_steps: number of steps.
        step_size: $\eta$, at the start; trained (as its logarithm).
        hidden: widths of the network's hidden layers.
        activation: its activation, as in "silu", "tanh".

    Raises:
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.flows.stochastic.ControlledLangevin(num_steps=16, step_size=0.05)
        >>> snf = vf.flows.stochastic_flow(jax.random.key(0), 2, [layer])
        >>> x = snf.sample(jax.random.key(1), log_density=lambda x: -jnp.sum(x**2))

    Source:
        Vargas, Padhy, Blessing & Nuesken 2024, Transport meets Variational Inference (arXiv
        2307.01050), section 3.
    """

    log_step: Array
    network: MLP | None
    num_steps: int = eqx.field(static=True)
    hidden: tuple[int, ...] = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    reparameterised: ClassVar[bool] = True
    tempered: ClassVar[bool] = True

    def __init__(
        self,
        *,
        num_steps: int,
        step_size: float,
        hidden: tuple[int, ...] = (32, 32),
        activation: str = "silu",
    ):
        check_steps("ControlledLangevin", num_steps=num_steps)
        self.num_steps = num_steps
        self.log_step = log_of("ControlledLangevin", "step_size", step_size)
        self.hidden = check_widths("ControlledLangevin", "hidden", hidden)
        self.activation, self.network = activation, None

    def build(self, key: PRNGKeyArray, dim: int) -> "ControlledLangevin":
        """This layer with a network for `dim` coordinates."""
        network = MLP(key, dim + 1, dim, self.hidden, self.activation)
        return eqx.tree_at(lambda t: t.network, self, network, is_leaf=lambda x: x is None)

    def forward(self, key: PRNGKeyArray, x: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(y, dS)`: shapes of `x` and `()`."""
        return self.forward_along(noise(key, self.num_steps, x), x, log_density)[:2]

    def reverse(self, key: PRNGKeyArray, y: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(x, dS)` of the reversed step, where the control acts with the other sign."""
        return self.reverse_along(noise(key, self.num_steps, y), y, log_density)[:2]

    def forward_along(
        self, noise: Array, x: Array, log_density: LogDensity, *, fixed: bool = False
    ) -> tuple[Array, Array, Array]:
        """`(y, dS, noise of the reversed path)` for given noise; `fixed`: see `_controlled_path`."""
        return self._path(noise, x, log_density, 1, fixed=fixed)

    def reverse_along(
        self, noise: Array, y: Array, log_density: LogDensity
    ) -> tuple[Array, Array, Array]:
        """`(x, dS, noise of the forward path)` for given noise."""
        return self._path(noise, y, log_density, -1, fixed=False)

    def _path(self, noise: Array, x: Array, log_density: LogDensity, sign: int, *, fixed: bool):
        n = self.num_steps

        def control(time: Array, x: Array) -> Array:
            if self.network is None:
                raise ValueError(
                    "ControlledLangevin: its network is made by build(key, dim), which "
                    "vf.flows.stochastic_flow calls."
                )
            share = jnp.asarray(time / n, x.dtype).reshape(1)
            return self.network(jnp.concatenate([x, share]))

        density = lambda k: between(log_density, (k + 1) / n)
        return _controlled_path(
            noise, x, density, control, jnp.exp(self.log_step), sign, fixed=fixed
        )


def _free_path(
    noise: Array,
    x: Array,
    log_density: LogDensity,
    step: Array,
    *,
    fixed: bool,
) -> tuple[Array, Array, Array]:
    """Langevin steps of one density: as `_controlled_path`, without control.

    The loop visits positions, of which there is one more than steps: a visit ends the step before
    and begins the next, so that the slope, which both need, is computed and compiled once.
    """
    length = step.astype(x.dtype)
    width = jnp.sqrt(2 * length)
    stop = jax.lax.stop_gradient if fixed else lambda x: x
    slope = jax.grad(log_density)

    def visit(carry, inputs):
        x, before, eps_before, total = carry
        eps, first, last = inputs
        g = slope(x)
        a = jnp.where(first, 0.0, 0.5 * width * (before + g))
        total = total - jnp.sum(a * eps_before) - 0.5 * jnp.sum(a * a)
        drift = length * g
        y = stop(x + jnp.where(last, 0.0, drift + width * eps))
        if fixed:
            eps = (y - x - drift) / width
        return (y, g, eps, total), -(eps_before + a)

    visits = jnp.arange(len(noise) + 1)
    start = (stop(x), jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x, shape=()))
    inputs = (
        jnp.concatenate([noise, jnp.zeros_like(noise[:1])]),
        visits == 0,
        visits == len(noise),
    )
    (y, _, _, total), back = jax.lax.scan(visit, start, inputs)
    return y, total, back[1:]


def _controlled_path(
    noise: Array,
    x: Array,
    density: Callable[[Any], LogDensity],
    control: Callable[[Array, Array], Array],
    step: Array,
    sign: int,
    *,
    fixed: bool,
) -> tuple[Array, Array, Array]:
    r"""Langevin steps driven by given noise: `(end, dS, noise of the other direction)`.

    With $a = \sqrt{\eta/2}\,(g_k(x) + g_k(y) \pm (f(x) - f(y)))$ the noise of the reversed step is
    $-(\varepsilon + a)$ and $\Delta S = -a\cdot\varepsilon - \|a\|^2/2$: no difference of two large
    squares.

    Args:
        noise: standard normal, (n, *shape), in the order in which it is used.
        x: where to start.
        density: of the number of the step, counted from the base's side.
        control: f of time (0 to n) and position.
        step: eta.
        sign: 1 from base to target, -1 in reverse.
        fixed: whether the positions are constants, the noise a function of parameters: dS is then
            the log ratio of the two path densities at a fixed path.
    """
    n = noise.shape[0]
    length = step.astype(x.dtype)
    width = jnp.sqrt(2 * length)
    stop = jax.lax.stop_gradient if fixed else lambda x: x
    slope = lambda k, x: jax.grad(density(k))(x)

    def move(carry, inputs):
        x, f, total = carry
        k, time, eps = inputs
        g = slope(k, x)
        drift = length * (g + sign * f)
        y = stop(x + drift + width * eps)
        if fixed:
            eps = (y - x - drift) / width
        f_after = control(time, y)
        a = 0.5 * width * (g + slope(k, y) + sign * (f - f_after))
        total = total - jnp.sum(a * eps) - 0.5 * jnp.sum(a * a)
        return (y, f_after, total), -(eps + a)

    order = jnp.arange(n) if sign == 1 else jnp.arange(n)[::-1]
    times = order + (1 if sign == 1 else 0)
    x = stop(x)
    first = control(jnp.asarray(0 if sign == 1 else n), x)
    start = (x, first, jnp.zeros_like(x, shape=()))
    (y, _, total), back = jax.lax.scan(move, start, (order, times, noise))
    return y, total, back
