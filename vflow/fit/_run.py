"""One fit from preparation to verdict: what `vf.fit` does with arguments that are known to be right."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vflow._core import Estimate, FitError, combine, partition
from vflow.bijections import AbstractBijection
from vflow.fit._checkpoint import Checkpoint, Resumed, key_words, structure_of
from vflow.fit._coordinates import choose_coordinates
from vflow.fit._draws import Drawer, extra
from vflow.fit._dtype import cast, default_dtype, scope
from vflow.fit._guide import GuideDistribution, name_of
from vflow.fit._loop import Ascent, LoopState
from vflow.fit._mesh import Layout
from vflow.fit._mixing import Mixed, mixed
from vflow.fit._posterior import Posterior
from vflow.fit._precondition import Gaussian
from vflow.fit._recipe import (
    choose_dtype,
    choose_gradient,
    choose_objective,
    covering,
    default_flow,
    default_optimizer,
    to_default,
    whitening,
)
from vflow.fit._recipe import precondition as preconditioned
from vflow.fit._verdict import Verdict, judge
from vflow.fit._warm_start import warm_start
from vflow.programs import expect, value_and_grad
from vflow.targets import decentre, preflight, site_table

_VERDICT_DRAWS = 16384
# The bound is tight when the spread of log p - log q says KL < 5e-4 nats (second-order expansion).
_TIGHT = 5e-4
_WARM = 1 << 20  # folded into the key of training, beyond any round
_GUIDE_RATE = 1e-2  # a guide has no preconditioner that would bring it near


class Run:
    """One fit: settled by `prepare`, carried out by `train`."""

    def __init__(
        self, target, key, objective, gradient, optimizer, num_steps, num_samples, mesh=None
    ):
        self.target = target
        self.keys = dict(
            zip(("gaussian", "flow", "train", "verdict"), jax.random.split(key, 4), strict=True)
        )
        self.key = key
        self.objective = choose_objective(objective)
        self.gradient = gradient
        self.optimizer = optimizer
        self.num_steps, self.num_samples = num_steps, num_samples
        self.seconds: dict[str, float] = {}
        self.tight = objective is None
        self.layout = Layout(mesh, target, num_samples)

    def identity(self, flow: Any, precondition: Any) -> dict[str, Any]:
        """What makes a checkpoint belong to this call."""
        return {
            "sites": [[site.name, list(site.shape)] for site in self.target.sites],
            "dim": self.target.dim,
            "key": key_words(self.key),
            "num_steps": self.num_steps,
            "num_samples": self.num_samples,
            "gradient": self.gradient,
            "objective": getattr(self.objective, "__qualname__", "?"),
            "flow": None if flow is None else family_of(flow),
            "precondition": precondition if isinstance(precondition, str | None) else "given",
            "x64": default_dtype() == "float64",
        }

    def prepare(self, flow: Any, precondition: Any, dtype: str, file: Checkpoint | None) -> None:
        """Start, preconditioner, float type, flow, gradient rule: everything before training."""
        began = time.monotonic()
        settled = None if file is None else file.settings()
        gaussian, cover, decentred, notes = None, None, (), []
        of_guide = isinstance(flow, GuideDistribution)
        if self.optimizer is None:
            self.optimizer = default_optimizer(self.num_steps, _GUIDE_RATE if of_guide else None)
        if of_guide:
            notes.append(
                f"The family is the guide {name_of(flow.setting.guide)} and its parameters."
            )
            if flow.setting.estimated:
                notes.append(
                    "The density of the guide is estimated: there is no log_prob of a point."
                )
        if settled is not None:
            dtype, notes = settled["dtype"], settled["notes"]
            self.target = decentre(self.target, tuple(settled["decentred"]))
            bent = settled["start"] == "cover"
            if settled["preconditioner"] == "gaussian":
                zeros, eye = np.zeros(self.target.dim), np.tril(np.ones((self.target.dim,) * 2))
                gaussian = Gaussian(
                    zeros, np.where(settled["dense"], eye, np.eye(len(zeros))), 0.0, "", ()
                )
        else:
            if precondition == "auto":
                self.target, gaussian, decentred = choose_coordinates(
                    self.target, self.keys["gaussian"]
                )
                if decentred:
                    notes.append(
                        f"Sites {list(decentred)} are fitted decentred, (value - location) / scale: the "
                        "posterior is nearer to a Gaussian so."
                    )
            cover = covering(gaussian)
            bent = cover is not None
            if gaussian is not None and cover is not None:
                loc, tril = cover.moments()
                gaussian = gaussian._replace(loc=loc, tril=tril)
                notes.append(
                    "Most of the posterior lies outside the best Gaussian: the flow has spline layers "
                    "and starts from draws of a mixture that covers it."
                )
            if dtype == "auto":
                dtype, note = choose_dtype(self.target, gaussian)
                notes += [] if note is None else [note]
        self.dtype = dtype
        with scope(dtype):
            if flow is None:
                flow = default_flow(self.keys["flow"], self.target.dim, bent=bent)
            flow = cast(flow, dtype)
            if gaussian is not None:
                flow = preconditioned(flow, whitening(gaussian, dtype))
            elif isinstance(precondition, AbstractBijection):
                flow = preconditioned(flow, cast(precondition, dtype))
            self.gradient, note = choose_gradient(self.gradient, self.objective, flow, self.target)
            if self.gradient == "auto" and not isinstance(self.optimizer, Mixed):
                self.optimizer = mixed(self.optimizer)
            if settled is None:
                notes = notes + ([] if note is None else [note])
                if gaussian is None:
                    self._check_start(flow)
                if cover is not None:
                    key_warm = jax.random.fold_in(self.keys["train"], _WARM)
                    flow = warm_start(flow, cover, key_warm, dtype)
        self.seconds["preparation"] = round(time.monotonic() - began, 2)
        self.settings = settled or {
            "dtype": dtype,
            "preconditioner": "none"
            if precondition is None
            else "gaussian"
            if gaussian
            else "given",
            "dense": bool(
                gaussian is not None and np.count_nonzero(gaussian.tril) > self.target.dim
            ),
            "origin": gaussian.origin if gaussian else None,
            "decentred": list(getattr(self.target.space, "decentred", ())),
            "start": "cover" if bent else None,
            "cover_evidence": gaussian.witness() if gaussian else None,
            "gaussian_elbo": gaussian.elbo if gaussian else None,
            "gradient": self.gradient,
            "objective": getattr(self.objective, "__qualname__", "?").split(".")[0],
            "num_samples": self.num_samples,
            "notes": notes,
        }
        self.file, self.resuming = file, settled is not None
        self.flow = flow

    def _check_start(self, flow: Any) -> None:
        draws = self._draw(flow, 16)
        preflight(self.target, draws)

    def _draw(self, flow: Any, n: int) -> Array:
        draw = lambda key: flow.sample(key, **extra(flow, self.target))
        return jax.vmap(draw)(jax.random.split(self.keys["flow"], n))

    def train(self, rounds: int, progress: bool, callback: Any) -> Posterior:  # noqa: FBT001
        """Rounds of training, each followed by a verdict, until one is "ok"."""
        began = time.monotonic()
        drawer = Drawer(self.target, self.dtype, self.layout)
        with scope(self.dtype):
            resumed: Resumed | None = None
            if self.resuming:
                resumed = self.file.resume(  # pyright: ignore[reportOptionalMemberAccess]
                    self.flow, self.optimizer.init, partition
                )
                self.flow = resumed.flow
            trainable, static = partition(self.flow)
            trainable, inputs = self.layout.everywhere(trainable), self.layout.inputs(self.dtype)
            ascent = self._ascent(static)
        history = np.zeros(0) if resumed is None else resumed.history
        first = 0 if resumed is None else resumed.round
        notes = list(self.settings["notes"])
        for number in range(first, rounds):
            save = None
            if self.file is not None:
                save = self._saver(static, number, history)
            with scope(self.dtype), _last_good_as_flow(static):
                outcome = ascent.run(
                    jax.random.fold_in(self.keys["train"], number),
                    trainable,
                    self.num_steps,
                    inputs=inputs,
                    resume=None if resumed is None or number != first else resumed.state,
                    progress=progress,
                    callback=callback,
                    save=save,
                    converged=self._converged if self.tight else None,
                    explain=lambda params: self._explain(combine(params, static)),
                    label="fit" if number == 0 else f"fit, round {number + 1}",
                )
                trainable = outcome.params
                flow = combine(trainable, static)
            flow = to_default(flow)
            history = np.concatenate([history, outcome.values])
            verdict = self._verdict(drawer, flow)
            if outcome.stopped in ("interrupted", "callback"):
                notes.append(
                    f"Training was {'interrupted' if outcome.stopped == 'interrupted' else 'stopped'} "
                    f"after {len(outcome.values)} of {self.num_steps} steps."
                )
                break
            if outcome.stopped == "converged":
                notes.append(
                    f"Training ended after {len(outcome.values)} of {self.num_steps} steps: the "
                    "bound is tight."
                )
            if verdict.status == "ok":
                break
        skipped = int(np.isnan(history).sum())
        if skipped:
            notes.append(f"{skipped} of {len(history)} steps were skipped: not finite.")
        self.seconds["training and verdict"] = round(time.monotonic() - began, 2)
        settings = self.settings | {
            "notes": notes,
            "num_steps": len(history),
            "rounds": number + 1,
            "seconds": self.seconds,
        }
        return Posterior(flow, self.target, verdict, history, settings, drawer=drawer)

    def _ascent(self, static: Any) -> Ascent:
        layout = self.layout
        estimate = expect(
            lambda flow, *inputs: self.objective(flow, layout.bound(self.target, inputs)),
            self.num_samples,
            gradient=self.gradient,
        )

        def step(key, trainable, *inputs):
            with layout.particles():
                return layout.replicated(
                    value_and_grad(lambda key, t: estimate(key, combine(t, static), *inputs))(
                        key, trainable
                    )
                )

        return Ascent(step, self.optimizer)

    def _saver(self, static: Any, number: int, history: np.ndarray) -> Callable[[LoopState], None]:
        def save(state):
            flow = combine(state.params, static)
            self.file.save(  # pyright: ignore[reportOptionalMemberAccess]
                flow, state, number, history, self.settings
            )

        return save

    def _converged(self, values: np.ndarray) -> bool:
        recent = values[-200:]
        if len(values) < 300 or np.isnan(recent).any():
            return False
        return bool(0.5 * self.num_samples * recent.var() < _TIGHT)

    def _explain(self, flow: Any) -> str:
        """The density by site at a draw where it breaks, if one of 512 does."""
        x = self._draw(flow, 512)
        value, grad = jax.vmap(jax.value_and_grad(self.target.log_prob))(x)
        broken = ~(np.isfinite(value) & np.isfinite(grad).all(axis=-1))
        return "At a draw of the last good flow, by site:\n" + site_table(
            self.target, x[int(np.argmax(broken))]
        )

    def _verdict(self, drawer: Drawer, flow: Any) -> Verdict:
        _, log_w = drawer.weighted(flow, self.keys["verdict"], _VERDICT_DRAWS)
        cover = self.settings["cover_evidence"]
        return judge(log_w, None if cover is None else Estimate(*cover))


@contextlib.contextmanager
def _last_good_as_flow(static: Any) -> Iterator[None]:
    """A FitError of the loop leaves with a flow, where the loop knows parameters only."""
    try:
        yield
    except FitError as error:
        error.last_good = to_default(combine(error.last_good, static))
        raise


def family_of(flow: Any) -> str:
    if isinstance(flow, GuideDistribution):
        return f"{name_of(flow.setting.guide)} {structure_of(flow.params)}"
    return structure_of(flow)
