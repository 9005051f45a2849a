"""Invertible residual layer."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import spectral_bound

from vflow._core import stop_gradient
from vflow._core._mlp import _ACTIVATIONS, MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape
from vflow.bijections._roulette import roulette_log_det

# Largest slopes; those of the other activations are one.
_LIPSCHITZ = {"gelu": 1.129, "silu": 1.1}


class Residual(AbstractBijection):
    r"""An invertible residual layer, $y = x + g(x)$ with a contraction $g$.

    $$\operatorname{Lip}(g) \le c < 1, \qquad \log|\det J| = \log\det(I + \partial g)$$

    $g$ is a perceptron whose weight matrices are divided by a certified bound of their spectral norm
    (`vflow_kernels.spectral_bound`) wherever that exceeds $c^{1/n}$, and whose activations are divided
    by their largest slope: the bound holds for all parameters, there is no state to update. Its last
    layer starts at zero, the map then at the identity. Weights of the condition are not bounded.

    The log-determinant is exact, that of the dense Jacobian: O(d) products with it and O(d^3) for the
    determinant, meant for small d. With `log_det="roulette"` a draw inside an objective that is linear
    in $\log q$ has an unbiased estimate instead,

    $$\sum_{k=1}^{N} \frac{(-1)^{k+1}}{k\,P(N \ge k)}\, v^\top (\partial g)^k v, \qquad
      P(N \ge k) = c^{k-1}, \qquad v_i = \pm 1,$$

    with $1/(1-c)$ products on average, an unbiased first derivative and finite variance. It is not
    unbiased for $1/q$: other objectives, the verdict and `resample` keep the exact one, and path
    gradients, which need the dense Jacobian, are refused.

    The inverse is a fixed point, $x \leftarrow y - g(x)$, which gains a factor c a step, with implicit
    derivatives; `push_score` solves with the dense Jacobian.

    Args:
        key: PRNG key of the network.
        dim: number of coordinates.
        hidden: widths of its hidden layers.
        activation: name of its activation, as in "silu", "tanh", "elu".
        condition_dim: length of the condition vector, or None.
        lipschitz: $c$, in (0, 1).
        log_det: "exact", or "roulette" for an estimate where the objective allows one.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Residual(jax.random.key(0), 2, hidden=(8,))
        >>> print(layer.forward_and_log_det(jnp.ones(2))[0])
        [1. 1.]

    Source:
        Behrmann et al. 2019 (arXiv 1811.00995), theorem 1 and algorithm 1; Chen et al. 2019 (arXiv
        1906.02735), equations 6 and 8, for the estimate.
    """

    network: MLP
    lipschitz: float = eqx.field(static=True)
    log_det: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        hidden: tuple[int, ...] = (32, 32),
        activation: str = "silu",
        condition_dim: int | None = None,
        lipschitz: float = 0.9,
        log_det: str = "exact",
    ):
        check_dim("Residual", dim)
        if not 0 < lipschitz < 1:
            raise ValueError(f"Residual: lipschitz must be between 0 and 1, got {lipschitz}.")
        if log_det not in ("exact", "roulette"):
            raise ValueError(f'Residual: log_det must be "exact" or "roulette", got {log_det!r}.')
        self.condition_shape = condition_shape("Residual", condition_dim)
        self.network = MLP(key, dim + (condition_dim or 0), dim, hidden, activation)
        self.lipschitz, self.log_det = lipschitz, log_det
        self.shape = (dim,)

    def _contraction(self, condition: Array | None):
        """The function g at one condition, its weights normalised once."""
        weights, biases = list(self.network.weights), list(self.network.biases)
        (dim,) = self.shape
        if condition is not None:
            biases[0] = biases[0] + condition @ weights[0][dim:]
            weights[0] = weights[0][:dim]
        target = self.lipschitz ** (1 / len(weights))
        weights = [w * (target / jnp.maximum(target, spectral_bound(w))) for w in weights]
        activation = _ACTIVATIONS[self.network.activation]
        largest = _LIPSCHITZ.get(self.network.activation, 1.0)

        def contraction(x):
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                x = activation(x @ weight + bias) / largest
            return x @ weights[-1] + biases[-1]

        return contraction

    def _transform(self, x: Array, condition: Array | None) -> tuple[Array, Array, Array]:
        """The map, its log-determinant and its Jacobian."""
        value, push = jax.linearize(self._contraction(condition), x)
        one = jnp.eye(x.shape[0], dtype=value.dtype)
        jacobian = one + jax.vmap(push, out_axes=1)(one.astype(x.dtype))
        return x + value, jnp.linalg.slogdet(jacobian)[1], jacobian

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One pass and the dense Jacobian."""
        return self._transform(x, condition)[:2]

    @property
    def estimated(self) -> bool:
        """Whether the log-det is estimated where the objective allows it."""
        return self.log_det == "roulette"

    def forward_and_estimate(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One pass and the Russian-roulette estimate, or the exact log-det."""
        if not self.estimated:
            return self.forward_and_log_det(x, condition)
        contraction = self._contraction(condition)
        frozen, context = stop_gradient((self, condition))
        log_det = roulette_log_det(
            key, contraction, frozen._contraction(context), x, self.lipschitz
        )
        return x + contraction(x), log_det

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """The fixed point, then the Jacobian there."""
        contraction = self._contraction(condition)
        eps = float(jnp.finfo(y.dtype).eps)
        most = math.ceil(math.log(eps) / math.log(self.lipschitz)) + 10

        def solve(_, start):
            def step(carry):
                count, x, _ = carry
                new = (y - contraction(x)).astype(x.dtype)
                change = jnp.max(jnp.abs(new - x)) / (1 + jnp.max(jnp.abs(new)))
                return count + 1, new, change

            def unfinished(carry):
                return (carry[0] < most) & ~(carry[2] <= eps)

            start = (
                jnp.zeros_like(y, dtype=int, shape=()),
                start,
                jnp.full_like(y, jnp.inf, shape=()),
            )
            return jax.lax.while_loop(unfinished, step, start)[1]

        x = jax.lax.custom_root(
            lambda x: (x + contraction(x) - y).astype(y.dtype),
            y,
            solve,
            lambda linear, b: jnp.linalg.solve(jax.jacobian(linear)(b), b),
        )
        return x, -self._transform(x, condition)[1]

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""$J^\top s_y = s - \nabla\log|\det J|$ by the dense Jacobian."""
        if self.estimated:
            raise NotImplementedError(
                'Residual with log_det="roulette" has no path gradient, which needs the dense '
                "Jacobian: use gradient='total', or log_det=\"exact\"."
            )

        def transform(x):
            y, log_det, jacobian = self._transform(x, condition)
            return log_det, (y, jacobian)

        log_det, pull, (y, jacobian) = jax.vjp(transform, x, has_aux=True)
        rest = score - pull(jnp.ones_like(log_det))[0]
        return y, log_det, jnp.linalg.solve(jacobian.T, rest)
