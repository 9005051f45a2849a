"""Rows of data for one step of training."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.fit._checks import check_count


def check_data(owner: str, data: Any, batch: Any) -> tuple[Any, int]:
    """Data as arrays, and how many rows of it a step sees.

    Args:
        owner: the function to name in errors.
        data: a pytree of arrays with the rows along their leading axis.
        batch: number of rows, or None for all of them.

    Raises:
        TypeError, ValueError: the leaves have no common leading axis, or `batch` does not fit it.
    """
    if data is None:
        raise ValueError(f"{owner}: batch={batch!r} needs data=, the arrays to take rows of.")
    data = jax.tree.map(jnp.asarray, data)
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"{owner}: the leaves of data must have the rows along their leading axis, at least "
            f"one and equally many, got shapes {shapes}."
        )
    n = sizes.pop()
    batch = n if batch is None else check_count(owner, "batch", batch)
    if batch > n:
        raise ValueError(f"{owner}: batch={batch} is larger than the {n} rows of data.")
    return data, batch


def take_rows(key: PRNGKeyArray, data: Any, batch: int) -> Any:
    """`batch` rows of each leaf, the same rows everywhere, drawn without replacement."""
    n = jax.tree.leaves(data)[0].shape[0]
    if batch == n:
        return data
    rows = draw_rows(key, n, batch)
    return jax.tree.map(lambda leaf: leaf[rows], data)


def draw_rows(key: PRNGKeyArray, n: int, batch: int) -> Array:
    """`batch` of n rows, every set of them as likely as any other.

    For few of many rows, the first `batch` different ones of twice as many draws with replacement:
    work that does not grow with n. Should they not suffice, all rows are permuted.
    """
    if 4 * batch > n:
        return jax.random.choice(key, n, (batch,), replace=False)
    key, spare = jax.random.split(key)
    draws = jax.random.randint(key, (2 * batch,), 0, n)
    order = jnp.argsort(draws, stable=True)
    ordered = draws[order]
    again = jnp.concatenate([jnp.zeros_like(ordered[:1], bool), ordered[1:] == ordered[:-1]])
    repeated = jnp.zeros_like(again).at[order].set(again)
    first = draws[jnp.argsort(repeated, stable=True)[:batch]]
    return jax.lax.cond(
        jnp.sum(~repeated) >= batch,
        lambda: first,
        lambda: jax.random.choice(spare, n, (batch,), replace=False),
    )
