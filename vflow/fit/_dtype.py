"""Which float type a fit computes in, and how it crosses into the caller's."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def scope(dtype: str) -> contextlib.AbstractContextManager:
    """Inside, new floats are float64 if `dtype` is "float64"; else nothing changes."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def default_dtype() -> str:
    """JAX's default float type here, "float32" or "float64"."""
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return "float64" if x64 else "float32"


def cast(tree: Any, dtype: str) -> Any:
    """The tree with every floating-point array in `dtype`; other leaves unchanged.

    Outside `scope("float64")` arrays of float64 cannot be made without x64, so cast to float32
    there and to float64 inside.
    """

    def leaf(x):
        if eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(np.asarray(x), dtype)
        return x

    return jax.tree.map(leaf, tree)
