"""Bijections made from one other bijection."""

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Frozen
from vflow.bijections._bijection import AbstractBijection


class Invert(AbstractBijection):
    r"""A bijection run backwards: its forward direction is the inverse of the given one.

    `push_score` pulls the score back through the given map's forward direction: one inverse, one
    forward pass and one vector-Jacobian product, no second inverse.

    Args:
        bijection: the map to invert.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> halve = vf.bijections.Invert(vf.bijections.Affine(jnp.zeros(1), 2 * jnp.ones(1)))
        >>> print(halve.forward_and_log_det(jnp.ones(1))[0])
        [0.5]
    """

    bijection: AbstractBijection
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, bijection: AbstractBijection):
        self.bijection = bijection
        self.shape = bijection.shape
        self.condition_shape = bijection.condition_shape

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The given map's inverse."""
        return self.bijection.inverse_and_log_det(x, condition)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The given map's forward direction."""
        return self.bijection.forward_and_log_det(y, condition)

    def forward_with_score(
        self, x: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """The given map's joint step backwards: no second inverse."""
        return self.bijection.inverse_with_score(x, score, condition, live=live)

    def inverse_with_score(
        self, y: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """The given map's joint step."""
        return self.bijection.forward_with_score(y, score, condition, live=live)


class Freeze(AbstractBijection):
    """A bijection whose parameters are carried along but never trained.

    `vf.params` skips its leaves, and gradients with respect to them are zero.

    Args:
        bijection: the map to freeze.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> frozen = vf.bijections.Freeze(vf.bijections.Affine(jnp.ones(2)))
        >>> print(jax.tree.leaves(vf.params(frozen)))
        []
    """

    frozen: Frozen
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, bijection: AbstractBijection):
        self.frozen = Frozen(bijection)
        self.shape = bijection.shape
        self.condition_shape = bijection.condition_shape

    @property
    def bijection(self) -> AbstractBijection:
        """The frozen map, its arrays behind `stop_gradient`."""
        return self.frozen.value

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The frozen map."""
        return self.bijection.forward_and_log_det(x, condition)

    @property
    def estimated(self) -> bool:
        """Whether the frozen map estimates its log-det."""
        return self.bijection.estimated

    def forward_and_estimate(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """The frozen map's estimate."""
        return self.bijection.forward_and_estimate(key, x, condition)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The frozen map's inverse."""
        return self.bijection.inverse_and_log_det(y, condition)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The frozen map's rule."""
        return self.bijection.push_score(x, score, condition)

    def forward_with_score(
        self, x: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """The frozen map's joint step."""
        return self.bijection.forward_with_score(x, score, condition, live=live)

    def inverse_with_score(
        self, y: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """The frozen map's joint step backwards."""
        return self.bijection.inverse_with_score(y, score, condition, live=live)
