"""The one training loop: jitted chunks of steps, with everything else between the chunks."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from vflow._core import FitError
from vflow._core._compile import jit, jit_long, jit_once
from vflow.fit._mixing import Mixed, at_share, measured

CHUNK = 100
_LONG = 5000  # steps above which what the faster program costs to compile comes back


class Progress(NamedTuple):
    """What a callback is told after each chunk of steps.

    Attributes:
        step: steps done.
        num_steps: steps planned.
        value: mean of the objective over the chunk; NaN if every step was skipped.
        num_skipped: steps skipped so far because value or gradient were not finite.
        params: the current trainable leaves.
    """

    step: int
    num_steps: int
    value: float
    num_skipped: int
    params: Any


class LoopState(NamedTuple):
    """All that a run needs to go on: a checkpoint is this."""

    step: int
    params: Any
    optimizer_state: Any
    values: np.ndarray  # the objective by step; NaN where a step was skipped


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        params: the trained leaves.
        values: the objective by step, shape (steps done,); NaN where a step was skipped.
        stopped: None after all steps, else "converged", "callback" or "interrupted".
    """

    params: Any
    values: np.ndarray
    stopped: str | None


class Ascent:
    """Stochastic gradient ascent on an estimate, compiled once and run as often as needed.

    The update of a step whose value, gradient or result is not finite is skipped and counted on
    the device; a chunk in which more than half of the steps were skipped raises.

    Args:
        value_and_grad: `(key, params, *inputs) -> (value, gradient)` of the objective to be
            maximised.
        optimizer: any optax transformation, or one made by `mixed` for `gradient="auto"`.
        chunk: steps between two returns to the host.
    """

    def __init__(
        self,
        value_and_grad: Callable[..., tuple[Array, Any]],
        optimizer: optax.GradientTransformation | Mixed,
        chunk: int = CHUNK,
    ):
        self.optimizer, self.chunk = optimizer, chunk

        @ft.partial(jax.jit, inline=True)  # traced once, for its shape and in the loop
        def step(key, carry, index, inputs):
            params, state = carry
            key = jax.random.fold_in(key, index)
            if isinstance(optimizer, Mixed):
                state, moments = state
                moments = measured(value_and_grad, key, index, params, inputs, moments)
                value, grad = at_share(value_and_grad, moments, key, params, *inputs)
            else:
                value, grad = value_and_grad(key, params, *inputs)
            downhill = jax.tree.map(jnp.negative, grad)
            updates, new_state = optimizer.update(downhill, state, params)
            if isinstance(optimizer, Mixed):
                new_state = (new_state, moments)
            new_params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
            ok = jnp.isfinite(value) & _finite(downhill) & _finite(new_params)
            carry = jax.tree.map(
                lambda new, old: jnp.where(ok, new, old), (new_params, new_state), carry
            )
            return carry, jnp.where(ok, value, jnp.nan)

        def run_chunk(key, carry, start, count, inputs):
            def body(carry, i):
                return jax.lax.cond(
                    i < count,
                    lambda carry: step(key, carry, start + i, inputs),
                    lambda carry: (carry, blank),
                    carry,
                )

            numbers = jnp.arange(chunk)
            shape = jax.eval_shape(step, key, carry, start + numbers[0], inputs)[1]
            blank = jnp.full_like(shape, jnp.nan)
            return jax.lax.scan(body, carry, numbers)

        self._short, self._long = jit(run_chunk), jit_long(run_chunk)

    def run(
        self,
        key: PRNGKeyArray,
        params: Any,
        num_steps: int,
        *,
        inputs: tuple[Any, ...] = (),
        resume: LoopState | None = None,
        progress: bool = False,
        callback: Callable[[Progress], Any] | None = None,
        save: Callable[[LoopState], None] | None = None,
        converged: Callable[[np.ndarray], bool] | None = None,
        explain: Callable[[Any], str] | None = None,
        label: str = "fit",
    ) -> Outcome:
        """Train.

        Args:
            key: step i uses `fold_in(key, i)`, so that a resumed run equals an undisturbed one.
            params: trainable leaves to start from.
            num_steps: how many steps in all.
            inputs: further arguments of `value_and_grad`: data that is not to be compiled in.
            resume: the state to go on from; `params` is then ignored.
            progress: whether to show a progress bar.
            callback: called after every chunk; a true return value stops the run.
            save: called with the state after every chunk.
            converged: asked after every chunk, with the values so far, whether to stop.
            explain: describes what broke at given parameters, for the error message.
            label: what the progress bar says.

        Raises:
            FitError: value or gradient stay non-finite; with step and last finite parameters.
        """
        if resume is None:
            state = LoopState(0, params, jit_once(self.optimizer.init)(params), np.zeros(0))
        else:
            state = resume
        run_chunk = self._long if num_steps > _LONG else self._short
        stopped = None
        if resume is not None and converged is not None and converged(state.values):
            stopped = "converged"  # it was killed after its last step
        bar = _Bar(label, num_steps, state.step, progress)
        try:
            while state.step < num_steps and stopped is None:
                count = min(self.chunk, num_steps - state.step)
                carry, values = run_chunk(
                    key, (state.params, state.optimizer_state), state.step, count, inputs
                )
                values = np.asarray(values, np.float64)[:count]
                skipped = int(np.isnan(values).sum())
                if 2 * skipped > count:
                    self._give_up(state, values, explain)
                state = LoopState(
                    state.step + count, carry[0], carry[1], np.concatenate([state.values, values])
                )
                if save is not None:
                    save(state)
                bar.update(count, state.values)
                if callback is not None and callback(_report(state, num_steps, values)):
                    stopped = "callback"
                elif converged is not None and converged(state.values):
                    stopped = "converged"
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            bar.close()
        return Outcome(state.params, state.values, stopped)

    def _give_up(self, state: LoopState, values: np.ndarray, explain: Any) -> None:
        step = state.step + int(np.argmax(np.isnan(values)))
        where = "" if explain is None else "\n" + explain(state.params)
        raise FitError(
            f"value or gradient of the objective were not finite in {int(np.isnan(values).sum())} "
            f"of {len(values)} steps, first at step {step}. Lower the learning rate, use float64 "
            f"(dtype='float64'), or look at the model where it breaks.{where}",
            reasons=("the objective stayed non-finite",),
            step=step,
            last_good=state.params,
        )


def _finite(tree: Any) -> Array:
    return jnp.all(jnp.isfinite(ravel_pytree(tree)[0]))


def _report(state: LoopState, num_steps: int, values: np.ndarray) -> Progress:
    good = values[~np.isnan(values)]
    mean = float(good.mean()) if good.size else float("nan")
    return Progress(state.step, num_steps, mean, int(np.isnan(state.values).sum()), state.params)


class _Bar:
    """A tqdm bar with value, trend and rate; nothing if switched off."""

    def __init__(self, label: str, total: int, done: int, shown: bool):  # noqa: FBT001
        self._bar = None
        if shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, unit="step", leave=False)

    def update(self, count: int, values: np.ndarray) -> None:
        if self._bar is None:
            return
        recent, before = values[-CHUNK:], values[-2 * CHUNK : -CHUNK]
        text = f"{np.nanmean(recent):.3f}" if not np.isnan(recent).all() else "nan"
        if before.size and not np.isnan(before).all() and text != "nan":
            text += f" ({np.nanmean(recent) - np.nanmean(before):+.3f})"
        skipped = int(np.isnan(values).sum())
        self._bar.set_postfix_str(text + (f", {skipped} skipped" if skipped else ""))
        self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
