"""From an objective program to an unbiased estimator of its expectation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import ProgramError, combine, partition, stop_gradient
from vflow.programs._frame import (
    GRADIENTS,
    Frame,
    NeedsLanes,
    Plan,
    Run,
    current_mixing,
    enclosing_run,
    magic,
    placed,
    running,
)
from vflow.programs._linearity import analyse
from vflow.programs._mixing import cross_fitted
from vflow.programs._nested import check_linear, is_random, mark
from vflow.programs._path_rule import Rule, by_rule, rule_for
from vflow.programs._path_run import NeedsPath, PathRun

_EMA_DECAY = 0.8


def expect(
    objective: Callable[..., Any], num_samples: int = 1, *, gradient: str = "total"
) -> Callable[..., Array]:
    r"""Turn an objective program into a scalar function, unbiased in value and gradient.

    $\mathbb{E}[S(k, \theta)] = \mathbb{E}[\mathrm{objective}(\theta)]$ and
    $\mathbb{E}[\nabla S(k, \theta)] = \nabla\,\mathbb{E}[\mathrm{objective}(\theta)]$ over $k$.

    A program without discrete choices is run once, as it stands. Otherwise an abstract pass finds
    the sites that need alternatives, and the program is run under `jax.vmap` over lanes: one axis
    per enumerated site, and one shared axis of 1 + sum(alternatives) lanes for the rest.

    Args:
        objective: a function that draws with `vf.sample` or `simulate()` and returns a scalar; it
            may return None when it registers `vf.cost`s.
        num_samples: independent runs that are averaged.
        gradient: what `simulate()` defaults to inside: "total"; "path", unbiased in any program
            (see the guide to path gradients); or "auto", a mixture of the two whose coefficient is
            estimated from the other samples, or from earlier steps in `vf.fit` and `vf.maximize`.

    Returns:
        `S(key, *args) -> scalar`; jit, vmap and grad apply to it.

    Raises:
        ProgramError: for an objective that is not a scalar, duplicate names, a site inside a raw
            JAX transformation, a strategy that does not apply; naming the site and the remedy.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     b = vf.sample("b", dist.Bernoulli(probs=t), vf.enum())
        ...     return 2.0 * b
        >>> estimate = vf.expect(objective)
        >>> value, slope = jax.value_and_grad(estimate, argnums=1)(jax.random.key(0), 0.25)
        >>> print(f"{value:.2f} {slope:.2f}")
        0.50 2.00

    Source: Becker et al., Probabilistic Programming with Programmable Variational Inference (2024);
    Foerster et al., DiCE (2018).
    """
    if not callable(objective):
        raise TypeError(f"objective must be a function, got {type(objective).__name__}.")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}.")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}.")

    def estimate(key: PRNGKeyArray, *args: Any) -> Array:
        value, outer = evaluate(key, *args), enclosing_run()
        if outer is None or not is_random(lambda key: evaluate(key, *args), key):
            return value
        name = getattr(objective, "__name__", type(objective).__name__)
        outer.nested.append(f"{len(outer.nested)} {name}")
        return mark(value, outer.nested[-1])

    def evaluate(key: PRNGKeyArray, *args: Any) -> Array:
        nested: list[str] = []
        keys = key if num_samples == 1 else placed(jax.random.split(key, num_samples))
        first = key if num_samples == 1 else keys[0]
        over_samples: Callable[..., Any] = (lambda f: f) if num_samples == 1 else jax.vmap

        def execute(key, plan, path, taken=args, *, frozen=False, **run):
            frame = Frame(
                key, gradient, run=Run(num_samples, plan, path=path, nested=nested, **run)
            )
            taken = stop_gradient(taken) if frozen else taken
            return *_run(objective, taken, frame), frame.exports

        try:
            plain = over_samples(lambda k: execute(k, None, None)[:2])(keys)
            if nested:
                check_linear(lambda key: execute(key, None, None)[0], first)
            return _average(*plain)
        except (NeedsLanes, NeedsPath):
            plan, rule = _prepare(execute, first, nested)

        def one(key, mix, taken=args):
            def in_lane(lane, indices):
                def run(path, *, frozen):
                    return execute(
                        key, plan, path, taken, frozen=frozen, lane=lane, indices=indices
                    )

                return run(None, frozen=False)[:2] if rule is None else by_rule(run, rule, mix)

            return in_lane(None, {}) if plan is None else _over_lanes(in_lane, plan)

        if rule is None or not rule.auto:
            return _average(*over_samples(lambda key: one(key, None))(keys))
        given = current_mixing()
        if given is not None:
            given.used = True
            return _average(*over_samples(lambda key: one(key, given.share))(keys))
        if num_samples == 1:
            return _average(*one(keys, None))
        mixes = cross_fitted(
            lambda key, mix, args: one(key, mix, args)[0], keys, stop_gradient(args)
        )
        return _average(*jax.vmap(one)(keys, mixes))

    return estimate


def _prepare(
    execute: Callable[..., Any], key: Any, nested: list[str]
) -> tuple[Plan | None, Rule | None]:
    """Abstract passes: which sites need lanes, what the path gradients need, nested estimates."""
    path = PathRun("trace")
    try:
        report = analyse(lambda key: execute(key, None, path)[0], key)
        if nested:
            check_linear(lambda key: execute(key, None, path)[0], key)
        return None, rule_for(report, path.units)
    except NeedsLanes:
        plan = Plan()
    jax.eval_shape(lambda key: execute(key, plan, path, discovering=True)[0], key)

    def in_lane(key, lane, indices):
        return execute(key, plan, path, lane=lane, indices=indices)[0]

    lane = jnp.zeros((), int) if plan.num_lanes > 1 else None
    inputs = key, lane, {name: jnp.zeros((), int) for name in plan.enums}
    if nested:
        check_linear(in_lane, *inputs)
    if not path.units and not path.estimated:
        return plan, None
    return plan, rule_for(analyse(in_lane, *inputs), path.units)


def _run(
    objective: Callable[..., Any], args: tuple, frame: Frame
) -> tuple[Array, dict[str, Array]]:
    """One run: its weighted total, and the coefficients of baselines that need other samples."""
    with running(frame):
        result = objective(*args)
    totals = frame.totals
    if result is not None:
        result = jnp.asarray(result)
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.inexact):
            raise ProgramError(
                "an objective must return a real scalar (or None, after vf.cost), got shape "
                f"{result.shape} and dtype {result.dtype}: sum over what should be added."
            )
        frame.add_cost(result)
    if "cost" not in totals:
        raise ProgramError(
            "the objective returned None and registered no vf.cost: return a scalar."
        )
    total = totals["cost"] + totals.get("control", 0.0)

    lane = frame.run.lane
    on_base = 1.0 if lane is None else jnp.where(lane == 0, 1.0, 0.0)
    enumerated = 1.0
    if "log_weight" in totals:
        enumerated = jnp.exp(totals["log_weight"])
        # 0 * inf: an alternative of probability 0 contributes nothing.
        total = jnp.where((enumerated == 0) & ~jnp.isfinite(total), 0.0, total)
    value = total
    if "lane_weight" in totals:
        first = 1.0 + totals["base_weight"] if "base_weight" in totals else 1.0
        value = value * jnp.where(lane == 0, first, totals["lane_weight"])
    elif lane is not None:
        value = value * on_base
    if "log_weight" in totals:
        value = value * enumerated
    share = jax.lax.stop_gradient(enumerated * on_base)
    if "fit_linear" in totals:
        detached = jax.lax.stop_gradient(total)
        loss = totals["fit_linear"] * detached - 0.5 * totals["fit_square"]
        value = value + share * (loss - jax.lax.stop_gradient(loss))
    return value, {k: share * (magic(totals[k]) - 1.0) for k in ("loo", "ema") if k in totals}


def _over_lanes(run: Callable, plan: Plan) -> tuple[Array, dict[str, Array]]:
    """Sum the run over the lanes of the plan: one axis per enumerated site, one for the rest."""
    names = list(plan.enums)

    def positional(lane, *indices):
        return run(lane, dict(zip(names, indices, strict=True)))

    for i in range(len(names)):
        axes: list[int | None] = [None] * (len(names) + 1)
        axes[i + 1] = 0
        positional = jax.vmap(positional, in_axes=tuple(axes))
    indices = [jnp.arange(plan.enums[name]) for name in names]
    if plan.num_lanes > 1:
        over = jax.vmap(positional, in_axes=(0, *([None] * len(names))))
        out = over(jnp.arange(plan.num_lanes), *indices)
    else:
        out = positional(None, *indices)
    return jax.tree.map(jnp.sum, out)


def _average(values: Array, coefficients: dict[str, Array]) -> Array:
    """The mean over samples, less the baselines that are made of the other samples."""
    if values.ndim == 0:
        return values
    n = values.shape[0]
    mean = values.mean()
    others = jax.lax.stop_gradient(values)
    for kind, coefficient in coefficients.items():
        if kind == "loo":
            baseline = (others.sum() - others) / (n - 1)
        else:
            age = jnp.arange(n)[:, None] - jnp.arange(n)[None, :] - 1
            weights = jnp.where(age >= 0, _EMA_DECAY ** jnp.maximum(age, 0), 0.0).astype(
                others.dtype
            )
            baseline = weights @ others / jnp.maximum(weights.sum(axis=1), 1.0)
        mean = mean - (coefficient * baseline).mean()
    return mean


def value_and_grad(
    estimate: Callable[..., Array], argnum: int = 0
) -> Callable[..., tuple[Array, Any]]:
    """`(key, *args) -> (value, gradient)` with respect to the trainable leaves of one argument.

    Args:
        estimate: `S(key, *args)`, as `vf.expect` returns it.
        argnum: which of `args` to differentiate.

    Returns:
        A function; the gradient has the structure of `vf.params(args[argnum])`.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     return -vf.sample("x", dist.Normal(t, 1.0)) ** 2
        >>> estimate = vf.expect(objective)
        >>> t = jax.numpy.array(0.7)
        >>> value, grad = vf.value_and_grad(estimate)(jax.random.key(0), t)
    """

    def wrapped(key: PRNGKeyArray, *args: Any) -> tuple[Array, Any]:
        trainable, static = partition(args[argnum])

        def loss(trainable):
            full = list(args)
            full[argnum] = combine(trainable, static)
            return estimate(key, *full)

        return jax.value_and_grad(loss)(trainable)

    return wrapped
