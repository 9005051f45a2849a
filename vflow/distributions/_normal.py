"""The standard normal base distribution."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import standard_normal_log_density
from vflow_kernels._filled import materialised

from vflow.distributions._distribution import AbstractDistribution


def event_shape(owner: str, shape: Any) -> tuple[int, ...]:
    """An event shape from an int or a tuple of ints, all positive, or a ValueError."""
    given = shape
    shape = shape if isinstance(shape, tuple) else (shape,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(
            f"{owner}: shape must be a positive integer or a tuple of them, got {given!r}."
        )
    return shape


def _draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """`jax.random.normal(key, shape)`, the first of a round number of draws.

    The same numbers, as entry i of a draw depends on the key and on i alone (with JAX's default
    generator). On CPUs, LLVM takes up to four times as long to compile a batch of rows of 9 to 14
    numbers, loops that it unrolls with a remainder, as it takes for rows of 16. And XLA would
    compile and compute the inverse error function again for each reader of the draw.
    """
    size = math.prod(shape)
    rounded = size if size < 6 else -(-size // 16) * 16
    return materialised(jax.random.normal(key, (rounded,)))[:size].reshape(shape)


class Normal(AbstractDistribution):
    r"""The standard normal on an event shape: $\log q(x) = -\tfrac12\|x\|^2 - \tfrac d2\log 2\pi$.

    It has no parameters: location, scale and correlation belong to a bijection after it
    (`vf.flows.gaussian`), so that a path gradient sees them. Draws have JAX's default float type.

    Args:
        shape: the event shape, or an integer for a vector.

    Raises:
        ValueError: a size that is not a positive integer.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> print(f"{vf.distributions.Normal(2).log_prob(jnp.zeros(2)):.4f}")
        -1.8379
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, shape: int | tuple[int, ...]):
        self.shape = event_shape("Normal", shape)
        self.condition_shape = None

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density: shapes `shape` and `()`."""
        x = _draw(key, self.shape)
        return x, self.log_prob(x)

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x` of shape `shape`; shape `()`."""
        return jnp.sum(standard_normal_log_density(x))

    def score(self, x: Array, condition: Array | None = None) -> Array:
        """$-x$."""
        return -x
