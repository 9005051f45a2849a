"""Gradient ascent with the mixture of path and total gradient: the state of its coefficient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from vflow.programs._frame import mixing
from vflow.programs._mixing import moments, share_of

_PERIOD = 50  # steps between two measurements of the coefficient
_EARLY = 10  # the same in the first _START steps, where it changes fast
_START = 200
_KEEP = 0.8  # how much of the running average a measurement leaves


class Mixed(NamedTuple):
    """An optimizer whose state carries the average that makes the coefficient, too."""

    init: Callable[[Any], Any]
    update: Callable[..., Any]


def mixed(optimizer: optax.GradientTransformation) -> Mixed:
    """`optimizer` for an estimate with `gradient="auto"`."""

    def init(params):
        zero = jnp.zeros(())
        return optimizer.init(params), (zero, zero)

    return Mixed(init, optimizer.update)


def uses_auto(estimate: Callable[[], Any]) -> bool:
    """Whether an estimate asks for a coefficient; it is traced, not computed."""
    with mixing(1.0) as found:
        jax.eval_shape(estimate)
    return found.used


def measured(
    value_and_grad: Callable[..., Any], key: Any, index: Array, params: Any, inputs: tuple, old: Any
) -> tuple[Array, Array]:
    """The running average, now and then with a measurement on two minibatches of their own.

    It is one of ratios, not of moments: those of the noisy first steps would outweigh later ones.
    """

    def measure():
        keys = jax.random.split(jax.random.fold_in(key, 1), 2)

        def gradient(key, share):
            with mixing(share):
                return value_and_grad(key, params, *inputs)[1]

        both = jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(keys, jnp.array([0.0, 1.0]))
        total, path = (jax.tree.map(lambda leaf, i=i: leaf[:, i], both) for i in (0, 1))
        covariance, variance = moments(total, path)
        share = share_of(covariance, variance)
        sound = jnp.isfinite(share) & (variance > 0)
        fresh = (-share, jnp.ones_like(share))
        return tuple(
            jnp.where(sound, _KEEP * a + (1 - _KEEP) * b.astype(a.dtype), a)
            for a, b in zip(old, fresh, strict=True)
        )

    early = (index < _START) & (index % _EARLY == 0)
    return jax.lax.cond(early | (index % _PERIOD == 0), measure, lambda: old)


def at_share(value_and_grad: Callable[..., Any], average: Any, *args: Any) -> Any:
    """`value_and_grad(*args)` with the coefficient that the running average makes."""
    with mixing(share_of(*average)):
        return value_and_grad(*args)
