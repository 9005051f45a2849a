"""Draws from a fitted flow with their importance weights, in batches of one size."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core._compile import filter_jit
from vflow._core._keys import split
from vflow.distributions import AbstractDistribution
from vflow.fit._dtype import cast, scope
from vflow.fit._mesh import Layout
from vflow.targets import Target

# One batch size everywhere: one compilation serves the verdict, `sample` and `resample`.
BATCH = 4096
# The model runs on this many at once: memory grows with it times the number of data rows.
_BLOCK = 512
_NUMBERS = 1 << 22  # in the draws of a batch


def extra(flow: Any, target: Target) -> dict[str, Any]:
    """What a draw from `flow` takes beside the key: the target, if the family depends on it."""
    return {} if isinstance(flow, AbstractDistribution) else {"log_density": target.log_prob}


def batch_of(dim: int) -> int:
    """Draws at once: `BATCH`, and fewer, a power of two, above 1024 dimensions."""
    return min(BATCH, 1 << max(5, (_NUMBERS // dim).bit_length() - 1))


class Drawer:
    """Draws from flows over one target; compiled once for each structure of flow.

    Args:
        target: the unconstrained log density.
        dtype: "float32" or "float64", the type the densities are computed in.
        layout: where draws and data live; on one device by default.
    """

    def __init__(self, target: Target, dtype: str, layout: Layout | None = None):
        self.dtype, self.batch = dtype, batch_of(target.dim)
        batch, block = self.batch, min(_BLOCK, self.batch)
        layout = Layout(None, target, 1) if layout is None else layout
        with scope(dtype):
            self._inputs = layout.inputs(dtype)

        @filter_jit
        def weighted(flow: Any, key: PRNGKeyArray, inputs: tuple[Any, ...]):
            bound = layout.bound(target, inputs)
            keys = layout.spread(jax.random.split(key, batch))
            x, log_q = jax.vmap(lambda key: flow.sample_and_log_prob(key, **extra(flow, bound)))(
                keys
            )
            blocks = layout.spread(x.reshape(-1, block, *x.shape[1:]), axis=1)
            log_p = jax.lax.map(jax.vmap(bound.log_prob), blocks).reshape(-1)
            return layout.replicated((x, log_p - log_q))

        @filter_jit
        def plain(flow: Any, key: PRNGKeyArray):
            keys = layout.spread(jax.random.split(key, batch))
            x = jax.vmap(lambda key: flow.sample(key, **extra(flow, target)))(keys)
            return layout.replicated(x)

        self._weighted: Callable = weighted
        self._plain: Callable = plain
        self._constrain: Callable = eqx.filter_jit(
            lambda x: jax.lax.map(target.constrain, x, batch_size=_BLOCK)
        )

    def weighted(self, flow: Any, key: PRNGKeyArray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """`n` draws, shape (n, dim), and their log weights log p - log q, shape (n,), on the host."""
        with scope(self.dtype):
            flow = cast(flow, self.dtype)
            keys = split(key, -(-n // self.batch))
            parts = [self._weighted(flow, k, self._inputs) for k in keys]
            x, log_w = (np.concatenate([np.asarray(p[i]) for p in parts])[:n] for i in range(2))
        return x, log_w

    def plain(self, flow: Any, key: PRNGKeyArray, n: int) -> np.ndarray:
        """`n` draws on the unconstrained space, shape (n, dim), on the host."""
        with scope(self.dtype):
            flow = cast(flow, self.dtype)
            parts = [self._plain(flow, k) for k in split(key, -(-n // self.batch))]
            return np.concatenate([np.asarray(p) for p in parts])[:n]

    def constrain(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Named constrained values of unconstrained points (n, dim): site -> (n, *shape)."""
        n = len(x)
        with scope(self.dtype):
            parts = []
            for start in range(0, n, BATCH):
                block = x[start : start + BATCH]
                pad = np.broadcast_to(block[-1:], (BATCH - len(block), *block.shape[1:]))
                full = jax.numpy.asarray(np.concatenate([block, pad]), self.dtype)
                parts.append(jax.tree.map(np.asarray, self._constrain(full)))
            joined = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)
        return joined
