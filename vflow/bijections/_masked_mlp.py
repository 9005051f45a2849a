"""The masked multilayer perceptron that conditions autoregressive layers."""

from itertools import pairwise

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import masked_autoregressive_inverse

from vflow._core._mlp import _ACTIVATIONS, MLP
from vflow.bijections._transformer import AbstractTransformer


def hidden_ranks(dim: int, width: int, *, conditional: bool) -> np.ndarray:
    """Ranks of a hidden layer's units: 0 (with a condition -1) to dim - 2, evenly and ascending.

    A unit of rank r sees coordinates of rank up to r and feeds parameters of those above r. (In
    Germain et al. the ranks are drawn at random, which leaves some out.)
    """
    lowest = min(-1 if conditional else 0, dim - 2)
    return lowest + np.arange(width) * (dim - 1 - lowest) // width


class MaskedMLP(eqx.Module):
    r"""A perceptron whose parameters $\phi_i$ depend on the coordinates of rank below that of i.

    The ranks are an array, so that layers of different orders can be stacked. The condition has rank
    -1: everything sees it. The last layer starts at zero. Masked weights are parameters without effect.

    Args:
        key: PRNG key.
        order: the coordinates, each once; each sees those before it.
        num_params: parameters for each coordinate.
        hidden: widths of the hidden layers.
        activation: as for `MLP`.
        condition_dim: length of the condition, 0 without one.
    """

    network: MLP
    order: Array
    ranks: Array
    num_params: int = eqx.field(static=True)
    condition_dim: int = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        order: Array,
        num_params: int,
        hidden: tuple[int, ...],
        activation: str,
        condition_dim: int,
    ):
        dim = order.shape[0]
        self.network = MLP(key, condition_dim + dim, num_params * dim, hidden, activation)
        self.order = order.astype(jnp.int32)
        self.ranks = jnp.argsort(self.order).astype(jnp.int32)
        self.num_params, self.condition_dim = num_params, condition_dim
        # Variance 1 / (inputs that are seen), not 1 / (all inputs).
        weights = [
            weight * jnp.sqrt(weight.shape[0] / jnp.maximum(1, jnp.sum(mask, 0, keepdims=True)))
            for weight, mask in zip(self.network.weights, self._masks(), strict=True)
        ]
        self.network = eqx.tree_at(lambda network: network.weights, self.network, tuple(weights))

    def _hidden_ranks(self) -> list[np.ndarray]:
        dim, conditional = self.ranks.shape[-1], self.condition_dim > 0
        widths = [weight.shape[-1] for weight in self.network.weights[:-1]]
        return [hidden_ranks(dim, width, conditional=conditional) for width in widths]

    def _masks(self) -> list[Array | np.ndarray]:
        context = jnp.full((self.condition_dim,), -1, self.ranks.dtype)
        first = jnp.concatenate([context, self.ranks])
        # Parameters are laid out with the coordinates last, which keeps each kind contiguous.
        ranks = [first, *self._hidden_ranks(), jnp.tile(self.ranks, self.num_params)]
        pairs = list(pairwise(ranks))
        masks = [a[:, None] <= b[None, :] for a, b in pairs[:-1]]
        return [*masks, pairs[-1][0][:, None] < pairs[-1][1][None, :]]

    def masked(self) -> MLP:
        """The network with its masked weights at zero."""
        weights = self.network.weights
        masked = [w * mask for w, mask in zip(weights, self._masks(), strict=True)]
        return eqx.tree_at(lambda network: network.weights, self.network, tuple(masked))

    def __call__(self, x: Array, condition: Array | None) -> Array:
        """The parameters of every coordinate, shape `(num_params, dim)`."""
        inputs = x if condition is None else jnp.concatenate([condition, x])
        return self.masked()(inputs).reshape(self.num_params, -1)

    def solve(
        self, transformer: AbstractTransformer, y: Array, condition: Array | None
    ) -> tuple[Array, Array]:
        """The x that the transformer, given x, takes to y, one coordinate after the other; the log-det."""
        network, dim, order = self.masked(), y.shape[0], self.order
        weights, biases = list(network.weights), list(network.biases)
        biases[-1] = biases[-1].reshape(self.num_params, dim)[:, order]
        weights[-1] = weights[-1].reshape(-1, self.num_params, dim)[..., order]
        rows = jnp.concatenate([jnp.arange(self.condition_dim), self.condition_dim + order])
        weights[0] = weights[0][rows]
        x, log_det = masked_autoregressive_inverse(
            transformer.inverse,
            y[order],
            jnp.zeros_like(y, shape=(0,)) if condition is None else condition,
            weights,
            biases,
            self._hidden_ranks(),
            _ACTIVATIONS[network.activation],
        )
        return x[self.ranks].astype(y.dtype), -log_det.astype(y.dtype)
