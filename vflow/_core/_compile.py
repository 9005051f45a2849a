"""How programs are compiled: most of what a small fit costs is compilation."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

# On CPUs, for the step of a coupling flow: level 1 compiles in 0.6 of the time and runs as fast; XLA's
# older emitters compile in 0.4 to 0.65 of what is left and run it 1.2 to 1.4 times as long; level 0
# besides in a third of that, and runs it six times as long.
_LONG = {"xla_backend_optimization_level": 1}
_SHORT = _LONG | {"xla_cpu_use_fusion_emitters": False}
_ONCE = _SHORT | {"xla_backend_optimization_level": 0}


@ft.cache
def _knows(name: str, value: Any) -> bool:
    """Whether this XLA has an option."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _options(options: dict[str, Any]) -> dict[str, Any] | None:
    if jax.default_backend() != "cpu":
        return None
    return {name: value for name, value in options.items() if _knows(name, value)}


def jit_long(function: Callable) -> Callable:
    """`jax.jit` for what runs for long."""
    return jax.jit(function, compiler_options=_options(_LONG))


def jit(function: Callable) -> Callable:
    """`jax.jit` for what runs often, seconds in all."""
    return jax.jit(function, compiler_options=_options(_SHORT))


def jit_once(function: Callable) -> Callable:
    """`jax.jit` for what runs seldom, or does little."""
    return jax.jit(function, compiler_options=_options(_ONCE))


def filter_jit_long(function: Callable) -> Callable:
    """`eqx.filter_jit` for what runs for long."""
    return eqx.filter_jit(function, compiler_options=_options(_LONG))  # pyright: ignore[reportCallIssue]


def filter_jit(function: Callable) -> Callable:
    """`eqx.filter_jit` for what runs often, seconds in all."""
    return eqx.filter_jit(function, compiler_options=_options(_SHORT))  # pyright: ignore[reportCallIssue]


def filter_jit_once(function: Callable) -> Callable:
    """`eqx.filter_jit` for what runs seldom, or does little."""
    return eqx.filter_jit(function, compiler_options=_options(_ONCE))  # pyright: ignore[reportCallIssue]
