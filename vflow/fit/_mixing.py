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


class Average(NamedTuple):
    """Running averages of the moments that make the coefficient, in units of `scale`.

    Attributes:
        covariance: of total gradient and control variate.
        variance: of the control variate.
        scale: its recent size: moments of noisy first steps would outweigh those of later ones.
    """

    covariance: Array
    variance: Array
    scale: Array

    def share(self) -> Array:
        """The coefficient."""
        return share_of(self.covariance, self.variance)


class Mixed(NamedTuple):
    """An optimizer whose state carries an `Average`, too."""

    init: Callable[[Any], Any]
    update: Callable[..., Any]


def mixed(optimizer: optax.GradientTransformation) -> Mixed:
    """`optimizer` for an estimate with `gradient="auto"`."""

    def init(params):
        zero = jnp.zeros(())
        return optimizer.init(params), Average(zero, zero, zero)

    return Mixed(init, optimizer.update)


def uses_auto(estimate: Callable[[], Any]) -> bool:
    """Whether an estimate asks for a coefficient; it is traced, not computed."""
    with mixing(1.0) as found:
        jax.eval_shape(estimate)
    return found.used


def measured(
    value_and_grad: Callable[..., Any],
    key: Any,
    index: Array,
    params: Any,
    inputs: tuple,
    old: Average,
) -> Average:
    """The average, now and then with a measurement on two minibatches of their own."""

    def measure():
        keys = jax.random.split(jax.random.fold_in(key, 1), 2)

        def gradient(key, share):
            with mixing(share):
                return value_and_grad(key, params, *inputs)[1]

        both = jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(keys, jnp.array([0.0, 1.0]))
        total, path = (jax.tree.map(lambda leaf, i=i: leaf[:, i], both) for i in (0, 1))
        covariance, variance = (m.astype(old.scale.dtype) for m in moments(total, path))
        scale = jnp.where(old.scale > 0, _KEEP * old.scale + (1 - _KEEP) * variance, variance)
        sound = jnp.isfinite(covariance) & jnp.isfinite(variance) & (scale > 0)
        size = jnp.where(sound, scale, 1.0)
        fresh = Average(covariance / size, variance / size, scale)
        mean = jax.tree.map(lambda a, b: _KEEP * a + (1 - _KEEP) * b, old, fresh)
        mean = mean._replace(scale=scale)
        return jax.tree.map(lambda new, old: jnp.where(sound, new, old), mean, old)

    early = (index < _START) & (index % _EARLY == 0)
    return jax.lax.cond(early | (index % _PERIOD == 0), measure, lambda: old)


def at_share(value_and_grad: Callable[..., Any], average: Average, *args: Any) -> Any:
    """`value_and_grad(*args)` with the coefficient that the average makes."""
    with mixing(average.share()):
        return value_and_grad(*args)
