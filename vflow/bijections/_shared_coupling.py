"""Coupling layers that share the trunk of their conditioner."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from vflow._core._mlp import _ACTIVATIONS, MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._chain import Chain, Scan
from vflow.bijections._checks import check_dim, condition_shape
from vflow.bijections._coupling import Coupling
from vflow.bijections._permute import Permute
from vflow.bijections._transformer import AbstractTransformer


class _Trunk(eqx.Module):
    """Hidden layers; `gates` multiply their outputs."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activation: str = eqx.field(static=True)

    def __call__(self, x: Array, gates: tuple[Array, ...]) -> Array:
        activation = _ACTIVATIONS[self.activation]
        for weight, bias, gate in zip(self.weights, self.biases, gates, strict=True):
            x = activation(x @ weight + bias) * jnp.exp(gate)
        return x


class _Head(eqx.Module):
    """What one layer has for itself; the shared trunk is put in while the layers run."""

    embedding: Array
    gates: tuple[Array, ...]
    last: MLP
    trunk: _Trunk | None

    def __call__(self, x: Array) -> Array:
        inputs = jnp.concatenate([x, self.embedding])
        return self.last(self.trunk(inputs, self.gates))  # pyright: ignore[reportOptionalCall]


class SharedCoupling(AbstractBijection):
    r"""A stack of coupling layers with one conditioner trunk for all.

    Layer k is $y_{1:m} = x_{1:m}$, $y_i = \tau(x_i; \phi_i)$ as in `Coupling`, followed by a
    permutation, with

    $$\phi = W_k h_L + b_k, \qquad h_l = e^{\gamma_{k,l}} \odot a(A_l h_{l-1} + c_l), \qquad
      h_0 = (x_{1:m}, c, e_k).$$

    $A_l, c_l$ are shared; the head $W_k, b_k$ (zero at the start: the map is then the identity), the
    gates $\gamma_k$ and the embedding $e_k$, which tells the trunk the layer it works for, are the
    layer's own. A layer costs what a `Coupling` costs; a deep stack has far fewer parameters.

    Args:
        key: PRNG key of the networks.
        dim: number of coordinates, at least 2.
        permutations: integers of shape (num_layers, dim), the permutation after each layer.
        transformer: "affine", "spline" or a transformer object.
        hidden: widths of the trunk's layers, at least one.
        activation: name of its activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector $c$, or None.
        embedding_dim: length of $e_k$.

    Raises:
        ValueError: a dim below 2, no hidden layer, or permutations of a wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> order = jnp.array([[2, 1, 0]] * 4)
        >>> layers = vf.bijections.SharedCoupling(jax.random.key(0), 3, order)
        >>> print(layers.forward_and_log_det(jnp.ones(3))[0])
        [1. 1. 1.]

    Source:
        Lee, Kim & Yoon 2020, NanoFlow (arXiv 2006.06280), section 3.
    """

    trunk: _Trunk
    layers: Chain
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        permutations: Int[Array, "num_layers dim"],
        *,
        transformer: AbstractTransformer | str = "affine",
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "silu",
        condition_dim: int | None = None,
        embedding_dim: int = 8,
    ):
        check_dim("SharedCoupling", dim, least=2)
        if not hidden:
            raise ValueError("SharedCoupling: hidden is empty, there is no trunk to share.")
        self.condition_shape = condition_shape("SharedCoupling", condition_dim)
        self.shape = (dim,)
        trunk_key, layer_key = jax.random.split(key)
        in_size = dim // 2 + (condition_dim or 0) + embedding_dim
        network = MLP(trunk_key, in_size, 1, hidden, activation)
        self.trunk = _Trunk(network.weights[:-1], network.biases[:-1], activation)

        def layer(key, permutation):
            coupling = Coupling(
                key, dim, transformer=transformer, hidden=(), condition_dim=condition_dim
            )
            head = _Head(
                embedding=jax.random.normal(key, (embedding_dim,)),
                gates=tuple(jnp.zeros((width,)) for width in hidden),
                last=MLP(key, hidden[-1], coupling.conditioner.biases[-1].size, ()),
                trunk=None,
            )
            coupling = eqx.tree_at(lambda c: c.conditioner, coupling, head)
            return Chain([coupling, Permute(permutation)])

        permutations = jnp.asarray(permutations)
        if permutations.ndim != 2 or permutations.shape[1] != dim or not permutations.shape[0]:
            raise ValueError(
                f"SharedCoupling: permutations must have shape (num_layers, {dim}), got "
                f"{permutations.shape}."
            )
        keys = jax.random.split(layer_key, permutations.shape[0])
        self.layers = eqx.filter_vmap(layer)(keys, permutations)

    def _stack(self) -> Scan:
        """The layers, each with the trunk put in."""
        num_layers = len(jax.tree.leaves(self.layers)[0])
        trunk = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_layers, *a.shape)), self.trunk)
        where = lambda c: c.layers[0].conditioner.trunk
        return Scan(eqx.tree_at(where, self.layers, trunk, is_leaf=lambda node: node is None))

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The layers in order."""
        return self._stack().forward_and_log_det(x, condition)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The inverses in reverse order."""
        return self._stack().inverse_and_log_det(y, condition)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """By the rule of `Coupling`, layer by layer."""
        return self._stack().push_score(x, score, condition)

    def forward_with_score(
        self, x: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """One scan whose body holds a layer's two evaluations."""
        return self._stack().forward_with_score(x, score, condition, live=live)

    def inverse_with_score(
        self, y: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        """The same scan in reverse order."""
        return self._stack().inverse_with_score(y, score, condition, live=live)
