"""The small multilayer perceptron that conditions the layers of a flow."""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from vflow_kernels._filled import filled, materialised


@jax.custom_jvp
def _tanh(x: Array) -> Array:
    """`jnp.tanh`, its derivative as one factor, which is all that a pull-back reads (there two).

    The factor is halved and the tangent doubled, which is exact: on a CPU, XLA takes six times as long
    for a lone product of two matrices, 0.3 ns an element, as for one fused with a constant factor.
    """
    return jnp.tanh(x)


@_tanh.defjvp
def _tanh_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y = _tanh(*primals)
    return y, 2 * tangents[0] * (0.5 * (1 - y) * (1 + y))


@jax.custom_jvp
def _silu(x: Array) -> Array:
    """`jax.nn.silu`, its derivative as one factor as well (there it has three); halved as above."""
    return x * jax.lax.logistic(x)


@_silu.defjvp
def _silu_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    rate = jax.lax.logistic(primals[0])
    y = primals[0] * rate
    return y, 2 * tangents[0] * (0.5 * (rate + y * (1 - rate)))


@jax.custom_jvp
def _relu(x: Array) -> Array:
    """`jax.nn.relu`, its derivative a factor as well.

    There it is a choice between the tangent and zeros, which `jax.vmap` brings into the order of the
    point: a copy in memory of each layer's mask where a batch is the last axis (`MLP.rows`).
    """
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y = _relu(*primals)
    return y, tangents[0] * (y > 0).astype(y.dtype)


_ACTIVATIONS = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu": _relu,
    "silu": _silu,
    "softplus": jax.nn.softplus,
    "tanh": _tanh,
}


def _affine_map(x: Array, weight: Array, bias: Array, one: Array) -> Array:
    """`x @ weight + bias` for `MLP.rows`; `one` is what its name says, of shape (1,), with the batch of x.

    With the weights first, `jax.vmap` leaves a batch last. A sum with a lone vector would put it first
    again, so the bias gets a batch too, by a product that XLA merges with the sum.
    """
    first = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(weight, x, first) + jax.lax.dot_general(bias[None], one, first)


# On a CPU, XLA's code for elementwise work on rows of fewer numbers takes six times as long an element.
_WIDE = 48
_MANY = 128  # outputs, from which on it takes longer to bring them into the order of the point


class MLP(eqx.Module):
    r"""Affine maps $h W + b$ with an activation between them, the last one linear.

    Hidden weights are uniform with variance $1/\text{fan-in}$, biases zero; the last layer is zero,
    so that a layer conditioned by a fresh network starts at the identity. The activation is kept by
    name, not as a function: a network is arrays and strings only, and can be written to a file.

    Args:
        key: PRNG key.
        in_size: number of inputs; 0 is allowed (the output is then constant).
        out_size: number of outputs.
        hidden: widths of the hidden layers; () gives an affine map.
        activation: "silu", "tanh", "relu", "leaky_relu", "gelu", "elu" or "softplus".
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        in_size: int,
        out_size: int,
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "silu",
    ):
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(sorted(_ACTIVATIONS))}, got {activation!r}."
            )
        hidden = tuple(hidden)
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden must hold widths of at least 1, got {hidden}.")
        sizes = (in_size, *hidden, out_size)
        keys = jax.random.split(key, len(hidden)) if hidden else ()
        weights = [
            jax.random.uniform(k, (n, m), minval=-1.0, maxval=1.0) * (3.0 / max(n, 1)) ** 0.5
            for k, (n, m) in zip(keys, pairwise(sizes[:-1]), strict=True)
        ]
        self.weights = (*weights, jnp.zeros((sizes[-2], out_size)))
        self.biases = tuple(jnp.zeros((m,)) for m in sizes[1:])
        self.activation = activation

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, " out_size"]:
        """The outputs at one input vector; batching is `jax.vmap`."""
        activation = _ACTIVATIONS[self.activation]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = activation(x @ weight + materialised(bias))
        return x @ self.weights[-1] + materialised(self.biases[-1])

    def rows(self, x: Float[Array, " in_size"], num_rows: int) -> tuple[Array, ...]:
        """The outputs in equal parts; of a batch, with the batch the last axis in memory if that pays.

        It does where the hidden layers are narrow and the outputs few, and where what reads these is
        light and leaves the batch last as well: not before a spline.
        """
        *hidden, last = self.biases
        if last.size > _MANY or any(bias.size >= _WIDE for bias in hidden):
            out = self(x)
        else:
            activation = _ACTIVATIONS[self.activation]
            one = filled(x[:1], 1.0) if x.size else jnp.ones_like(x, shape=(1,))
            for weight, bias in zip(self.weights[:-1], hidden, strict=True):
                x = activation(_affine_map(x, weight, bias, one))
            out = _affine_map(x, self.weights[-1], last, one)
        return tuple(jax.lax.split(out, (out.size // num_rows,) * num_rows))
