"""A first phase that covers mass: maximum likelihood on draws that cover the target."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core import combine, partition
from vflow.fit._cover import Cover
from vflow.fit._loop import Ascent
from vflow.fit._recipe import default_optimizer

_NUM_STEPS = 1000
_NUM_ROWS = 16384
_BATCH = 256


def warm_start(flow: Any, cover: Cover, key: PRNGKeyArray, dtype: str) -> Any:
    r"""The flow after stochastic ascent of $E_{x \sim p}[\log q_\theta(x)]$.

    The reverse KL divergence climbs from mass that the flow has; this direction makes it
    have all that the draws have. A flow without a density at given points is returned as it is.

    Args:
        flow: the flow, in `dtype`.
        cover: weighted draws of the target.
        key: PRNG key.
        dtype: "float32" or "float64".
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    rows = jax.numpy.asarray(cover.resample(rng, _NUM_ROWS), dtype)
    trainable, static = partition(flow)

    def log_likelihood(trainable, key, rows):
        batch = rows[jax.random.randint(key, (_BATCH,), 0, len(rows))]
        return jax.vmap(combine(trainable, static).log_prob)(batch).mean()

    def value_and_grad(key, trainable, rows):
        return jax.value_and_grad(log_likelihood)(trainable, key, rows)

    try:
        eqx.filter_eval_shape(value_and_grad, key, trainable, rows)
    except NotImplementedError:  # no inverse
        return flow
    outcome = Ascent(value_and_grad, default_optimizer(_NUM_STEPS)).run(
        key, trainable, _NUM_STEPS, inputs=(rows,)
    )
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt
    return combine(outcome.params, static)
