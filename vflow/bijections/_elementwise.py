"""Elementwise layer with free or conditioned parameters."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._mlp import MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape
from vflow.bijections._transformer import (
    AbstractTransformer,
    as_transformer,
    transform,
    transform_inverse,
    transform_push_score,
)


class Elementwise(AbstractBijection):
    r"""Every coordinate by its own scalar map: $y_i = \tau(x_i; \phi_i)$.

    $\phi$ is trained directly, or with a condition comes from a network $\phi = N(c)$. Both start
    at zero: the map is then the identity. It is a coupling with nothing to split.

    Args:
        key: PRNG key of the conditioner (unused without a condition).
        dim: number of coordinates.
        transformer: "affine", "spline" or a transformer object.
        hidden: widths of the conditioner's hidden layers.
        activation: name of its activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector $c$, or None.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Elementwise(jax.random.key(0), 1)
        >>> print(layer.forward_and_log_det(jnp.ones(1))[0])
        [1.]
    """

    params: Array | MLP
    transformer: AbstractTransformer
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        transformer: AbstractTransformer | str = "affine",
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "silu",
        condition_dim: int | None = None,
    ):
        check_dim("Elementwise", dim)
        self.condition_shape = condition_shape("Elementwise", condition_dim)
        self.transformer = as_transformer(transformer)
        num_params = self.transformer.num_params
        if condition_dim is None:
            self.params = jnp.zeros((dim, num_params))
        else:
            self.params = MLP(key, condition_dim, dim * num_params, hidden, activation)
        self.shape = (dim,)

    def _params(self, condition: Array | None) -> Array:
        if isinstance(self.params, MLP):
            flat = self.params(condition)  # pyright: ignore[reportArgumentType]
            return flat.reshape(-1, self.transformer.num_params).T
        return self.params.T

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The transformer at every coordinate."""
        return transform(self.transformer, x, self._params(condition))

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The transformer's inverse at every coordinate."""
        return transform_inverse(self.transformer, y, self._params(condition))

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $(s - \partial_x\log\tau')/\tau'$."""
        return transform_push_score(self.transformer, x, self._params(condition), score)[:3]
