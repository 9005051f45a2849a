"""Keys made on the host: JAX compiles each of these operations by itself, with all optimisations."""

import functools as ft

import jax
from jaxtyping import PRNGKeyArray

from vflow._core._compile import jit_once

_MANY = 256  # results from which on a program of its own takes longer to compile


@ft.cache
def _splitter(num: int):
    return jit_once(lambda key: tuple(jax.random.split(key, num)))


@ft.cache
def _folder():
    return jit_once(jax.random.fold_in)


def split(key: PRNGKeyArray, num: int) -> tuple[PRNGKeyArray, ...]:
    """The keys of `jax.random.split`."""
    if num > _MANY:
        return tuple(jax.random.split(key, num))
    return _splitter(num)(key)


def fold_in(key: PRNGKeyArray, data: int) -> PRNGKeyArray:
    """`jax.random.fold_in`."""
    return _folder()(key, data)
