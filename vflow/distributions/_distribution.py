"""The contract of a distribution."""

import abc

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray


class AbstractDistribution(eqx.Module):
    r"""A distribution over one event (no batch axes), with a density.

    Batching is `jax.vmap`; `vf.sample_and_log_prob(key, distribution, n)` does it for draws.
    A subclass is final: it sets `shape` and `condition_shape` (static) and implements
    `sample_and_log_prob` (reparameterised in every trainable leaf) and `log_prob`.

    Args:
        shape: shape of one event.
        condition_shape: shape of the condition, or None for an unconditional distribution.
    """

    shape: eqx.AbstractVar[tuple[int, ...]]
    condition_shape: eqx.AbstractVar[tuple[int, ...] | None]

    @abc.abstractmethod
    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density: shapes `shape` and `()`."""

    @abc.abstractmethod
    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x` of shape `shape`; shape `()`."""

    def sample(self, key: PRNGKeyArray, condition: Array | None = None) -> Array:
        """One draw, shape `shape`."""
        return self.sample_and_log_prob(key, condition)[0]

    def score(self, x: Array, condition: Array | None = None) -> Array:
        r"""$\nabla_x \log q(x)$, shape `shape`."""
        return jax.grad(self.log_prob)(x, condition)
