"""The contract of a stochastic layer, and the annealed densities that such layers move towards."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

LogDensity = Callable[[Array], Array]


class AbstractTransition(eqx.Module):
    r"""One layer of a stochastic flow: a pair of Markov kernels, on one event (no batch axes).

    `forward` draws $y \sim q(\cdot\mid x)$, `reverse` draws $x \sim r(\cdot\mid y)$, and both return
    what the pair adds to the log of the path weight:

    $$\Delta S = \log r(x\mid y) - \log q(y\mid x)$$

    forwards, and minus that in reverse. A bijection is the pair without noise, with
    $\Delta S = \log|\det \partial y/\partial x|$. Then $\log w = \log p(x_K) - \log q_0(x_0) + \sum_k
    \Delta S_k$ has $\mathbb{E}[w] = Z$, whatever the layers and their parameters.

    A subclass is final: it sets the two class variables and implements `forward` and `reverse`;
    fields are arrays, modules, or static and hashable.

    Attributes:
        reparameterised: whether the derivative along the draw is all of the gradient.
        tempered: whether the layer takes a temperature, that is a log density to move towards.
    """

    reparameterised: eqx.AbstractClassVar[bool]
    tempered: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def forward(self, key: PRNGKeyArray, x: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(y, dS)`: shapes of `x` and `()`."""

    @abc.abstractmethod
    def reverse(self, key: PRNGKeyArray, y: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(x, dS)` of the reversed step, its dS with the other sign; shapes of `y` and `()`."""

    def build(self, key: PRNGKeyArray, dim: int) -> "AbstractTransition":
        """This layer for `dim` coordinates: itself, unless it has a network to make."""
        return self


class Tempered:
    r"""The geometric path $\log p_\lambda = (1-\lambda) \log q_0 + \lambda \log p$.

    Called, it is the log density at `stop`; layers that move along the path as they go (see
    `ControlledLangevin`) use `at`.

    Args:
        base: log density of the base distribution.
        target: log density of the target, unnormalised.
        start: temperature of the layer before.
        stop: temperature of this layer.
    """

    def __init__(self, base: LogDensity, target: LogDensity, start: Any, stop: Any):
        self.base, self.target, self.start, self.stop = base, target, start, stop

    def __call__(self, x: Array) -> Array:
        return self.at(1.0)(x)

    def at(self, share: Any) -> LogDensity:
        """The log density `share` of the way from `start` to `stop`."""
        arrived = isinstance(share, float) and share == 1.0
        if arrived and isinstance(self.stop, float) and self.stop == 1.0:
            return self.target  # also where the base has density zero
        temperature = self.stop if arrived else self.start + share * (self.stop - self.start)
        return lambda x: (1.0 - temperature) * self.base(x) + temperature * self.target(x)


def between(log_density: LogDensity, share: Any) -> LogDensity:
    """The log density part of the way along the path, or a plain log density as it is."""
    return log_density.at(share) if isinstance(log_density, Tempered) else log_density


def check_steps(owner: str, **counts: Any) -> None:
    """Raise ValueError unless every count is a positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}.")


def log_of(owner: str, name: str, value: Any) -> Array:
    """The logarithm of a positive number, a trainable leaf of shape ()."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be a positive number, got {value!r}.")
    return jnp.log(jnp.asarray(float(value)))


def square(x: Array) -> Array:
    """The squared Euclidean norm."""
    return jnp.sum(x * x)


def noise(key: PRNGKeyArray, num: int, like: Array) -> Array:
    """`num` standard normal vectors like `like`, stacked."""
    return jax.random.normal(key, (num, *like.shape), like.dtype)
