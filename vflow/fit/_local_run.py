"""One fit on minibatches of rows, from preparation to verdict."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vflow.bijections import Freeze, TriangularAffine
from vflow.fit._checkpoint import Checkpoint
from vflow.fit._dtype import cast, default_dtype, scope
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._local_bound import minibatch_bound
from vflow.fit._local_draws import RowDrawer
from vflow.fit._local_encoder import features_of, warmed
from vflow.fit._local_init import locals_of, moments
from vflow.fit._local_start import Start, find_start, start_at
from vflow.fit._local_verdict import OF_ROWS, judge_rows
from vflow.fit._loop import Ascent
from vflow.fit._posterior import Posterior
from vflow.fit._recipe import choose_gradient, default_flow, default_optimizer, to_default
from vflow.fit._recipe import precondition as preconditioned
from vflow.fit._run import Run, _Best, family_of
from vflow.targets import Target, site_table
from vflow.targets._rows import Rows

_MORE = ("longer", "particles", "particles")  # rounds after the first
_EXPLAINED = 16  # draws that are looked at where training broke down


class LocalRun(Run):
    """One fit of a model with a subsampled plate: settled by `prepare`, carried out by `train`.

    Args:
        rows: the model.
        local: "per-datum" or "amortised".
        init: a fit to start from, or None.
        *args: those of `Run` after the target.
    """

    def __init__(self, rows: Rows, local: str, init: Posterior | None, *args: Any):
        super().__init__(rows.whole, *args)
        self.rows, self.local, self.init = rows, local, init
        self.tight = False  # the noise of a minibatch does not vanish where the bound is tight
        self._ascents: dict[int, Ascent] = {}

    def identity(self, flow: Any, precondition: Any) -> dict[str, Any]:
        """What makes a checkpoint belong to this call."""
        plate = [self.rows.plate, self.rows.size, self.rows.batch]
        init = None if self.init is None else family_of(self.init.flow)
        ours = {"plate": plate, "local": self.local, "init": init}
        return super().identity(flow, precondition) | ours

    def prepare(self, flow: Any, precondition: Any, dtype: str, file: Checkpoint | None) -> None:
        """Start, family, gradient rule and control variate: everything before training.

        The affine layer is that of the start, whatever `precondition` is.
        """
        rows, settled = self.rows, None if file is None else file.settings()
        if settled is not None:
            dtype = settled["dtype"]
        self.dtype = dtype = default_dtype() if dtype == "auto" else dtype
        self.ours = False
        if self.optimizer is None:
            self.optimizer = default_optimizer(self.num_steps)
        start = self._start_of(settled)
        with scope(dtype):
            shared = self._shared(flow, start)
            alone = Target(rows.global_log_prob, rows.num_globals)
            self.gradient, note = choose_gradient(self.gradient, self.objective, shared, alone)
            self.flow, taken = self._family(shared, start, new=settled is None)
        notes = [] if note is None else [note]
        if self.init is not None:
            what = "globals and locals" if taken else "globals"
            notes.append(f"Started from the {what} of another fit.")
        notes.append(
            f"Trained on {rows.batch} of the {rows.size} rows of plate {rows.plate!r} at a time, judged on "
            "all."
        )
        self.drawer = RowDrawer(rows, dtype, self.layout, start)
        self.seconds["preparation"] = round(self.clock.spent(), 2)
        self.settings = settled or {
            "dtype": dtype,
            "preconditioner": "gaussian" if self.init is None else "given",
            "dense": rows.num_globals > 1,
            "start": None,
            "at": [start.mean.tolist(), start.tril.tolist()],
            "rounds": [],
            "gradient": self.gradient,
            "objective": getattr(self.objective, "__qualname__", "?").split(".")[0],
            "local": self.local if rows.num_locals else None,
            "num_samples": self.num_samples,
            "notes": notes,
        }
        self.file, self.resuming = file, settled is not None

    def train(self, progress: bool, callback: Any) -> Posterior:  # noqa: FBT001
        """Rounds of training, each followed by a verdict, until one is "ok" or the budget is spent."""
        posterior = super().train(progress, callback)
        del posterior.settings["at"]
        looked_at = [w.says for w in posterior.verdict.witnesses if w.name == OF_ROWS]
        posterior.settings["notes"] += looked_at
        return posterior

    def _start_of(self, settled: dict[str, Any] | None) -> Start:
        """The Gaussian of the globals and the rows at its mean: found, taken over, or read."""
        with scope("float64"):
            if settled is not None:
                return start_at(self.rows, *(np.asarray(x) for x in settled["at"]))
            if self.init is None:
                return find_start(self.rows, self.keys["gaussian"])
        found = moments(self.init, self.keys["gaussian"], self.dtype)
        with scope("float64"):
            return start_at(self.rows, *found)

    def _shared(self, flow: Any, start: Start) -> Any:
        """The family of the globals, before training."""
        if self.init is not None:
            shared = self.init.flow
            return cast(shared.shared if isinstance(shared, LocalFlow) else shared, self.dtype)
        if flow is None:
            flow = default_flow(self.keys["flow"], self.rows.num_globals)
        mean, tril = (jnp.asarray(x, self.dtype) for x in (start.mean, start.tril))
        layer = Freeze(TriangularAffine.from_loc_tril(mean, tril))
        return preconditioned(cast(flow, self.dtype), layer)

    def _family(self, shared: Any, start: Start, *, new: bool) -> tuple[Any, bool]:
        """The family of all coordinates, and whether its locals are those of `init`."""
        rows = self.rows
        if not rows.num_locals:
            return shared, False
        local = None if self.init is None else locals_of(self.init, rows, self.local)
        taken = local is not None
        if local is None:
            features = None if self.local == "per-datum" else features_of(rows)
            local = Locals(jax.random.fold_in(self.keys["flow"], 1), start, features)
            if features is not None and new:
                local = warmed(cast(local, self.dtype), start, self.keys["train"])
        flow = LocalFlow(shared, local, rows.global_index, rows.local_index)
        return cast(flow, self.dtype), taken

    def _drawer(self) -> RowDrawer:
        return self.drawer

    def _inputs(self) -> tuple[Any, ...]:
        return (self.drawer.inputs,)

    def _estimate(self, num_samples: int) -> Callable[..., Any]:
        return minibatch_bound(self.rows, num_samples, self.objective, self.gradient)

    def _ascent(self, static: Any, num_samples: int) -> Ascent:
        """One for all rounds: what is not trained is the same in all of them."""
        if num_samples not in self._ascents:
            self._ascents[num_samples] = super()._ascent(static, num_samples)
        return self._ascents[num_samples]

    def _remedy(self, best: _Best | None, records: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the next round is to do: the plate leaves more training, and more draws."""
        if not records:
            return {"name": "first"}
        left = _MORE[len(records) - 1 :]
        return {"name": left[0]} if left and best is not None else None

    def _judged(self, drawer: RowDrawer, flow: Any) -> _Best:
        return _Best(flow, judge_rows(drawer, to_default(flow), self.keys["verdict"]))

    def _explain(self, flow: Any) -> str:
        """The density by site at a draw where it breaks, if one of a few does: all rows take time."""
        x = self._draw(flow, _EXPLAINED)
        value, grad = jax.lax.map(jax.value_and_grad(self.target.log_prob), x)
        broken = ~(np.isfinite(value) & np.isfinite(grad).all(axis=-1))
        return "At a draw of the last good flow, by site:\n" + site_table(
            self.target, x[int(np.argmax(broken))]
        )
