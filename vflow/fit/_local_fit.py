"""Fits of models with a subsampled plate: minibatches of rows, perhaps with locals of their own."""

import dataclasses
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from vflow._core import combine, partition
from vflow.bijections import Freeze, TriangularAffine
from vflow.diagnostics import psis
from vflow.fit._checks import check_callable, check_choice, check_count, check_optimizer
from vflow.fit._dtype import cast, default_dtype, scope
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._local_draws import RowDrawer, minibatch_bound
from vflow.fit._local_start import Start, find_start
from vflow.fit._loop import Ascent
from vflow.fit._mesh import Layout
from vflow.fit._posterior import Posterior
from vflow.fit._recipe import (
    choose_gradient,
    default_flow,
    default_optimizer,
    precondition,
    to_default,
)
from vflow.fit._verdict import Verdict, Witness, judge
from vflow.objectives import elbo
from vflow.programs import value_and_grad
from vflow.targets import Target
from vflow.targets._rows import Rows
from vflow.targets._site import Site

LOCAL = ("per-datum", "amortised")
NUM_STEPS = 2000
NUM_SAMPLES = 32
_ROUNDS = 2  # how often an unconvincing default fit is trained, at most
_EVALUATIONS = 2e8  # densities of one row that a verdict may cost
_DRAWS = (1000, 16384)  # fewest and most draws of the globals in a verdict
_LOOKED_AT = 64  # rows whose own weights are judged


def fit_subsampled(
    key: PRNGKeyArray, program: Any, settled: dict[str, Any], **options: Any
) -> Posterior:
    """What `vf.fit` does with a model that has a subsampled plate.

    Args:
        key: PRNG key.
        program: made by `vf.from_numpyro`.
        settled: arguments that this kind of fit does not have, by name, as they were given.
        **options: the others.
    """
    for name, value in settled.items():
        if value is not None if name != "precondition" else value != "auto":
            raise ValueError(
                f"fit: {name} is not possible for a model with a subsampled plate; leave it out, or drop "
                "subsample_size."
            )
    check_choice("fit", "local", options["local"], LOCAL)
    check_choice("fit", "gradient", options["gradient"], (None, "total", "path"))
    check_choice("fit", "dtype", options["dtype"], ("auto", "float32", "float64"))
    for name in ("num_steps", "num_samples"):
        if options[name] is not None:
            check_count("fit", name, options[name])
    check_optimizer("fit", options["optimizer"])
    if options["callback"] is not None:
        check_callable("fit", "callback", options["callback"])
    rows, flow = Rows(program), options["flow"]
    if flow is not None and getattr(flow, "shape", None) != (rows.num_globals,):
        raise ValueError(
            f"fit: flow must be a flow of the {rows.num_globals} coordinates outside plate "
            f"{rows.plate!r}, of event shape ({rows.num_globals},), got {getattr(flow, 'shape', flow)!r}."
        )
    rounds = _ROUNDS if options["num_steps"] is None else 1
    options["num_steps"] = options["num_steps"] or NUM_STEPS
    return fit_rows(key, rows, rounds=rounds, **options)


def fit_rows(
    key: PRNGKeyArray,
    rows: Rows,
    *,
    flow: Any,
    local: str,
    gradient: str | None,
    optimizer: optax.GradientTransformation | None,
    num_steps: int,
    num_samples: int | None,
    rounds: int,
    mesh: Any,
    dtype: str,
    progress: bool,
    callback: Any,
) -> Posterior:
    """Start, training on minibatches and verdict, with arguments that are known to be right."""
    began = time.monotonic()
    num_samples = NUM_SAMPLES if num_samples is None else num_samples
    layout = Layout(mesh, rows.whole, num_samples)
    keys = dict(zip(("start", "flow", "train", "verdict"), jax.random.split(key, 4), strict=True))
    dtype = default_dtype() if dtype == "auto" else dtype
    with scope("float64"):
        start = find_start(rows, keys["start"])
    with scope(dtype):
        mean, tril = (jnp.asarray(x, dtype) for x in (start.mean, start.tril))
        if flow is None:
            flow = default_flow(keys["flow"], rows.num_globals)
        flow = precondition(cast(flow, dtype), Freeze(TriangularAffine.from_loc_tril(mean, tril)))
        gradient, note = choose_gradient(gradient, elbo(), flow, _globals_alone(rows))
        if rows.num_locals:
            features = None if local == "per-datum" else _features(rows)
            conditionals = Locals(jax.random.fold_in(keys["flow"], 1), start, features)
            if features is not None:
                conditionals = _warmed(cast(conditionals, dtype), start, keys["train"])
            flow = cast(LocalFlow(flow, conditionals, rows.global_index, rows.local_index), dtype)
    drawer = RowDrawer(rows, dtype, layout, start)
    seconds = {"preparation": round(time.monotonic() - began, 2)}
    began, history, notes = time.monotonic(), np.zeros(0), [] if note is None else [note]
    bound = minibatch_bound(rows, num_samples, gradient, layout)
    with scope(dtype):
        trainable, static = partition(flow)
        trainable = layout.everywhere(trainable)

    def step(key, trainable, inputs):
        estimate = lambda key, t: bound(key, combine(t, static), inputs)
        return layout.replicated(value_and_grad(estimate)(key, trainable))

    ascent = Ascent(step, default_optimizer(num_steps) if optimizer is None else optimizer)
    for number in range(rounds):
        with scope(dtype):
            outcome = ascent.run(
                jax.random.fold_in(keys["train"], number),
                trainable,
                num_steps,
                inputs=(drawer.inputs,),
                progress=progress,
                callback=callback,
                label="fit" if number == 0 else f"fit, round {number + 1}",
            )
            trainable = outcome.params
            fitted = to_default(combine(trainable, static))
        history = np.concatenate([history, outcome.values])
        verdict, looked_at = judge_rows(drawer, fitted, keys["verdict"])
        if outcome.stopped in ("interrupted", "callback"):
            what = "interrupted" if outcome.stopped == "interrupted" else "stopped"
            notes.append(f"Training was {what} after {len(outcome.values)} of {num_steps} steps.")
            break
        if verdict.status == "ok":
            break
    seconds["training and verdict"] = round(time.monotonic() - began, 2)
    notes.append(
        f"Trained on {rows.batch} of the {rows.size} rows of plate {rows.plate!r} at a time, judged on all."
    )
    if looked_at:
        notes.append(looked_at)
    settings = {
        "dtype": dtype,
        "preconditioner": "gaussian",
        "dense": rows.num_globals > 1,
        "gradient": gradient,
        "objective": "elbo",
        "local": local if rows.num_locals else None,
        "num_samples": num_samples,
        "num_steps": len(history),
        "rounds": number + 1,
        "seconds": seconds,
        "notes": notes,
    }
    return Posterior(fitted, rows.whole, verdict, history, settings, drawer=drawer)


def judge_rows(drawer: RowDrawer, flow: Any, key: PRNGKeyArray) -> tuple[Verdict, str | None]:
    """The verdict on all rows: of the globals' weights, and of the locals of some rows.

    Returns:
        The verdict, and a sentence on the rows that were looked at if there are locals.
    """
    rows = drawer.rows
    cost = rows.size * drawer.inner
    num_draws = int(np.clip(_EVALUATIONS / cost, *_DRAWS))
    parts = []
    for i, n in enumerate(_portions(num_draws, drawer.batch)):
        x, log_w = drawer.weighted(flow, jax.random.fold_in(key, i), n)
        parts.append((x[:, rows.global_index], log_w))
    g, log_w = (np.concatenate(part) for part in zip(*parts, strict=True))
    verdict = judge(log_w, draws=np.asarray(g, np.float64), sites=_global_sites(rows))
    if not rows.num_locals:
        return verdict, None
    order = np.random.default_rng(np.asarray(jax.random.key_data(key))).permutation(rows.size)
    numbers = np.sort(order[:_LOOKED_AT])
    weights = drawer.by_row(flow, jax.random.fold_in(key, 1 << 20), numbers, 4096)
    smoothed = [psis(np.asarray(column, np.float64)) for column in weights.T]
    bad = [s.reason is not None or not s.khat < s.threshold for s in smoothed]
    told = (
        f"The locals of {len(numbers)} of {rows.size} rows were judged one by one, given the globals: "
        f"k-hat is at most {max(s.khat for s in smoothed):.2f}. The others enter by their sum only."
    )
    if any(bad):
        worst = numbers[int(np.argmax([s.khat for s in smoothed]))]
        reason = (
            f"the locals of {sum(bad)} of {len(numbers)} rows that were looked at have weights that "
            f"cannot be trusted (k-hat up to {max(s.khat for s in smoothed):.2f}, at row {worst} of plate "
            f"{rows.plate!r}): their conditional posterior is far from a Gaussian."
        )
        status = "failed" if verdict.status == "failed" else "suspect"
        verdict = verdict._replace(status=status, reasons=(*verdict.reasons, reason))
    witness = Witness("locals of some rows", told, not any(bad))
    return verdict._replace(witnesses=(*verdict.witnesses, witness)), told


def _global_sites(rows: Rows) -> list[Site]:
    """The sites outside the plate, with their places among the globals."""
    place = {int(x): i for i, x in enumerate(rows.global_index)}
    return [
        dataclasses.replace(s, start=place[s.start], stop=place[s.start] + s.stop - s.start)
        for s in rows.whole.sites
        if s.start in place and s.stop > s.start
    ]


def _portions(n: int, size: int) -> list[int]:
    """n in pieces of at most `size`: the draws themselves are dropped between them."""
    return [size] * (n // size) + ([n % size] if n % size else [])


def _globals_alone(rows: Rows) -> Target:
    return Target(rows.global_log_prob, rows.num_globals)


def _features(rows: Rows) -> np.ndarray:
    """What the data says of each row: its entries in all arguments that have one entry a row."""
    columns = [
        np.asarray(x, np.float64).reshape(rows.size, -1)
        for x in rows.data.values()
        if np.issubdtype(x.dtype, np.number) or x.dtype == bool
    ]
    if not columns:
        raise ValueError(
            "fit: local='amortised' needs data by row among the model's arguments; use 'per-datum'."
        )
    return np.concatenate(columns, axis=1)


def _warmed(local: Locals, start: Start, key: PRNGKeyArray) -> Locals:
    """The encoder after a regression on the rows' Laplace approximations, in units of its base."""
    loc, slope, scale = (np.asarray(x)[0] for x in local.base.tree)
    inverse = np.linalg.inv(scale)
    spread = np.log(np.diagonal(start.scale, axis1=1, axis2=2) / np.diag(scale))
    goal = [
        (start.loc - loc) @ inverse.T,
        np.clip(spread, -2.5, 2.5),
        np.einsum("ij,njg->nig", inverse, start.slope - slope).reshape(len(start.loc), -1),
    ]
    features = local.features.tree
    goal = jnp.asarray(np.concatenate(goal, axis=1), features.dtype)
    trainable, static = partition(local.encoder)

    def fit(key, trainable, features, goal):
        def loss(trainable):
            pick = jax.random.randint(key, (256,), 0, len(goal))
            out = jax.vmap(combine(trainable, static))(features[pick])
            # A mean that is off counts in units of the row's own scale.
            own = jnp.exp(-goal[pick, loc.size : 2 * loc.size])
            weight = jnp.concatenate(
                [own, jnp.ones_like(own), jnp.repeat(own, slope.shape[1], axis=1)], axis=1
            )
            return -jnp.mean(jnp.sum((weight * (out - goal[pick])) ** 2, axis=1))

        return jax.value_and_grad(loss)(trainable)

    outcome = Ascent(fit, default_optimizer(1500, 1e-2)).run(
        key, trainable, 1500, inputs=(features, goal)
    )
    return eqx.tree_at(lambda x: x.encoder, local, combine(outcome.params, static))
