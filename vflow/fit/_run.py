"""One fit from preparation to verdict: what `vf.fit` does with arguments that are known to be right."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Estimate, FitError, combine, partition
from vflow._core._keys import fold_in, split
from vflow.bijections import AbstractBijection
from vflow.fit._budget import Clock
from vflow.fit._checkpoint import Checkpoint, Resumed, key_words, structure_of
from vflow.fit._coordinates import choose_coordinates
from vflow.fit._draws import Drawer, extra
from vflow.fit._dtype import cast, default_dtype, scope
from vflow.fit._guide import GuideDistribution, name_of
from vflow.fit._ladder import MORE, better, broken, grown, heavy_tails, next_remedy, told
from vflow.fit._loop import Ascent, LoopState, Outcome
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
    near,
    to_default,
    whitening,
)
from vflow.fit._recipe import precondition as preconditioned
from vflow.fit._verdict import Verdict, judge
from vflow.fit._warm_start import reweighed, warm_start
from vflow.programs import expect, value_and_grad
from vflow.targets import decentre, preflight, site_table

_VERDICT_DRAWS = 16384
# The bound is tight when the spread of log p - log q says KL < 5e-4 nats (second-order expansion).
_TIGHT = 5e-4
_SURE = 0.5  # k-hat above which an untrained Gaussian does not do
_WARM = 1 << 20  # folded into the key of training, beyond any round
_GUIDE_RATE = 1e-2  # a guide has no preconditioner that would bring it near


class _Best(NamedTuple):
    """The best round so far."""

    flow: Any  # in the type of the computation
    verdict: Verdict


class Run:
    """One fit: settled by `prepare`, carried out by `train`."""

    def __init__(
        self, target, key, objective, gradient, optimizer, budget, mesh=None, *, near=False
    ):
        self.clock = Clock(budget.seconds)
        self.target = self.given = target
        names = ("gaussian", "flow", "train", "verdict")
        self.keys, self.key = dict(zip(names, split(key, 4), strict=True)), key
        self.objective = choose_objective(objective)
        self.gradient = gradient
        self.optimizer = optimizer
        self.budget = budget
        self.num_steps, self.num_samples = budget.num_steps, budget.num_samples
        self.seconds: dict[str, float] = {}
        self.tight = objective is None
        self.may_skip = near and objective is None  # training, where the Gaussian is the posterior
        self.layout = Layout(mesh, target, self.num_samples)

    def identity(self, flow: Any, precondition: Any) -> dict[str, Any]:
        """What makes a checkpoint belong to this call."""
        return {
            "sites": [[site.name, list(site.shape)] for site in self.target.sites],
            "dim": self.target.dim,
            "key": key_words(self.key),
            "num_steps": self.num_steps,
            "num_samples": self.num_samples,
            "rounds": self.budget.rounds,
            "gradient": self.gradient,
            "objective": getattr(self.objective, "__qualname__", "?"),
            "flow": None if flow is None else family_of(flow),
            "precondition": precondition if isinstance(precondition, str | None) else "given",
            "x64": default_dtype() == "float64",
        }

    def prepare(self, flow: Any, precondition: Any, dtype: str, file: Checkpoint | None) -> None:
        """Start, preconditioner, float type, flow, gradient rule: everything before training."""
        self.ours = flow is None
        settled = None if file is None else file.settings()
        gaussian, cover, decentred, notes = None, None, (), []
        self.gaussian: Gaussian | None = None
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
                gaussian = _placeholder(self.target.dim, dense=settled["dense"])
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
            self.gaussian = gaussian
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
                    key_warm = fold_in(self.keys["train"], _WARM)
                    flow = warm_start(flow, cover, key_warm, dtype)
        self.seconds["preparation"] = round(self.clock.spent(), 2)
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
            "start": "cover" if bent else "near" if self._is_near(gaussian) else None,
            "modes": [[mode.origin, mode.elbo] for mode in gaussian.modes] if gaussian else [],
            "rivals": [list(rival) for rival in gaussian.rivals] if gaussian else [],
            "rounds": [],
            "cover_evidence": gaussian.witness() if gaussian else None,
            "gaussian_elbo": gaussian.elbo if gaussian else None,
            "gradient": self.gradient,
            "objective": getattr(self.objective, "__qualname__", "?").split(".")[0],
            "num_samples": self.num_samples,
            "notes": notes,
        }
        self.file, self.resuming = file, settled is not None
        self.flow = flow

    def _is_near(self, gaussian: Gaussian | None) -> bool:
        return self.ours and self.may_skip and near(gaussian)

    def _found(self) -> Gaussian | None:
        """The Gaussian fit with its cover; found anew, and the same, where a checkpoint was gone on with."""
        if self.gaussian is None and self.settings["preconditioner"] == "gaussian":
            _, self.gaussian, _ = choose_coordinates(self.given, self.keys["gaussian"])
        return self.gaussian

    def _check_start(self, flow: Any) -> None:
        draws = self._draw(flow, 16)
        preflight(self.target, draws)

    def _draw(self, flow: Any, n: int) -> Array:
        draw = lambda key: flow.sample(key, **extra(flow, self.target))
        return jax.vmap(draw)(jax.random.split(self.keys["flow"], n))

    def train(self, progress: bool, callback: Any) -> Posterior:  # noqa: FBT001
        """Rounds of training, each followed by a verdict, until one is "ok" or the budget is spent."""
        drawer = self._drawer()
        records = [dict(record) for record in self.settings["rounds"]]
        notes, history = list(self.settings["notes"]), np.zeros(0)
        best, resumed = None, None
        if self.resuming:
            best, resumed = self._resume(drawer, records)
            history = resumed.history
        elif self.settings["start"] == "near":
            best = self._judged(drawer, self.flow)
            if best.verdict.status == "ok" and best.verdict.khat < _SURE:
                notes.append(
                    "The posterior is a Gaussian but for 0.02 nats: there was nothing to train."
                )
            else:
                best = None
        cost = 0.0
        while best is None or best.verdict.status != "ok":
            if resumed is None:
                if len(records) >= self.budget.rounds:
                    break
                remedy = self._remedy(best, records)
                if remedy is None:
                    break
                if records and not self.clock.allows(0.5 * cost):
                    notes.append("No time was left for another round.")
                    break
                try:
                    self.flow = self._start(best, remedy, len(records))
                except KeyboardInterrupt:
                    notes.append(f"Round {len(records) + 1} was interrupted before its first step.")
                    break
                records.append(remedy)
            began = self.clock.spent()
            old, number = best, len(records) - 1
            if records[-1]["name"] == "weights":
                flow, outcome = self.flow, Outcome(None, np.zeros(0), None)
            else:
                try:
                    flow, outcome = self._round(
                        records, resumed, best, history, notes, progress=progress, callback=callback
                    )
                except FitError as error:
                    if best is None:
                        raise
                    resumed, records[-1]["kept"] = None, False
                    notes.append(broken(number, records[-1], error))
                    continue
            resumed = None
            history = np.concatenate([history, outcome.values])
            new = self._judged(drawer, flow)
            kept = old is None or number == 0 or better(new.verdict, old.verdict)
            best = new if kept else old
            records[-1]["kept"] = kept
            if number > 0 and old is not None:
                notes.append(told(number, records[-1], old.verdict, new.verdict, kept=kept))
            if outcome.stopped in ("interrupted", "callback"):
                why = "interrupted" if outcome.stopped == "interrupted" else "stopped"
                why = "ended by the clock" if self.clock.over() else why
                notes.append(
                    f"Training was {why} after {len(outcome.values)} of {self.num_steps} steps."
                )
                break
            if outcome.stopped == "converged":
                notes.append(
                    f"Training ended after {len(outcome.values)} of {self.num_steps} steps: the "
                    "bound is tight."
                )
            cost = self.clock.spent() - began
        skipped = int(np.isnan(history).sum())
        if skipped:
            notes.append(f"{skipped} of {len(history)} steps were skipped: not finite.")
        self.seconds["training and verdict"] = round(
            self.clock.spent() - self.seconds["preparation"], 2
        )
        settings = self.settings | {
            "notes": notes,
            "num_steps": len(history),
            "rounds": len(records),
            "tried": [record["name"] for record in records if record.get("kept")],
            "seconds": self.seconds,
        }
        flow, verdict = best  # pyright: ignore[reportGeneralTypeIssues]
        return Posterior(to_default(flow), self.target, verdict, history, settings, drawer=drawer)

    def _remedy(self, best: _Best | None, records: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the next round is to do; None if nothing is left to try."""
        if not records:
            return {"name": "first"}
        if best is None:
            return None
        return next_remedy(
            best.verdict,
            [record["name"] for record in records],
            ours=self.ours and self.tight,
            bent=self.settings["start"] == "cover",
            heavy=lambda: heavy_tails(self.target, best.flow),
        )

    def _start(self, best: _Best | None, remedy: dict[str, Any], number: int) -> Any:
        """The flow that a round starts from."""
        flow = self.flow if best is None else best.flow
        if number == 0:
            return self.flow
        key = fold_in(self.keys["flow"], number)
        with scope(self.dtype):
            if remedy["name"] == "cover":
                return self._covering(key)
            if remedy["name"] == "weights":
                return reweighed(flow, self.target, key)
            return cast(grown(flow, remedy, key), self.dtype)

    def _covering(self, key: PRNGKeyArray) -> Any:
        """A flow that starts from draws of the cover."""
        gaussian = self._found()
        cover = gaussian.cover  # pyright: ignore[reportOptionalMemberAccess]
        loc, tril = cover.moments()  # pyright: ignore[reportOptionalMemberAccess]
        layer = whitening(gaussian._replace(loc=loc, tril=tril), self.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        flow = cast(default_flow(key, self.target.dim, bent=True), self.dtype)
        return warm_start(preconditioned(flow, layer), cover, key, self.dtype)  # pyright: ignore[reportArgumentType]

    def _template(self, records: list[dict[str, Any]]) -> Any:
        """A flow of the structure that these rounds lead to."""
        flow = self.flow
        for record in records:
            if record["name"] == "cover":
                layer = whitening(_placeholder(self.target.dim, dense=True), self.dtype)
                bent = default_flow(self.keys["flow"], self.target.dim, bent=True)
                flow = preconditioned(cast(bent, self.dtype), layer)
            else:
                flow = cast(grown(flow, record, self.keys["flow"]), self.dtype)
        return flow

    def _resume(
        self, drawer: Drawer, records: list[dict[str, Any]]
    ) -> tuple[_Best | None, Resumed]:
        """The best round so far and the running one, of a checkpoint."""
        with scope(self.dtype):
            kept = [record for record in records[:-1] if record["kept"]]
            best = self._template(kept) if kept else None
            resumed = self.file.resume(  # pyright: ignore[reportOptionalMemberAccess]
                self._template([*kept, records[-1]]), self.optimizer.init, partition, best
            )
        self.flow = resumed.flow
        return (None if best is None else self._judged(drawer, resumed.best)), resumed

    def _round(
        self,
        records: list[dict[str, Any]],
        resumed: Resumed | None,
        best: _Best | None,
        history: np.ndarray,
        notes: list[str],
        *,
        progress: bool,
        callback: Any,
    ) -> tuple[Any, Outcome]:
        """Train the flow at hand: what came out, and how it ended."""
        number = len(records) - 1
        more = sum(record["name"] == "particles" for record in records)
        num_samples = self.num_samples * MORE**more

        def after_chunk(report: Any) -> bool:
            return bool(callback is not None and callback(report)) or self.clock.over()

        with scope(self.dtype):
            trainable, static = partition(self.flow)
            trainable, inputs = self.layout.everywhere(trainable), self._inputs()
            save = None
            if self.file is not None:
                settings = self.settings | {"rounds": records, "notes": list(notes)}
                save = self._saver(static, number, history, settings, best)
            with _last_good_as_flow(static):
                outcome = self._ascent(static, num_samples).run(
                    fold_in(self.keys["train"], number),
                    trainable,
                    self.num_steps,
                    inputs=inputs,
                    resume=None if resumed is None else resumed.state,
                    progress=progress,
                    callback=after_chunk,
                    save=save,
                    converged=(lambda v: _converged(v, num_samples)) if self.tight else None,
                    explain=lambda params: self._explain(combine(params, static)),
                    label="fit" if number == 0 else f"fit, round {number + 1}",
                )
            return combine(outcome.params, static), outcome

    def _drawer(self) -> Drawer:
        """What judges flows."""
        return Drawer(self.target, self.dtype, self.layout)

    def _inputs(self) -> tuple[Any, ...]:
        """Data for the steps, not to be compiled in."""
        return self.layout.inputs(self.dtype)

    def _estimate(self, num_samples: int) -> Callable[..., Array]:
        """`S(key, flow, *inputs)`, an unbiased estimate of the objective."""
        layout = self.layout
        return expect(
            lambda flow, *inputs: self.objective(flow, layout.bound(self.target, inputs)),
            num_samples,
            gradient=self.gradient,
        )

    def _ascent(self, static: Any, num_samples: int) -> Ascent:
        layout, estimate = self.layout, self._estimate(num_samples)

        def step(key, trainable, *inputs):
            with layout.particles():
                return layout.replicated(
                    value_and_grad(lambda key, t: estimate(key, combine(t, static), *inputs))(
                        key, trainable
                    )
                )

        return Ascent(step, self.optimizer)

    def _saver(
        self, static: Any, number: int, history: np.ndarray, settings: dict, best: _Best | None
    ) -> Callable[[LoopState], None]:
        def save(state):
            flow = combine(state.params, static)
            self.file.save(  # pyright: ignore[reportOptionalMemberAccess]
                flow, state, number, history, settings, None if best is None else best.flow
            )

        return save

    def _explain(self, flow: Any) -> str:
        """The density by site at a draw where it breaks, if one of 512 does."""
        x = self._draw(flow, 512)
        value, grad = jax.vmap(jax.value_and_grad(self.target.log_prob))(x)
        broken = ~(np.isfinite(value) & np.isfinite(grad).all(axis=-1))
        return "At a draw of the last good flow, by site:\n" + site_table(
            self.target, x[int(np.argmax(broken))]
        )

    def _judged(self, drawer: Drawer, flow: Any) -> _Best:
        """A flow with the verdict on fresh draws of it, in the caller's float type."""
        x, log_w = drawer.weighted(to_default(flow), self.keys["verdict"], _VERDICT_DRAWS)
        cover, modes = self.settings["cover_evidence"], ()
        if self.settings["modes"]:
            found = self._found()
            modes = () if found is None else found.modes
        verdict = judge(
            log_w,
            None if cover is None else Estimate(*cover),
            draws=x,
            modes=modes,
            sites=self.target.sites,
        )
        return _Best(flow, verdict)


def _converged(values: np.ndarray, num_samples: int) -> bool:
    recent = values[-200:]
    if len(values) < 300 or np.isnan(recent).any():
        return False
    return bool(0.5 * num_samples * recent.var() < _TIGHT)


def _placeholder(dim: int, *, dense: bool) -> Gaussian:
    """A Gaussian of the right structure, whose numbers a checkpoint brings."""
    tril = np.tril(np.ones((dim, dim))) if dense else np.eye(dim)
    return Gaussian(np.zeros(dim), tril, 0.0, "", ())


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
