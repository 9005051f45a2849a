"""Draws of globals and locals with their weights on all rows; the bound on a minibatch of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow.fit._draws import Drawer
from vflow.fit._dtype import cast, scope
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._local_start import Start
from vflow.fit._mesh import Layout
from vflow.fit._minibatch import draw_rows
from vflow.targets._rows import Rows

_INNER = 16  # draws of each row's locals behind one weight of the globals
_CHUNK = 4096  # rows in memory at once
_PIECES = 1 << 20  # densities in memory at once


def minibatch_bound(rows: Rows, num_samples: int, gradient: str, layout: Layout) -> Callable:
    r"""The ELBO estimated on a minibatch of rows, unbiased in value and gradient.

    $$\log p(g) - \log q(g) + \frac{N}{B} \sum_{i \in b} \left[\log p(l_i, y_i \mid g) - \log q(l_i \mid g)
    - c_i - v_i^\top (g - \mu)\right] + \sum_{i=1}^N \left[c_i + v_i^\top (g - \mu)\right]$$

    The constants $c_i$ and slopes $v_i$ are $\log \hat p(y_i \mid g)$ and its derivative at the
    Gaussian's mean $\mu$: whatever they are, the sums over b and over all rows cancel in expectation.
    What is left varies between minibatches by $1/\sqrt{B}$ instead of $\sqrt{N/B}$ in units of the posterior.

    Returns:
        `S(key, flow, inputs) -> scalar`; `inputs` as `Tables.inputs` makes them.

    Source:
        Baker, Fearnhead, Fox & Nemeth 2019, Control variates for stochastic gradient MCMC (arXiv
        1706.05439), section 3, for the control variate.
    """

    def bound(key: PRNGKeyArray, flow: Any, inputs: dict[str, Any]) -> Array:
        key_rows, key_draws = jax.random.split(key)
        batch = draw_rows(key_rows, rows.size, rows.batch)
        scale = rows.size / rows.batch
        value, slope = inputs["value"][batch], inputs["gradient"][batch].sum(0)
        rest = inputs["total_value"] - scale * value.sum()
        tilt = inputs["total_gradient"] - scale * slope
        shared, local = parts(flow)

        def one(key):
            key_shared, key_local = jax.random.split(key)
            g, log_q = shared.sample_and_log_prob(key_shared, None, gradient)
            each = row_weights(rows, local, key_local, g, batch, inputs["data"], gradient)
            total = rows.global_log_prob(g) - log_q + scale * each.sum()
            return total + rest + tilt @ (g - inputs["mean"])

        keys = layout.spread(jax.random.split(key_draws, num_samples))
        return jnp.mean(jax.vmap(one)(keys))

    return bound


def parts(flow: Any) -> tuple[Any, Locals | None]:
    """The family of the globals, and the conditionals of the locals if there are any."""
    return (flow.shared, flow.local) if isinstance(flow, LocalFlow) else (flow, None)


def row_weights(
    rows: Rows, local: Any, key: PRNGKeyArray, g: Array, batch: Array, data: Any, gradient: str
) -> Array:
    """log p(l, y | g) - log q(l | g) of one draw of the locals of each row of a batch."""
    if local is None:
        none = jnp.zeros_like(g, shape=(0,))
        return jax.vmap(lambda row: rows.row_log_prob(g, none, row, data))(batch)
    eps = jax.random.normal(key, (len(batch), rows.num_locals), g.dtype)

    def one(eps, row):
        own, log_q = local.draw(eps, g, row, path=gradient == "path")
        return rows.row_log_prob(g, own, row, data) - log_q

    return jax.vmap(one)(eps, batch)


class RowDrawer(Drawer):
    r"""Draws and weights on all rows, with the locals of each row resampled among a few.

    A draw of the globals has the weight $p(g) \prod_i \hat Z_i(g) / q(g)$ with $\hat Z_i$ the mean of
    $K$ weights $p(l_i, y_i \mid g) / q(l_i \mid g)$, and each row's locals are one of the $K$ in
    proportion to these: draws are properly weighted for the exact posterior of all coordinates.

    Args:
        rows: the model.
        dtype: "float32" or "float64".
        layout: where draws and data live.
        start: its values are taken off row by row, so that nothing is rounded away.
    """

    def __init__(self, rows: Rows, dtype: str, layout: Layout, start: Start):
        super().__init__(rows.whole, dtype)
        self.rows, self.offset = rows, float(start.value.sum())
        self.inner = _INNER if rows.num_locals else 1
        chunk = min(rows.size, _CHUNK)
        at_once = int(max(1, min(512, _PIECES // (chunk * self.inner))))
        with scope(dtype):
            self.inputs = row_inputs(rows, layout, start, dtype)

        def of_chunk(local, key, g, numbers, inputs):
            known = numbers < rows.size
            batch = jnp.minimum(numbers, rows.size - 1)

            def draw(key):
                own = jnp.zeros_like(g, shape=(len(batch), rows.num_locals))
                if local is None:
                    weights = row_weights(rows, None, key, g, batch, inputs["data"], "total")
                    return own, weights
                eps = jax.random.normal(key, own.shape, g.dtype)
                own, log_q = jax.vmap(lambda e, i: local.draw(e, g, i))(eps, batch)
                log_p = jax.vmap(lambda v, i: rows.row_log_prob(g, v, i, inputs["data"]))(
                    own, batch
                )
                return own, log_p - log_q

            key_draw, key_choose = jax.random.split(key)
            own, log_w = jax.vmap(draw)(jax.random.split(key_draw, self.inner))
            log_w = log_w - inputs["value"][batch][None, :]
            if self.inner == 1:
                return own[0], jnp.where(known, log_w[0], 0.0)
            safe = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
            taken = jax.random.categorical(key_choose, safe, axis=0)
            evidence = jax.nn.logsumexp(log_w, axis=0) - math.log(self.inner)
            own = jnp.take_along_axis(own, taken[None, :, None], axis=0)[0]
            return own, jnp.where(known, evidence, 0.0)

        def draw(flow, key, inputs):
            shared, local = parts(flow)
            key_shared, key_local = jax.random.split(key)
            g, log_q = shared.sample_and_log_prob(key_shared)
            numbers = jnp.arange(-(-rows.size // chunk) * chunk).reshape(-1, chunk)
            keys = jax.random.split(key_local, len(numbers))
            own, each = jax.lax.map(
                lambda both: of_chunk(local, both[0], g, both[1], inputs), (keys, numbers)
            )
            own = own.reshape(numbers.size, rows.num_locals)[: rows.size]
            x = flow.join(g, own) if isinstance(flow, LocalFlow) else g
            return x, rows.global_log_prob(g) - log_q + jnp.sum(each)

        @jax.jit
        def weighted(flow, keys, inputs):
            return layout.replicated(
                jax.lax.map(lambda key: draw(flow, key, inputs), keys, batch_size=at_once)
            )

        @jax.jit
        def by_row(flow, keys, numbers, inputs):
            """Weights of single draws of some rows' locals, given draws of the globals."""
            shared, local = parts(flow)

            def one(key):
                key_shared, key_local = jax.random.split(key)
                g, _ = shared.sample_and_log_prob(key_shared)
                return row_weights(rows, local, key_local, g, numbers, inputs["data"], "total")

            return jax.vmap(one)(keys)

        self._on_rows, self._by_row = weighted, by_row

    def weighted(self, flow: Any, key: PRNGKeyArray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """`n` draws, shape (n, dim), and their log weights, shape (n,), on the host."""
        x, log_w = self._in_batches(lambda f, k: self._on_rows(f, k, self.inputs), flow, key, n)
        return x, np.asarray(log_w, np.float64) + self.offset

    def by_row(self, flow: Any, key: PRNGKeyArray, numbers: np.ndarray, n: int) -> np.ndarray:
        """Log weights, shape (n, rows), of the locals of some rows."""
        run = lambda f, k: (self._by_row(f, k, numbers, self.inputs),)
        return self._in_batches(run, flow, key, n)[0]

    def _in_batches(self, run: Callable, flow: Any, key: PRNGKeyArray, n: int) -> list[np.ndarray]:
        with scope(self.dtype):
            flow = cast(flow, self.dtype)
            out = []
            for k in jax.random.split(key, -(-n // self.batch)):
                out.append([np.asarray(x) for x in run(flow, jax.random.split(k, self.batch))])
            return [np.concatenate(x)[:n] for x in zip(*out, strict=True)]


def row_inputs(rows: Rows, layout: Layout, start: Start, dtype: str) -> dict[str, Any]:
    """The arrays that compiled functions take as arguments: data by row, and the control variate."""
    spread = layout.inputs(dtype)
    data = spread[0] if spread else rows.data
    floats = lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x
    return {
        "data": jax.tree.map(lambda x: jnp.asarray(floats(x)), data),
        "value": jnp.asarray(start.value, dtype),
        "gradient": jnp.asarray(start.gradient, dtype),
        "total_value": jnp.asarray(start.value.sum(), dtype),
        "total_gradient": jnp.asarray(start.gradient.sum(0), dtype),
        "mean": jnp.asarray(start.mean, dtype),
    }
