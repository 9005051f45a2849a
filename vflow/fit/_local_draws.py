"""Draws of globals and locals with their weights on all rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow.fit._draws import Drawer
from vflow.fit._dtype import cast, scope
from vflow.fit._local import LocalFlow
from vflow.fit._local_bound import draw_locals, log_prob_of_rows, parts
from vflow.fit._local_start import Start
from vflow.fit._mesh import Layout
from vflow.targets._rows import Rows

_INNER = 16  # draws of each row's locals behind one weight of the globals
_CHUNK = 4096  # rows in memory at once
_PIECES = 1 << 20  # densities in memory at once


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
                own, log_q = draw_locals(rows, local, key, g, batch)
                return own, log_prob_of_rows(rows, g, own, batch, inputs["data"]) - log_q

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
                own, log_q = draw_locals(rows, local, key_local, g, numbers)
                return log_prob_of_rows(rows, g, own, numbers, inputs["data"]) - log_q

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
