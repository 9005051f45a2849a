"""Fit a flow to data by maximum likelihood."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from vflow._core import FitError, combine, partition
from vflow.bijections import Freeze
from vflow.bijections._place_centres import fresh_kernels, place_centres
from vflow.distributions import AbstractDistribution, Flow
from vflow.distributions._sampling import as_key
from vflow.fit._checks import check_callable, check_count, check_optimizer
from vflow.fit._dtype import default_dtype
from vflow.fit._loop import Ascent, Progress
from vflow.fit._minibatch import take_rows
from vflow.fit._recipe import precondition
from vflow.fit._table import Rows, check_rows, split_rows, standardiser, to_standard

_EVERY = 25  # steps between two looks at the validation rows, unless these are very many
_BLOCK = 1024  # rows evaluated at once
_LEARNING_RATE = 1e-3


class DensityFit(NamedTuple):
    """What `vf.fit_density` found. Log densities are means over rows, in nats, in the data's units.

    Attributes:
        flow: the fitted flow, with the parameters that were best on the validation rows.
        num_params: how many trained numbers it has.
        train_log_prob: of the minibatch of each step, shape (steps,); NaN where a step was skipped.
        validation_log_prob: of the validation rows at each check, shape (checks,).
        validation_steps: after how many steps each check came, shape (checks,); the first is 0.
        best_step: after how many steps the returned parameters were reached.
        stopped: why training ended: "patience", "num_steps", "callback" or "interrupted".
    """

    flow: Any
    num_params: int
    train_log_prob: np.ndarray
    validation_log_prob: np.ndarray
    validation_steps: np.ndarray
    best_step: int
    stopped: str

    def __str__(self) -> str:
        """One line."""
        text = f"{self.num_params} parameters, {len(self.train_log_prob)} steps ({self.stopped})"
        if self.validation_log_prob.size:
            best = self.validation_log_prob[self.validation_steps == self.best_step][0]
            text += f", validation log-likelihood {best:.3f} at step {self.best_step}"
        return text

    __repr__ = __str__


def fit_density(
    key: PRNGKeyArray,
    flow: AbstractDistribution,
    data: Any,
    *,
    condition: Any = None,
    weights: Any = None,
    validation_fraction: float | int = 0.1,
    batch_size: int = 256,
    num_steps: int = 10000,
    patience: int = 500,
    learning_rate: float | int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    standardise: bool = True,
    progress: bool = False,
    callback: Callable[[Progress], Any] | None = None,
) -> DensityFit:
    r"""Fit a flow to data by maximum likelihood, with early stopping on rows held out.

    $$\max_\theta \frac1n \sum_{i=1}^n w_i \log q_\theta(x_i \mid c_i)$$

    The rows are split at random. The columns are standardised by mean and standard deviation of the
    training rows: an affine layer, not trained, becomes the flow's last. The centres of untrained
    kernelised layers are placed among the training rows. Then comes stochastic ascent on minibatches,
    drawn without replacement for each step, with a gradient that is unbiased for that of all
    training rows. Every 25 steps (fewer times where validation rows are very many) the validation
    rows are scored; training ends after `patience` steps without a new best, and the best parameters
    are returned. Their validation score is optimistic, since they were chosen by it: keep a test
    set for comparisons.

    Args:
        key: PRNG key; the fit is a deterministic function of it.
        flow: any distribution with a `log_prob` to be trained, conditional or not.
        data: (n, *flow.shape), finite numbers; integers are converted.
        condition: (n, *flow.condition_shape) for a conditional flow, of order one: it is not
            standardised.
        weights: (n,) positive weights of the rows, or None for equal ones; only their ratios count.
        validation_fraction: share of the rows held out; 0 trains on all rows for all steps.
        batch_size: rows of a minibatch; all training rows if there are no more.
        num_steps: largest number of steps.
        patience: steps without a better validation score after which training ends.
        learning_rate: of the default optimizer, Adam on gradients clipped to norm 10; 1e-3 by default.
        optimizer: an optax transformation instead.
        standardise: whether to standardise; say False for a flow whose support is bounded.
        progress: whether to show a progress bar.
        callback: called with a `Progress` (in standardised units) after each score of the validation
            rows; a true value stops.

    Returns:
        A `DensityFit`. Ctrl-C ends training early and returns the best so far.

    Raises:
        FitError: a log density is not finite at the start, or keeps breaking in training.
        TypeError, ValueError: an argument is wrong; it is named, with row and column.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> data = 5.0 + 2.0 * jax.random.normal(jax.random.key(0), (200, 2))
        >>> flow = vf.flows.gaussian(jax.random.key(1), 2)
        >>> result = vf.fit_density(jax.random.key(2), flow, data, num_steps=50)
        >>> print(result.num_params, jnp.round(result.flow.sample(jax.random.key(3))).shape)
        4 (2,)

    Source:
        Papamakarios, Nalisnick, Rezende, Mohamed & Lakshminarayanan 2021 (arXiv 1912.02762), section
        2.3.1 for the objective.
    """
    key = as_key(key)
    if not isinstance(flow, AbstractDistribution):
        raise TypeError(f"fit_density: flow must be a distribution, got {type(flow).__name__}.")
    batch_size = check_count("fit_density", "batch_size", batch_size)
    num_steps = check_count("fit_density", "num_steps", num_steps)
    patience = check_count("fit_density", "patience", patience)
    optimizer = _check_optimizer(optimizer, learning_rate)
    if callback is not None:
        check_callable("fit_density", "callback", callback)
    if not jax.tree.leaves(partition(flow)[0]):
        raise ValueError("fit_density: flow has no trainable leaf.")
    split_key, centre_key, train_key = jax.random.split(key, 3)
    rows = check_rows(flow, data, condition, weights)
    order = np.asarray(jax.random.permutation(split_key, len(rows.x)))
    train, held_out = split_rows(rows, validation_fraction, order)
    layer, log_scale = None, 0.0
    if standardise:
        layer = standardiser(train)
        train, held_out = to_standard(train, layer), to_standard(held_out, layer)
        log_scale = float(np.sum(np.asarray(layer.log_scale, np.float64)))
    train, held_out = _on_device(train), _on_device(held_out)
    if isinstance(flow, Flow) and fresh_kernels(flow.bijection):
        placed, _ = eqx.filter_jit(place_centres)(
            flow.bijection, centre_key, train.x, train.condition
        )
        flow = Flow(flow.base, placed)
    run = _Run(flow, train, held_out, patience)
    run.check_start(order, standardise=standardise)
    params, values, stopped = run.ascend(
        train_key, optimizer, num_steps, min(batch_size, len(train.x)), progress, callback
    )
    fitted = combine(params, run.static)
    return DensityFit(
        fitted if layer is None else precondition(fitted, Freeze(layer)),
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        values - log_scale,
        np.asarray(run.scores) - log_scale,
        np.asarray(run.steps, int),
        run.best_step if run.steps else len(values),
        stopped,
    )


class _Run:
    """One fit on standardised rows."""

    def __init__(self, flow: Any, train: Rows, held_out: Rows, patience: int):
        self.start, self.static = partition(flow)
        self.train, self.held_out, self.patience = train, held_out, patience
        self.best, self.best_step = self.start, 0
        self.scores: list[float] = []
        self.steps: list[int] = []

        def log_prob(params, row):
            return combine(params, self.static).log_prob(row.x, row.condition)

        def mean(params, rows):
            terms = jax.vmap(log_prob, (None, 0))(params, rows)
            return jnp.mean(terms if rows.weights is None else rows.weights * terms)

        self._mean = mean
        self._score = jax.jit(
            lambda params, rows: jax.lax.map(ft.partial(log_prob, params), rows, batch_size=_BLOCK)
        )

    def check_start(self, order: np.ndarray, *, standardise: bool) -> None:
        """Raise unless every row has a finite log density; score the validation rows.

        Raises:
            FitError: with the row.
        """
        parts = [self.held_out, self.train] if len(self.held_out.x) else [self.train]
        values = np.concatenate([np.asarray(self._score(self.start, part)) for part in parts])
        broken = order[~np.isfinite(values)]
        if broken.size:
            row = int(broken.min())
            hint = (
                " If the flow's support is bounded, say standardise=False." if standardise else ""
            )
            raise FitError(
                f"fit_density: before training the log density is not finite at {broken.size} of "
                f"{len(order)} rows, for example row {row} of data: the flow does not reach it.{hint}",
                reasons=("the log density is not finite at the start",),
                step=0,
            )
        if len(self.held_out.x):
            self._look(self.start, 0)

    def _look(self, params: Any, step: int) -> bool:
        """Score the validation rows; whether patience is at its end."""
        terms = np.asarray(self._score(params, self.held_out), np.float64)
        weights = 1.0 if self.held_out.weights is None else np.asarray(self.held_out.weights)
        score = float(np.mean(weights * terms))
        if not self.scores or score > np.nanmax(self.scores):
            self.best, self.best_step = params, step
        self.scores.append(score)
        self.steps.append(step)
        return step - self.best_step >= self.patience

    def ascend(
        self,
        key: PRNGKeyArray,
        optimizer: optax.GradientTransformation,
        num_steps: int,
        batch: int,
        progress: bool,  # noqa: FBT001
        callback: Callable[[Progress], Any] | None,
    ) -> tuple[Any, np.ndarray, str]:
        """Train; the best parameters, the objective by step, and why it ended."""

        def value_and_grad(key, params, rows):
            return jax.value_and_grad(self._mean)(params, take_rows(key, rows, batch))

        ended = []
        every = max(_EVERY, len(self.held_out.x) // (2 * batch))

        def after_chunk(report: Progress) -> bool:
            if self.steps and self._look(report.params, report.step):
                ended.append("patience")
            elif callback is not None and callback(report):
                ended.append("callback")
            return bool(ended)

        try:
            outcome = Ascent(value_and_grad, optimizer, chunk=every).run(
                key,
                self.start,
                num_steps,
                inputs=(self.train,),
                progress=progress,
                callback=after_chunk,
                label="fit_density",
            )
        except FitError as error:
            raise FitError(
                f"fit_density: value or gradient of the log likelihood stayed non-finite from step "
                f"{error.step} on. Lower the learning rate, bound the flow's scales, or switch on "
                "jax_enable_x64.",
                reasons=error.reasons,
                step=error.step,
                last_good=combine(error.last_good, self.static),
            ) from None
        stopped = "interrupted" if outcome.stopped == "interrupted" else (*ended, "num_steps")[0]
        return (self.best if self.steps else outcome.params), outcome.values, stopped


def _check_optimizer(optimizer: Any, learning_rate: Any) -> optax.GradientTransformation:
    optimizer = check_optimizer("fit_density", optimizer)
    if optimizer is not None:
        if learning_rate is not None:
            raise ValueError("fit_density: give learning_rate or optimizer, not both.")
        return optimizer
    rate = _LEARNING_RATE if learning_rate is None else learning_rate
    if not isinstance(rate, int | float | np.number) or not 0 < rate < float("inf"):
        raise ValueError(f"fit_density: learning_rate must be a positive number, got {rate!r}.")
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(float(rate)))


def _on_device(rows: Rows) -> Any:
    dtype = default_dtype()
    return jax.tree.map(lambda a: jnp.asarray(a.astype(dtype)), rows)
