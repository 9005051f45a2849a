"""Planar layer."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import planar_constrain, planar_forward, planar_inverse, planar_push_score

from vflow._core._mlp import MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape

# Where the constraint function of `planar_constrain`, m(x) = -0.999 + softplus(x), is zero.
_NEUTRAL = math.log(math.expm1(0.999))


class Planar(AbstractBijection):
    r"""A planar layer: a shift along one direction that depends on the position across a plane.

    $$y = x + \hat u\tanh(w^\top x + b), \qquad
      \hat u = u + [m(w^\top u) - w^\top u]\,\frac{w}{\|w\|^2}, \qquad
      m(t) = -1 + \varepsilon + \log(1 + e^t)$$

    Invertible for all parameters, since $w^\top\hat u > -1$ (the paper's constraint with a margin
    $\varepsilon = 10^{-3}$, without which it degenerates in floating point). The inverse is exact:
    one scalar root with implicit derivatives. The layer starts at the identity, with $u$ such that
    $\hat u = 0$ and a random plane: the gradient for $u$ is not zero there.

    With a condition, $(u, w, b)$ come from a network.

    Args:
        key: PRNG key of the plane, and of the conditioner.
        dim: number of coordinates $d$.
        hidden: widths of the conditioner's hidden layers (unused without a condition).
        activation: name of its activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector, or None.

    Raises:
        ValueError: a dim below 1.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Planar(jax.random.key(0), 2)
        >>> print(layer.forward_and_log_det(jnp.ones(2))[0])
        [1. 1.]

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770), equations 10 to 13 and appendix A.1.
    """

    params: Array | MLP
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "silu",
        condition_dim: int | None = None,
    ):
        check_dim("Planar", dim)
        self.condition_shape = condition_shape("Planar", condition_dim)
        plane_key, offset_key, network_key = jax.random.split(key, 3)
        # Inputs of unit scale then meet the plane at distances of order one in any dimension.
        w = math.sqrt(2 / dim) * jax.random.normal(plane_key, (dim,))
        b = 0.1 * jax.random.normal(offset_key, (1,))
        start = jnp.concatenate([_NEUTRAL * w / (w @ w), w, b])
        if condition_dim is None:
            self.params = start
        else:
            network = MLP(network_key, condition_dim, 2 * dim + 1, hidden, activation)
            self.params = eqx.tree_at(lambda n: n.biases[-1], network, start)
        self.shape = (dim,)

    def _params(self, condition: Array | None) -> tuple[Array, Array, Array, Array]:
        """The arguments of the kernels: u_hat, c, w and b."""
        if isinstance(self.params, MLP):
            params = self.params(condition)  # pyright: ignore[reportArgumentType]
        else:
            params = self.params
        (dim,) = self.shape
        u, w, b = params[:dim], params[dim : 2 * dim], params[2 * dim]
        return *planar_constrain(u, w), w, b

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One product with $w$ and one tanh."""
        return planar_forward(x, *self._params(condition))

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""One scalar root, $a + (w^\top\hat u)\tanh a = w^\top y + b$."""
        return planar_inverse(y, *self._params(condition))

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """By the Sherman-Morrison formula: two products with vectors, no inverse."""
        return planar_push_score(x, score, *self._params(condition))
