r"""The coefficient of `gradient="auto"`.

The path gradient g + c is the total gradient g and a control variate c of mean zero, so that
$g + \lambda c$ is unbiased for every $\lambda$ that does not depend on the draws behind g and c. The
variance is least at $\lambda^* = -\mathrm{tr}\,\mathrm{Cov}(g, c) / \mathrm{tr}\,\mathrm{Var}(c)$, which
is estimated from other draws: $\mathbb{E}[\lambda c] = \mathbb{E}[\lambda]\,\mathbb{E}[c] = 0$.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import combine, partition

_BLOCKS = 8
_LARGEST = 4.0  # a coefficient beyond this is an accident of a few draws


def share_of(covariance: Array, variance: Array) -> Array:
    r"""$-\mathrm{covariance}/\mathrm{variance}$ within bounds; path where nothing is known."""
    known = variance > 0
    share = -covariance / jnp.where(known, variance, 1.0)
    return jnp.where(known, jnp.clip(share, -_LARGEST, _LARGEST), 1.0)


def moments(total: Any, path: Any) -> tuple[Array, Array]:
    """tr Cov(total, path - total) and tr Var(path - total) of gradients along the leading axis.

    Both are centred, although the mean of the difference is known to be zero: their ratio is then
    exact, whatever the number of gradients, where total or path has no variance.
    """

    def one(g: Array, p: Array) -> tuple[Array, Array]:
        g, c = (x - x.mean(axis=0, keepdims=True) for x in (g, p - g))
        return jnp.sum(g * c) / (len(g) - 1), jnp.sum(c**2) / (len(g) - 1)

    pairs = [one(g, p) for g, p in zip(jax.tree.leaves(total), jax.tree.leaves(path), strict=True)]
    zero = jnp.zeros(())
    return sum((a for a, _ in pairs), zero), sum((b for _, b in pairs), zero)


def cross_fitted(one: Callable[..., Array], keys: Any, args: Any) -> Array:
    """A coefficient per sample, made of the gradients of the other blocks of samples.

    Args:
        one: `(key, mix, args) -> value` of one sample.
        keys: one per sample.
        args: of the objective, behind `stop_gradient`.

    Returns:
        Shape (samples,), without derivative; 1, the path gradient, where `args` has no array to
        differentiate or there are too few samples.
    """
    n = keys.shape[0]
    blocks = max(size for size in range(1, _BLOCKS + 1) if n % size == 0)
    trained, static = partition(args)
    if blocks < 3 or not jax.tree.leaves(trained):
        return jnp.ones((n,))

    def gradient(block: Any, mix: float) -> Any:
        def value(trained):
            taken = combine(trained, static)
            return jnp.mean(jax.vmap(lambda key: one(key, mix, taken))(block))

        return jax.grad(value)(trained)

    groups = keys.reshape(blocks, n // blocks)
    total = jax.vmap(lambda block: gradient(block, 0.0))(groups)
    path = jax.vmap(lambda block: gradient(block, 1.0))(groups)
    others = jnp.asarray([[j for j in range(blocks) if j != i] for i in range(blocks)])

    def without(rows: Array) -> Array:
        pick = lambda tree: jax.tree.map(lambda leaf: leaf[rows], tree)
        return share_of(*moments(pick(total), pick(path)))

    shares = jax.lax.stop_gradient(jax.vmap(without)(others))
    return jnp.repeat(shares, n // blocks)
