"""Maximum likelihood on weighted draws: a direction of training that covers mass."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core import combine, partition
from vflow.fit._cover import Cover
from vflow.fit._loop import Ascent
from vflow.fit._recipe import default_optimizer
from vflow.targets import Target

_NUM_STEPS = 1000
_NUM_ROWS = 16384
_BATCH = 256
_NUM_WIDE = 32768
_BLOCK = 1024  # draws whose densities are computed at once
_WIDER = (
    1.2  # over the root of the dimension: the weights of a Gaussian keep a third of their draws
)


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
    return likelihood_ascent(flow, jnp.asarray(cover.resample(rng, _NUM_ROWS), dtype), key)


def reweighed(flow: Any, target: Target, key: PRNGKeyArray) -> Any:
    r"""The flow after stochastic ascent of $E_{x \sim p}[\log q_\theta(x)]$ over draws of its own.

    The draws come from the flow with a base $1 + 1.2/\sqrt d$ times as wide, which reaches where
    weights are large, and are resampled by their importance weights. What holds a thousandth of the
    mass, as an exponential tail does, moves the reverse KL divergence by next to nothing, but not
    this one.

    Args:
        flow: the flow, near the target but for its tails; with a base that may be scaled.
        target: the log density.
        key: PRNG key.
    """
    (dim,) = flow.shape
    scale = 1 + _WIDER / math.sqrt(dim)

    @jax.jit
    def draw(keys):
        def one(key):
            z = flow.base.sample(key)
            x, log_det = flow.bijection.forward_and_log_det(scale * z)
            return x, target.log_prob(x) + log_det - flow.base.log_prob(z)

        return jax.lax.map(one, keys, batch_size=_BLOCK)

    key_draw, key_ascent = jax.random.split(key)
    x, log_w = draw(jax.random.split(key_draw, _NUM_WIDE))
    log_w = np.where(np.isfinite(log_w), np.asarray(log_w, np.float64), -np.inf)
    weights = np.exp(log_w - log_w.max())
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    rows = x[rng.choice(_NUM_WIDE, _NUM_ROWS, p=weights / weights.sum())]
    return likelihood_ascent(flow, rows, key_ascent)


def likelihood_ascent(flow: Any, rows: Any, key: PRNGKeyArray) -> Any:
    """The flow trained on rows; as it is where it has no density at given points."""
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
