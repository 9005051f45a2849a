"""Block neural autoregressive layer."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import monotone_root, triangular_fixed_point, triangular_root

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape


def _log_tanh_slope(z: Array) -> Array:
    return 2 * (math.log(2) - jnp.logaddexp(z, -z))


def _log_product(log_vector: Array, matrix: Array) -> Array:
    """The logarithm of exp(log_vector) @ matrix, for a positive matrix."""
    largest = jax.lax.stop_gradient(jnp.max(log_vector, keepdims=True))
    return jnp.log(jnp.exp(log_vector - largest) @ matrix) + largest


def _scalar(t: Array, args: tuple) -> Array:
    """Coordinate i as a function of its own input, the earlier ones fixed."""
    diagonals, offsets, gate = args
    units = t[None]
    for diagonal, offset in zip(diagonals[:-1], offsets[:-1], strict=True):
        units = jnp.tanh(units @ diagonal + offset)
    out = units @ diagonals[-1] + offsets[-1]
    return jax.nn.sigmoid(-gate) * t + jax.nn.sigmoid(gate) * out[0]


class BlockAutoregressive(AbstractBijection):
    r"""A network that is itself a triangular monotone map: block-masked positive weights, tanh, a gate.

    $$y = (1-\alpha)\,x + \alpha\,f(x), \qquad
      f = W_K\tanh(\cdots\tanh(W_1 x + b_1)\cdots) + b_K, \qquad \alpha_i = \sigma(\gamma_i)$$

    Each coordinate has `hidden` units a layer. Blocks of $W_k$ from coordinate j to i are zero for
    $j > i$, free for $j < i$ and positive ($e^v$) for $j = i$; rows are normalised and scaled. So $y_i$
    increases in $x_i$ and depends on $x_{\le i}$: the log-determinant is
    $\sum_i\log\big(1-\alpha_i+\alpha_i\,\partial_i f_i\big)$, and $\partial_i f_i$, a product of positive
    block matrices, is computed in log space. tanh alone has a bounded range and cannot keep the tails of
    the base; the gated residual maps onto all of $\mathbb{R}^d$. The layer starts near the identity
    ($\alpha = 0.1$).

    Forward is one pass. The inverse solves one monotone equation a coordinate, in order, with bounds
    that are known since $f$ is bounded; its derivatives are implicit. `push_score` solves the triangular
    $J^\top s_y = s - \nabla\log|\det J|$ by sweeps, each one product with $J^\top$.

    Args:
        key: PRNG key of the weights.
        dim: number of coordinates.
        hidden: units of each coordinate in the hidden layers, at least one layer.
        condition_dim: length of the condition vector, added to the first layer, or None.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.BlockAutoregressive(jax.random.key(0), 2, hidden=(3,))
        >>> y, log_det = layer.forward_and_log_det(jnp.array([0.5, -1.0]))
        >>> bool(jnp.allclose(layer.inverse_and_log_det(y)[0], jnp.array([0.5, -1.0]), atol=1e-4))
        True

    Source:
        De Cao, Titov & Aziz 2019 (arXiv 1904.04676), equations 8 to 12.
    """

    weights: tuple[Array, ...]
    log_norms: tuple[Array, ...]
    biases: tuple[Array, ...]
    context: Array | None
    gate: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        hidden: tuple[int, ...] = (8, 8),
        condition_dim: int | None = None,
    ):
        check_dim("BlockAutoregressive", dim)
        if not hidden or any(width < 1 for width in hidden):
            raise ValueError(
                "BlockAutoregressive: hidden must hold at least one width, each at least 1, got "
                f"{hidden}."
            )
        self.condition_shape = condition_shape("BlockAutoregressive", condition_dim)
        sizes = [dim, *(dim * width for width in hidden), dim]
        keys = jax.random.split(key, len(sizes) - 1)
        self.weights = tuple(
            jax.random.normal(k, (n, m)) / n**0.5
            for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
        )
        self.log_norms = tuple(jnp.zeros((m,)) for m in sizes[1:])
        # The first layer's steps are spread over the bulk of a standard normal.
        spread = jnp.tile(jnp.linspace(-2.0, 2.0, hidden[0] + 2)[1:-1], dim)
        self.biases = (spread, *(jnp.zeros((m,)) for m in sizes[2:]))
        self.context = None if condition_dim is None else jnp.zeros((condition_dim, sizes[1]))
        self.gate = jnp.full((dim,), math.log(0.1 / 0.9))
        self.shape = (dim,)

    def _matrices(self) -> list[Array]:
        """The weight matrices, masked, positive on the diagonal blocks and normalised."""
        (dim,) = self.shape
        matrices = []
        for weight, log_norm in zip(self.weights, self.log_norms, strict=True):
            rows, columns = (np.arange(n) // (n // dim) for n in weight.shape)
            rows, columns = rows[:, None], columns[None, :]
            matrix = jnp.where(
                rows == columns, jnp.exp(weight), jnp.where(rows < columns, weight, 0)
            )
            norm = jnp.linalg.norm(matrix, axis=0, keepdims=True)
            matrices.append(matrix * (jnp.exp(log_norm)[None] / norm))
        return matrices

    def _diagonals(self, matrices: list[Array]) -> list[Array]:
        """The diagonal blocks, shape `(dim, inputs, outputs)`."""
        (dim,) = self.shape
        blocks = [m.reshape(dim, m.shape[0] // dim, dim, -1) for m in matrices]
        return [jnp.moveaxis(jnp.diagonal(b, axis1=0, axis2=2), -1, 0) for b in blocks]

    def _offsets(self, condition: Array | None) -> list[Array]:
        first, *rest = self.biases
        if condition is not None and self.context is not None:
            first = first + condition @ self.context
        return [first, *rest]

    def _transform(self, x: Array, condition: Array | None) -> tuple[Array, Array]:
        """The map and the logarithms of the diagonal of its Jacobian."""
        (dim,) = self.shape
        matrices = self._matrices()
        log_slope = jnp.zeros_like(x, shape=(dim, 1))
        units = x
        layers = zip(matrices, self._diagonals(matrices), self._offsets(condition), strict=True)
        for layer, (matrix, diagonal, offset) in enumerate(layers):
            if layer > 0:
                log_slope = log_slope + _log_tanh_slope(units).reshape(dim, -1)
                units = jnp.tanh(units)
            units = units @ matrix + offset
            log_slope = jax.vmap(_log_product)(log_slope, diagonal)
        keep, mix = jax.nn.log_sigmoid(-self.gate), jax.nn.log_sigmoid(self.gate)
        y = jnp.exp(keep) * x + jnp.exp(mix) * units
        return y, jnp.logaddexp(keep, mix + log_slope[:, 0])

    def _solve(self, y: Array, condition: Array | None) -> tuple[Array, Array]:
        """Coordinate by coordinate, the units of those done are kept; then one pass for the log-det."""
        (dim,) = self.shape
        matrices = self._matrices()
        columns = [jnp.moveaxis(m.reshape(m.shape[0], dim, -1), 1, 0) for m in matrices]
        biases = [b.reshape(dim, -1) for b in self._offsets(condition)]

        def step(buffers, inputs):
            i, y_i, gate, columns, biases, diagonals = inputs
            pairs = zip(buffers, columns, biases, strict=True)
            offsets = [units @ column + bias for units, column, bias in pairs]
            mix, keep = jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate)
            reach = mix * (jnp.sum(jnp.abs(diagonals[-1])) + jnp.abs(offsets[-1][0]))
            args = (diagonals, offsets, gate)
            lower, upper = (y_i - reach) / keep, (y_i + reach) / keep
            x_i = monotone_root(_scalar, args, y_i, lower, upper)
            units, done = x_i[None], []
            for layer, buffer in enumerate(buffers):
                start = (i * units.shape[0],)
                done.append(jax.lax.dynamic_update_slice(buffer, units, start))
                units = jnp.tanh(units @ diagonals[layer] + offsets[layer])
            return done, x_i

        dtype, like = y.dtype, jnp.result_type(y, *matrices, *biases)
        y = y.astype(like)
        buffers = [jnp.zeros_like(y, shape=m.shape[:1]) for m in matrices]
        inputs = (jnp.arange(dim), y, self.gate.astype(like), columns, biases)
        x = jax.lax.scan(step, buffers, (*inputs, self._diagonals(matrices)))[1]
        return x.astype(dtype), jnp.sum(self._transform(x, condition)[1]).astype(dtype)

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One pass of the network."""
        y, log_slope = self._transform(x, condition)
        return y, jnp.sum(log_slope)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One monotone equation a coordinate, then one pass at the solution."""
        x, log_det = triangular_root(
            lambda x: self._transform(x, condition), lambda y: self._solve(y, condition), y
        )
        return x, -log_det

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""$J^\top s_y = s - \nabla\log|\det J|$ by sweeps."""
        (y, log_slope), pull = jax.vjp(lambda x: self._transform(x, condition), x)
        slope = jnp.exp(log_slope)
        rest = score - pull((jnp.zeros_like(y), jnp.ones_like(log_slope)))[0]

        def update(score_y):
            return score_y + (rest - pull((score_y, jnp.zeros_like(log_slope)))[0]) / slope

        return y, jnp.sum(log_slope), triangular_fixed_point(update, rest / slope)
