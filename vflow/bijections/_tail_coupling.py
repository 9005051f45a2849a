"""Coupling layer for light and heavy coordinates: heavy ones never feed light ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._mlp import MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import condition_shape
from vflow.bijections._transformer import (
    AbstractTransformer,
    as_transformer,
    transform,
    transform_inverse,
    transform_push_score,
)


class TailCoupling(AbstractBijection):
    r"""Two couplings side by side: one among the light coordinates, one for the heavy ones.

    With the light coordinates $a$ first and the heavy ones $b$ behind, each group split in halves,

    $$a'_2 = \tau(a_2; N_a(a_1, c)), \qquad
      b'_2 = \tau(b_2; N_b(a, \operatorname{arcsinh} b_1, c)), \qquad a'_1 = a_1, \; b'_1 = b_1.$$

    Heavy coordinates never feed light ones, in neither direction of the map, so with a transformer
    whose slope is bounded, as the affine one's is, light marginals stay light. The networks see
    heavy coordinates through arcsinh: their inputs stay moderate, and shifts and scales grow too
    slowly to move the tail index from one heavy coordinate to another. A group of one is transformed
    given the rest, or freely if there is none; a group may be empty. The layer starts at the identity.

    Args:
        key: PRNG key of the networks.
        num_light: number of light coordinates, which come first.
        num_heavy: number of heavy coordinates.
        transformer: "affine" or a transformer object; its slope should be bounded.
        hidden: widths of the networks' hidden layers.
        activation: name of their activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector $c$, or None.

    Raises:
        ValueError: negative numbers, or no coordinate at all.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.TailCoupling(jax.random.key(0), 2, 2)
        >>> print(layer.forward_and_log_det(jnp.ones(4))[0])
        [1. 1. 1. 1.]

    Source:
        The order of Laszkiewicz, Lederer & Fischer 2022 (arXiv 2206.10311), for couplings.
    """

    light: MLP | Array | None
    heavy: MLP | Array | None
    transformer: AbstractTransformer
    num_light: int = eqx.field(static=True)
    num_heavy: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        num_light: int,
        num_heavy: int,
        *,
        transformer: AbstractTransformer | str = "affine",
        hidden: tuple[int, ...] = (32, 32),
        activation: str = "silu",
        condition_dim: int | None = None,
    ):
        for name, value in (("num_light", num_light), ("num_heavy", num_heavy)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(
                    f"TailCoupling: {name} must be a non-negative integer, got {value!r}."
                )
        if num_light + num_heavy == 0:
            raise ValueError("TailCoupling: num_light and num_heavy are both zero.")
        self.condition_shape = condition_shape("TailCoupling", condition_dim)
        self.transformer = as_transformer(transformer)
        keys = jax.random.split(key)
        extra = condition_dim or 0

        def network(key: PRNGKeyArray, num_inputs: int, num_active: int) -> MLP | Array | None:
            num_outputs = num_active * self.transformer.num_params
            if not num_active:
                return None
            if not num_inputs:
                return jnp.zeros((num_outputs,))
            return MLP(key, num_inputs, num_outputs, hidden, activation)

        self.num_light, self.num_heavy = num_light, num_heavy
        self.light = network(keys[0], num_light // 2 + extra, num_light - num_light // 2)
        self.heavy = network(
            keys[1], num_light + num_heavy // 2 + extra, num_heavy - num_heavy // 2
        )
        self.shape = (num_light + num_heavy,)

    def _light_params(self, passive: Array, condition: Array | None) -> Array:
        return self._run(self.light, (passive,), condition)

    def _heavy_params(self, light: Array, passive: Array, condition: Array | None) -> Array:
        return self._run(self.heavy, (light, jnp.arcsinh(passive)), condition)

    def _run(
        self, network: MLP | Array | None, inputs: tuple[Array, ...], condition: Array | None
    ) -> Array:
        if isinstance(network, MLP):
            parts = inputs if condition is None else (*inputs, condition)
            network = network(jnp.concatenate(parts))
        if network is None:
            network = jnp.zeros((0,), inputs[0].dtype)
        return network.reshape(-1, self.transformer.num_params).T

    def _split(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Passive light, active light, passive heavy, active heavy."""
        n = self.num_light
        ends = n // 2, n, n + self.num_heavy // 2
        return x[: ends[0]], x[ends[0] : ends[1]], x[ends[1] : ends[2]], x[ends[2] :]

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One pass of each network."""
        a1, a2, b1, b2 = self._split(x)
        new_a2, log_det_light = transform(self.transformer, a2, self._light_params(a1, condition))
        params = self._heavy_params(x[: self.num_light], b1, condition)
        new_b2, log_det_heavy = transform(self.transformer, b2, params)
        return jnp.concatenate([a1, new_a2, b1, new_b2]), log_det_light + log_det_heavy

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One pass of each network, the light one first."""
        a1, new_a2, b1, new_b2 = self._split(y)
        params = self._light_params(a1, condition)
        a2, log_det_light = transform_inverse(self.transformer, new_a2, params)
        light = jnp.concatenate([a1, a2])
        params = self._heavy_params(light, b1, condition)
        b2, log_det_heavy = transform_inverse(self.transformer, new_b2, params)
        return jnp.concatenate([light, b1, b2]), log_det_light + log_det_heavy

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """One pass of each network and one product with its transposed input Jacobian."""
        n, k = self.num_light, self.num_light // 2
        a1, a2, b1, b2 = self._split(x)
        *_, score_b1, score_b2 = self._split(score)
        params, pull = jax.vjp(lambda a, b: self._heavy_params(a, b, condition), x[:n], b1)
        new_b2, log_det_heavy, score_b2, cotangent = transform_push_score(
            self.transformer, b2, params, score_b2
        )
        moved_a, moved_b1 = pull(cotangent)
        score_a = score[:n] - moved_a
        params, pull = jax.vjp(lambda a: self._light_params(a, condition), a1)
        new_a2, log_det_light, score_a2, cotangent = transform_push_score(
            self.transformer, a2, params, score_a[k:]
        )
        score_a1 = score_a[:k] - pull(cotangent)[0]
        y = jnp.concatenate([a1, new_a2, b1, new_b2])
        score_y = jnp.concatenate([score_a1, score_a2, score_b1 - moved_b1, score_b2])
        return y, log_det_light + log_det_heavy, score_y
