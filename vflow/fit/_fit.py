"""Fit a flow posterior to a model, and say whether to trust it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Estimate, FitError, combine, partition
from vflow.bijections import AbstractBijection
from vflow.distributions import AbstractDistribution
from vflow.distributions._sampling import as_key
from vflow.fit._checkpoint import Checkpoint, Resumed, key_words, structure_of
from vflow.fit._checks import (
    check_callable,
    check_choice,
    check_count,
    check_optimizer,
)
from vflow.fit._coordinates import choose_coordinates
from vflow.fit._draws import Drawer, extra
from vflow.fit._dtype import cast, default_dtype, scope
from vflow.fit._guide import GuideDistribution, make_guide, name_of
from vflow.fit._loop import Ascent, LoopState, Progress
from vflow.fit._mixing import Mixed, mixed
from vflow.fit._posterior import Posterior
from vflow.fit._precondition import Gaussian
from vflow.fit._recipe import (
    NUM_SAMPLES,
    NUM_STEPS,
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
from vflow.flows.stochastic import StochasticFlow
from vflow.programs import expect, value_and_grad
from vflow.targets import Target, decentre, preflight, site_table
from vflow.targets import target as make_target

_VERDICT_DRAWS = 16384
_ROUNDS = 3  # how often an unconvincing default fit is trained, at most
# The bound is tight when the spread of log p - log q says KL < 5e-4 nats (second-order expansion).
_TIGHT = 5e-4
_WARM = 1 << 20  # folded into the key of training, beyond any round
_GUIDE_RATE = 1e-2  # a guide has no preconditioner that would bring it near


def fit(
    key: PRNGKeyArray,
    program_or_target: Any,
    *,
    flow: AbstractDistribution | StochasticFlow | None = None,
    init: Any = None,
    guide: Any = None,
    params: Any = None,
    objective: Callable[[Any, Any], Any] | None = None,
    gradient: str | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int | None = None,
    num_samples: int | None = None,
    precondition: str | AbstractBijection | None = "auto",
    progress: bool = True,
    callback: Callable[[Progress], Any] | None = None,
    checkpoint: Any = None,
    dtype: str = "auto",
) -> Posterior:
    r"""Fit a flow to a model's posterior on unconstrained $R^d$; the result knows its own quality.

    $$\max_\theta\; E_{x \sim q_\theta}[\log \tilde p(x) - \log q_\theta(x)]$$

    In order: the density is checked at the starting points; a Gaussian is fitted in float64 and
    becomes the affine layer behind the flow; the flow is trained on the whitened space by
    stochastic ascent with the path gradient; fresh draws give k-hat, effective sample size and
    evidence. A default call whose verdict is not "ok" trains up to twice more before it says so.

    Args:
        key: PRNG key; the fit is a deterministic function of it.
        program_or_target: what `vf.from_numpyro` returns, a `vf.Target`, or a log density (with
            `flow`, whose shape then gives the dimension).
        flow: the family, on `(dim,)`, unconditional; affine coupling layers by default. A stochastic
            flow (`vf.flows.stochastic_flow`) gets the target by itself.
        init: a `Posterior` of the same model, perhaps with other data, whose flow and coordinates to
            start from instead: no preconditioner is fitted.
        guide: instead of a flow, a guide over the model's sites that takes its parameters as an
            argument: a program, `vf.from_numpyro(guide)` or a `vf.program`, whose next argument they
            are, or a function from them to a program. Not preconditioned.
        params: the guide's parameters to start from, any pytree; `posterior.flow.params` at the end.
        objective: `objective(q, p) -> scalar` to be maximised, as in `vf.objectives`; the ELBO
            by default.
        gradient: "path", "total", or "auto" (their mixture of least variance, estimated as it
            goes); None takes path where objective and flow admit it.
        optimizer: an optax transformation; clipped Adam with cosine decay by default.
        num_steps: gradient steps; 2000 by default, then also up to twice more if needed.
        num_samples: draws behind each gradient; 128 by default.
        precondition: "auto" fits the affine layer, after a change of coordinates where that helps: sites
            of a NumPyro model whose scale depends on other sites are decentred. None leaves both
            out; or a bijection to use.
        progress: whether to show a progress bar.
        callback: called with a `Progress` after every 100 steps; a true value stops training.
        checkpoint: path of a file written every 100 steps; the same call goes on from it.
        dtype: "float32" or "float64" to compute in; "auto" takes float64 where float32 breaks.

    Returns:
        A `Posterior`. Ctrl-C ends training early and returns what there is.

    Raises:
        ProgramError: the model is not one that can be fitted; the site is named.
        FitError: the log density or its gradient is not finite where it is needed.
        TypeError, ValueError: an argument is wrong; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> target = vf.Target(lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), dim=2)
        >>> posterior = vf.fit(jax.random.key(0), target, num_steps=100, progress=False)
        >>> print(posterior.status, f"{float(posterior.log_evidence):.2f}")
        ok 1.84

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770); Agrawal, Sheldon & Domke 2020 (arXiv 2006.10343)
        for the recipe; Yao, Vehtari, Simpson & Gelman 2018 (arXiv 1802.02538) for the verdict.
    """
    key = as_key(key)
    target = _target(program_or_target, flow)
    if init is not None:
        target, flow, precondition = _warm(target, init, flow, guide, precondition)
    if guide is not None or params is not None:
        _check_guide(guide, flow, precondition)
        flow, precondition = make_guide(guide, params, target), None
    optimizer = check_optimizer("fit", optimizer)
    escalate = num_steps is None
    num_steps = check_count("fit", "num_steps", NUM_STEPS if num_steps is None else num_steps)
    num_samples = NUM_SAMPLES if num_samples is None else num_samples
    num_samples = check_count("fit", "num_samples", num_samples)
    check_choice("fit", "gradient", gradient, (None, "total", "path", "auto"))
    check_choice("fit", "dtype", dtype, ("auto", "float32", "float64"))
    for name, value in (("objective", objective), ("callback", callback)):
        if value is not None:
            check_callable("fit", name, value)
    _check_flow(flow, target.dim)
    _check_precondition(precondition, target.dim)
    if dtype == "float32" and default_dtype() == "float64":
        raise ValueError(
            "fit: dtype='float32' under jax_enable_x64 is not supported; switch x64 off."
        )

    run = _Run(target, key, objective, gradient, optimizer, num_steps, num_samples)
    file = None if checkpoint is None else Checkpoint(checkpoint, run.identity(flow, precondition))
    run.prepare(flow, precondition, dtype, file)
    return run.train(_ROUNDS if escalate else 1, progress, callback)


class _Run:
    """One fit: settled by `prepare`, carried out by `train`."""

    def __init__(self, target, key, objective, gradient, optimizer, num_steps, num_samples):
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
            "flow": None if flow is None else _structure(flow),
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
        drawer = Drawer(self.target, self.dtype)
        with scope(self.dtype):
            resumed: Resumed | None = None
            if self.resuming:
                resumed = self.file.resume(  # pyright: ignore[reportOptionalMemberAccess]
                    self.flow, self.optimizer.init, partition
                )
                self.flow = resumed.flow
            trainable, static = partition(self.flow)
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
        estimate = expect(
            lambda flow: self.objective(flow, self.target), self.num_samples, gradient=self.gradient
        )

        def step(key, trainable):
            return value_and_grad(lambda key, t: estimate(key, combine(t, static)))(key, trainable)

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


def _target(program: Any, flow: Any) -> Target:
    if isinstance(program, AbstractDistribution | StochasticFlow):
        raise TypeError(
            "fit: the second argument must be a program, a Target or a log density, got a "
            f"{type(program).__name__}; the family goes to flow=."
        )
    if callable(program) and not isinstance(program, Target) and not hasattr(program, "log_prob"):
        if flow is None:
            raise TypeError(
                "fit: a bare function has no dimension: pass vf.Target(log_density, dim), or "
                "vf.from_numpyro(model, *args) for a NumPyro model."
            )
        _check_flow(flow, None)
        return Target(program, flow.shape[0])
    return make_target(program)


def _warm(
    target: Target, init: Any, flow: Any, guide: Any, precondition: Any
) -> tuple[Target, AbstractDistribution, None]:
    """Target, flow and preconditioner of a fit that starts from another."""
    if not isinstance(init, Posterior):
        raise TypeError(f"fit: init must be a Posterior, got {type(init).__name__}.")
    if flow is not None or guide is not None or precondition != "auto":
        raise ValueError(
            "fit: init brings its flow and coordinates: pass no flow, guide, precondition."
        )
    if isinstance(init.flow, GuideDistribution):
        raise ValueError("fit: init is the fit of a guide: pass guide=, params=init.flow.params.")
    theirs, ours = ([(s.name, s.shape) for s in t.sites] for t in (init.target, target))
    if theirs != ours:
        raise ValueError(
            f"fit: init is a fit of another model: its sites are {theirs}, not {ours}."
        )
    return decentre(target, tuple(init.settings.get("decentred", ()))), init.flow, None


def _structure(flow: Any) -> str:
    if isinstance(flow, GuideDistribution):
        return f"{name_of(flow.setting.guide)} {structure_of(flow.params)}"
    return structure_of(flow)


def _check_guide(guide: Any, flow: Any, precondition: Any) -> None:
    if guide is None:
        raise ValueError("fit: params= are the parameters of a guide: pass guide= too.")
    if flow is not None:
        raise ValueError("fit: flow and guide are two families: pass one of them.")
    if precondition not in ("auto", None):
        raise ValueError("fit: precondition is for flows; a guide has its own coordinates.")


def _check_flow(flow: Any, dim: int | None) -> None:
    if flow is None:
        return
    if not isinstance(flow, AbstractDistribution | StochasticFlow):
        raise TypeError(f"fit: flow must be a flow, as vf.flows.coupling(key, dim), got {flow!r}.")
    if len(flow.shape) != 1 or (dim is not None and flow.shape != (dim,)):
        raise ValueError(
            f"fit: flow has event shape {flow.shape}, the target needs ({dim or 'dim'},)."
        )
    if flow.condition_shape is not None:
        raise ValueError("fit: flow takes a condition; a posterior needs an unconditional flow.")


def _check_precondition(precondition: Any, dim: int) -> None:
    if precondition is None or precondition == "auto":
        return
    if not isinstance(precondition, AbstractBijection):
        raise ValueError(
            f"fit: precondition must be 'auto', None or a bijection, got {precondition!r}."
        )
    if precondition.shape != (dim,):
        raise ValueError(
            f"fit: precondition has event shape {precondition.shape}, the target needs ({dim},)."
        )
