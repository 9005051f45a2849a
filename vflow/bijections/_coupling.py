"""Coupling layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._mlp import MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape
from vflow.bijections._transformer import (
    AbstractTransformer,
    AffineTransformer,
    Params,
    as_transformer,
    transform,
    transform_inverse,
    transform_push_score,
)


class Coupling(AbstractBijection):
    r"""A coupling layer: the first coordinates pass, the others are transformed given them.

    $$y_{1:k} = x_{1:k}, \qquad y_i = \tau(x_i; \phi_i), \qquad \phi = N(x_{1:k}, c), \qquad
      \log|\det J| = \sum_{i>k}\log\tau'(x_i; \phi_i)$$

    $N$ is a multilayer perceptron whose last layer starts at zero, the map then at the identity.
    Alternate with `Flip` or `Permute` so that every coordinate is transformed.

    Args:
        key: PRNG key of the conditioner.
        dim: number of coordinates, at least 2 (use `Elementwise` for one).
        transformer: "affine", "spline" or a transformer object.
        hidden: widths of the conditioner's hidden layers.
        activation: name of its activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector $c$, or None.
        num_identity: $k$, from 1 to dim - 1; dim // 2 by default.

    Raises:
        ValueError: a dim below 2 or a `num_identity` that leaves nothing to transform.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Coupling(jax.random.key(0), 3, transformer="affine")
        >>> print(layer.forward_and_log_det(jnp.ones(3))[0])
        [1. 1. 1.]

    Source:
        Dinh, Sohl-Dickstein & Bengio 2017 (arXiv 1605.08803), equations 4 to 8.
    """

    conditioner: MLP
    transformer: AbstractTransformer
    num_identity: int = eqx.field(static=True)
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
        num_identity: int | None = None,
    ):
        if dim == 1:
            raise ValueError("Coupling: dim = 1 has nothing to split; use Elementwise.")
        check_dim("Coupling", dim, least=2)
        num_identity = dim // 2 if num_identity is None else num_identity
        if not 1 <= num_identity < dim:
            raise ValueError(
                f"Coupling: num_identity must be between 1 and dim - 1 = {dim - 1}, "
                f"got {num_identity}."
            )
        self.condition_shape = condition_shape("Coupling", condition_dim)
        self.transformer = as_transformer(transformer)
        self.conditioner = MLP(
            key,
            num_identity + (condition_dim or 0),
            (dim - num_identity) * self.transformer.num_params,
            hidden,
            activation,
        )
        self.num_identity = num_identity
        self.shape = (dim,)

    def _params(self, passive: Array, condition: Array | None) -> Params:
        inputs = passive if condition is None else jnp.concatenate([passive, condition])
        num_params = self.transformer.num_params
        if type(self.transformer) is AffineTransformer and isinstance(self.conditioner, MLP):
            return self.conditioner.rows(inputs, num_params)
        # one contiguous row a parameter: a spline reads its bins in half the time
        return self.conditioner(inputs).reshape(num_params, -1)

    def _halves(self, x: Array) -> tuple[Array, Array]:
        passive, active = jax.lax.split(x, (self.num_identity, x.shape[0] - self.num_identity))
        return passive, active

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One pass of the conditioner."""
        passive, active = self._halves(x)
        active, log_det = transform(self.transformer, active, self._params(passive, condition))
        return jnp.concatenate([passive, active]), log_det

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One pass of the conditioner."""
        passive, active = self._halves(y)
        params = self._params(passive, condition)
        active, log_det = transform_inverse(self.transformer, active, params)
        return jnp.concatenate([passive, active]), log_det

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """One pass of the conditioner and one product with its transposed input Jacobian."""
        (passive, active), (score_passive, score_active) = self._halves(x), self._halves(score)
        params, pull = jax.vjp(lambda passive: self._params(passive, condition), passive)
        active, log_det, score_active, cotangent = transform_push_score(
            self.transformer, active, params, score_active
        )
        score_passive = score_passive - pull(cotangent)[0]
        y = jnp.concatenate([passive, active])
        return y, log_det, jnp.concatenate([score_passive, score_active])
