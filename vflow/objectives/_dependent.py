"""Maximum likelihood for rows that depend on each other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.distributions import RowCorrelated


def dependent_likelihood(data: Array, batch_size: int | None = None) -> Callable[..., Array]:
    r"""The log likelihood of dependent rows, per row: $\frac1n \log p(x_1, \dots, x_n)$.

    Args:
        data: (n, p) rows, in the order of the family's similarity matrix.
        batch_size: number of rows in a minibatch, at least 2, drawn afresh for every key; None
            takes all.

    Returns:
        An estimate `S(key, q) -> scalar` for a `vf.distributions.RowCorrelated` q, to be maximised;
        value and gradient are unbiased over minibatches.

    Raises:
        ValueError: data without rows, or a batch size that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> rows = vf.distributions.RowCorrelated(flow, jnp.eye(6))
        >>> estimate = vf.objectives.dependent_likelihood(jnp.zeros((6, 2)), batch_size=3)
        >>> print(f"{estimate(jax.random.key(1), rows):.4f}")
        -1.8379

    Source: Kirchler, Lippert & Kloft 2023 (arXiv 2209.14933), section 3.
    """
    data = jnp.asarray(data)
    if data.ndim != 2 or data.size == 0:
        raise ValueError(f"data must have the shape (n, p), got {data.shape}.")
    n = len(data)
    if batch_size is not None and (
        isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 2 <= batch_size <= n
    ):
        raise ValueError(f"batch_size must be an integer in [2, {n}], got {batch_size!r}.")

    def estimate(key: PRNGKeyArray, q: Any) -> Array:
        if not isinstance(q, RowCorrelated):
            raise TypeError(
                "dependent_likelihood is for a vf.distributions.RowCorrelated, got "
                f"{type(q).__name__}; use forward_kl for independent rows."
            )
        if batch_size is None:
            return q.log_prob(data) / n
        indices = jax.random.choice(key, n, (batch_size,), replace=False)
        return q.log_prob_batch(data[indices], indices) / n

    return estimate
