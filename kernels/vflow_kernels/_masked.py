"""The inverse of an autoregressive map whose conditioner is a masked network."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def _slots(ranks: np.ndarray, dim: int) -> np.ndarray:
    """Units by rank, one row for each of -1 to dim - 2, filled up with the number of units."""
    rows = [np.flatnonzero(ranks == rank) for rank in range(-1, dim - 1)]
    width = max(len(row) for row in rows)
    return np.stack([np.pad(r, (0, width - len(r)), constant_values=len(ranks)) for r in rows])


def masked_autoregressive_inverse(
    invert: Callable[[Float[Array, ""], Float[Array, " p"]], tuple[Array, Array]],
    y: Float[Array, " d"],
    context: Float[Array, " c"],
    weights: Sequence[Float[Array, "..."]],
    biases: Sequence[Float[Array, "..."]],
    hidden_ranks: Sequence[Int[np.ndarray, "..."]],
    activation: Callable[[Array], Array],
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    r"""The $x$ with $\tau(x_i; \phi_i(x_{<i}, c)) = y_i$, the $\phi$ from a masked network.

    One coordinate after the other, as it must be, but no unit is evaluated twice: when $x_{i-1}$ is
    known, the units of rank i - 1 are, layer by layer, and with them $\phi_i$. So the d steps
    together cost the flops of about one pass of the network, not of d.

    Args:
        invert: $(y_i, \phi_i) \mapsto (x_i, \log|\partial x_i/\partial y_i|)$, scalars.
        y: where to invert; coordinate i has rank i.
        context: $c$, further inputs that every unit may see; may be empty.
        weights: masked weights: the first takes `(*context, *x)`, the last gives the p parameters
            of all coordinates, shape `(width, p, d)`.
        biases: their biases, the last of shape `(p, d)`.
        hidden_ranks: the ranks of each hidden layer's units, from -1 to d - 2.
        activation: between the layers.

    Returns:
        `(x, log_det)`: x of shape `(d,)`, and the sum of what `invert` returned beside its coordinates.

    Example:
        >>> import jax.numpy as jnp
        >>> from vflow_kernels import masked_autoregressive_inverse
        >>> weight = jnp.array([[0.0, 1.0], [0.0, 0.0]])[:, None]  # phi_2 = x_1
        >>> shift = lambda y, params: (y - params[0], 0 * y)
        >>> none = jnp.zeros(0)
        >>> bias = jnp.zeros((1, 2))
        >>> print(masked_autoregressive_inverse(
        ...     shift, jnp.ones(2), none, [weight], [bias], [], jnp.tanh)[0])
        [1. 0.]
    """
    dim, num_context = y.shape[0], context.shape[0]
    dtype = jnp.result_type(y, context, *weights, *biases)
    y, context = y.astype(dtype), context.astype(dtype)
    slots = [_slots(ranks, dim) for ranks in hidden_ranks]

    def by_step(weight, rows, columns=None):
        """Rows in the order of the buffer, columns split by step, padding zero."""
        if rows is not None:
            weight = weight.at[rows.reshape(-1)].get(mode="fill", fill_value=0)
        if columns is not None:
            weight = weight.at[..., columns].get(mode="fill", fill_value=0)  # (rows, step, slot)
        return weight

    layers = []
    rows = None
    for weight, bias, columns in zip(weights[:-1], biases[:-1], slots, strict=True):
        blocks = jnp.moveaxis(by_step(weight, rows, columns), 1, 0)
        layers.append((blocks, by_step(bias, None, columns)))
        rows = columns
    last = jnp.moveaxis(by_step(weights[-1], rows), -1, 0), jnp.moveaxis(biases[-1], -1, 0)

    def step(carry, inputs):
        i, y_i, layers, (weight, bias) = inputs
        log_det, known, *hidden = carry
        units = known
        done = []
        for buffer, (block, offset) in zip(hidden, layers, strict=True):
            new = activation(units @ block + offset)
            units = jax.lax.dynamic_update_slice(buffer, new, (i * new.shape[0],))
            done.append(units)
        x_i, log_slope = invert(y_i, units @ weight + bias)
        known = jax.lax.dynamic_update_slice(known, x_i[None], (num_context + i,))
        return (log_det + log_slope, known, *done), x_i

    known = jnp.concatenate([context, jnp.zeros_like(y)])
    hidden = [jnp.zeros_like(y, shape=(table.size,)) for table in slots]
    inputs = (jnp.arange(dim), y, layers, last)
    (log_det, *_), x = jax.lax.scan(step, (jnp.zeros_like(y, shape=()), known, *hidden), inputs)
    return x, log_det
