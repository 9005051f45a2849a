"""Maximise any estimate over any parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Estimate, FitError, combine, partition
from vflow.distributions._sampling import as_key
from vflow.fit._checks import check_callable, check_count, check_optimizer
from vflow.fit._loop import Ascent, Progress
from vflow.fit._minibatch import check_data, take_rows
from vflow.fit._mixing import mixed, uses_auto
from vflow.programs._frame import mixing

_FRESH = 256  # fresh evaluations behind the final value


class Maximum(NamedTuple):
    """What `vf.maximize` found.

    Attributes:
        params: the parameters, in the structure they came in.
        value: the objective there, evaluated afresh, with its standard error.
        history: the estimate at every step, shape (steps,); NaN where a step was skipped.
    """

    params: Any
    value: Estimate
    history: np.ndarray


def maximize(
    key: PRNGKeyArray,
    estimate: Callable[..., Array],
    params: Any,
    num_steps: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
    *,
    data: Any = None,
    batch: int | None = None,
    progress: bool = False,
    callback: Callable[[Progress], Any] | None = None,
) -> Maximum:
    r"""Maximise $E_k[S(k, \theta)]$ over the trainable leaves of $\theta$ by stochastic ascent.

    $\theta_{t+1} = \theta_t + \eta_t\,\nabla_\theta S(k_t, \theta_t)$ with fresh keys; every
    estimate made by `vf.expect` has an unbiased gradient, so the usual conditions for
    convergence to a stationary point hold.

    With `data`, the estimate is $S(k, \theta, \text{rows})$ of `batch` rows, drawn afresh for every
    step without replacement. The objective is then its mean over minibatches: for a mean over rows
    that is the mean over all n of them, and for $n/\text{batch}$ times a sum over rows it is the
    sum over all of them, so that value and gradient stay unbiased. A function of the rows that is
    not linear in their terms has no such rule.

    Args:
        key: PRNG key; step t uses one folded from it.
        estimate: `S(key, params) -> scalar`, as `vf.expect` returns it; `S(key, params, rows)` with
            `data`.
        params: a module or any pytree; its floating-point leaves outside `Frozen` are trained.
        num_steps: number of steps.
        optimizer: an optax transformation; Adam with cosine decay from 1e-2 by default.
        data: a pytree of arrays with the rows along their leading axis; the estimate gets it, or
            the rows of a minibatch, in the same structure.
        batch: number of rows a step sees; all by default.
        progress: whether to show a progress bar.
        callback: called with a `Progress` after every chunk of steps; a true value stops.

    Returns:
        A `Maximum`: `params`, `value` (on 256 fresh keys, with minibatches of their own) and
        `history`.

    Raises:
        FitError: value or gradient stay non-finite.
        TypeError, ValueError: an argument is of the wrong kind; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, vflow as vf
        >>> def objective(loc):
        ...     return -(vf.sample("x", dist.Normal(loc, 1.0)) - 3.0) ** 2
        >>> result = vf.maximize(jax.random.key(0), vf.expect(objective, 64), jnp.zeros(()), 2000)
        >>> print(abs(float(result.params) - 3.0) < 0.1, round(float(result.value)))
        True -1
    """
    key = as_key(key)
    check_callable("maximize", "estimate", estimate)
    num_steps = check_count("maximize", "num_steps", num_steps)
    optimizer = check_optimizer("maximize", optimizer)
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps, alpha=0.01))
    params = jax.tree.map(lambda x: jax.numpy.asarray(x) if isinstance(x, float) else x, params)
    trainable, static = partition(params)
    if not jax.tree.leaves(trainable):
        raise ValueError(
            "maximize: params has no trainable leaf: floating-point arrays are needed."
        )

    inputs, rows = (), 0
    if data is not None or batch is not None:
        data, rows = check_data("maximize", data, batch)
        inputs = (data,)

    def objective(trainable, key, *inputs):
        params = combine(trainable, static)
        if not inputs:
            return estimate(key, params)
        key, key_rows = jax.random.split(key)
        return estimate(key, params, take_rows(key_rows, inputs[0], rows))

    def value_and_grad(key, trainable, *inputs):
        return jax.value_and_grad(objective)(trainable, key, *inputs)

    @jax.jit
    def evaluate(trainable, keys, inputs):
        with mixing(1.0):  # no coefficient has a part in the value
            return jax.lax.map(lambda key: objective(trainable, key, *inputs), keys)

    train_key, fresh_key = jax.random.split(key)
    if uses_auto(lambda: objective(trainable, train_key, *inputs)):
        rule = mixed(optimizer)
    else:
        rule = optimizer
    outcome = Ascent(value_and_grad, rule).run(
        train_key,
        trainable,
        num_steps,
        inputs=inputs,
        progress=progress,
        callback=callback,
        label="maximize",
    )
    fresh = evaluate(outcome.params, jax.random.split(fresh_key, _FRESH), inputs)
    fresh = np.asarray(fresh, np.float64)
    if not np.isfinite(fresh).all():
        raise FitError(
            f"maximize: the estimate is not finite at the end in {int((~np.isfinite(fresh)).sum())} "
            f"of {_FRESH} fresh evaluations; lower the learning rate.",
            step=len(outcome.values),
            last_good=combine(outcome.params, static),
        )
    value = Estimate(float(fresh.mean()), float(fresh.std(ddof=1) / math.sqrt(_FRESH)))
    return Maximum(combine(outcome.params, static), value, outcome.values)
