"""The default recipe as a pure function, for many small fits at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from vflow._core import combine, partition
from vflow.bijections import Freeze, TriangularAffine
from vflow.distributions import AbstractDistribution
from vflow.fit._checks import check_callable, check_count
from vflow.fit._pareto import khat
from vflow.fit._recipe import default_optimizer, precondition
from vflow.flows import coupling
from vflow.objectives import elbo
from vflow.programs import expect, value_and_grad
from vflow.programs._numpyro import NumpyroProgram
from vflow.targets import Target
from vflow.targets import target as make_target
from vflow.targets._target import on_arguments

_NEWTON_STEPS = 40
_GAUSSIAN_STEPS = 20
_NUM_PAIRS = 32
_SIZES = tuple(2.0**-i for i in range(12))  # of a Newton step, tried side by side
_RHOS = (1.0, 0.5, 0.25, 0.1, 0.02)  # of a natural-gradient step, likewise
_FLOOR = 1e-6  # of a curvature, relative to the largest


class Fitted(NamedTuple):
    """What a fit by `fit_fn` returns: arrays, so that a batch of fits has a leading axis.

    Attributes:
        flow: the fitted flow on unconstrained $R^d$, preconditioning included.
        khat: Pareto k-hat of the importance weights of fresh draws; trusted below 0.7.
        ess_fraction: their effective sample size over their number, in (0, 1].
        log_evidence: the importance sampling estimate of log Z, in nats.
        elbo: the evidence lower bound on the same draws, in nats.
        history: the bound by step, shape (num_steps,); NaN where a step was skipped.
    """

    flow: Any
    khat: Array
    ess_fraction: Array
    log_evidence: Array
    elbo: Array
    history: Array


def fit_fn(
    program_or_density: Any,
    dim: int | None = None,
    *,
    make_flow: Callable[[PRNGKeyArray], AbstractDistribution] | None = None,
    num_steps: int = 500,
    num_samples: int = 32,
    num_draws: int = 4096,
) -> Callable[..., Fitted]:
    r"""A pure function `(key, *data) -> Fitted` that fits a flow; it can be jitted and vmapped.

    For many small fits of one model to different data, where `vf.fit`, which looks at what it does
    between compiled steps, would be called in a loop. The recipe is fixed: saddle-free Newton steps from
    the origin to a mode, natural-gradient steps of a full-covariance Gaussian, whose affine layer then
    stands behind the flow, `num_steps` of Adam with the path gradient, and k-hat, effective sample size
    and evidence of fresh draws. There is one start, no choice of coordinates or float type and
    no escalation: look at `khat` and `ess_fraction` of each fit, and give those that are poor to
    `vf.fit`. Hessians are formed: meant for up to some fifty coordinates.

    Args:
        program_or_density: a program made by `vf.from_numpyro`, whose positional arguments stand for
            the shapes of `data`; or `log_density(x, *data) -> scalar` for x of shape (dim,).
        dim: the number of coordinates of a log density.
        make_flow: key -> flow on (dim,); affine coupling layers by default.
        num_steps: gradient steps.
        num_samples: draws behind each gradient.
        num_draws: fresh draws behind the verdict, at least 100.

    Returns:
        A function of a key and of data, arrays of one shape for all fits. Nothing is raised in it:
        what cannot be fitted comes back with a NaN or infinite `khat`.

    Raises:
        TypeError, ValueError: an argument is wrong; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> def log_density(x, y):  # y ~ Normal(x, 1), x ~ Normal(0, 1)
        ...     return -0.5 * jnp.sum(x**2) - 0.5 * jnp.sum((y - x) ** 2)
        >>> run = jax.jit(jax.vmap(vf.fit_fn(log_density, dim=1, num_steps=20), (None, 0)))
        >>> fits = run(jax.random.key(0), jnp.array([[-1.0], [3.0]]))
        >>> draws = jax.vmap(lambda flow: flow.sample(jax.random.key(1)))(fits.flow)
        >>> print(fits.ess_fraction.round(1), draws.shape)
        [1. 1.] (2, 1)

    Source:
        Dauphin et al. 2014 (arXiv 1406.2572) for the Newton steps; Lin, Schmidt & Khan 2020 (arXiv
        2002.10060) for the Gaussian; Agrawal, Sheldon & Domke 2020 (arXiv 2006.10343).
    """
    for name, value in (("num_steps", num_steps), ("num_samples", num_samples)):
        check_count("fit_fn", name, value)
    if check_count("fit_fn", "num_draws", num_draws) < 100:
        raise ValueError(f"fit_fn: num_draws must be at least 100, got {num_draws}.")
    bind, dim = _binding(program_or_density, dim)
    if make_flow is None:
        make_flow = lambda key: coupling(key, dim)
    check_callable("fit_fn", "make_flow", make_flow)
    shape = jax.eval_shape(lambda: make_flow(jax.random.key(0)).sample(jax.random.key(0))).shape
    if shape != (dim,):
        raise ValueError(f"fit_fn: make_flow gives event shape {shape}, not ({dim},).")
    noise = np.random.default_rng(0).standard_normal((_NUM_PAIRS, dim))

    def run(key: PRNGKeyArray, *data: Any) -> Fitted:
        target = bind(data)
        flow_key, train_key, draw_key = jax.random.split(key, 3)
        pairs = jnp.asarray(np.concatenate([noise, -noise]), float)
        loc, tril = _gaussian(target.log_prob, *_mode(target.log_prob, jnp.zeros(dim)), pairs)
        flow = precondition(make_flow(flow_key), Freeze(TriangularAffine.from_loc_tril(loc, tril)))
        flow, history = _train(train_key, flow, target, num_steps, num_samples)
        keys = jax.random.split(draw_key, num_draws)
        x, log_q = jax.vmap(flow.sample_and_log_prob)(keys)
        log_w = jax.vmap(target.log_prob)(x) - log_q
        top = jnp.max(log_w)
        weights = jnp.exp(log_w - top)
        return Fitted(
            flow,
            khat(log_w),
            jnp.sum(weights) ** 2 / jnp.sum(weights**2) / num_draws,
            top + jnp.log(jnp.mean(weights)),
            jnp.mean(log_w),
            history,
        )

    return run


def _binding(program: Any, dim: int | None) -> tuple[Callable[[tuple[Any, ...]], Target], int]:
    """A function from data to the target, and its dimension."""
    if isinstance(program, NumpyroProgram):
        if dim is not None:
            raise ValueError("fit_fn: dim is for a log density; a program knows its own.")
        template = make_target(program)
        kwargs = program.call.kwargs

        def bound(data: tuple[Any, ...]) -> Target:
            if not data:
                return template
            if len(data) != len(program.call.args):
                raise TypeError(
                    f"fit_fn: the program has {len(program.call.args)} positional arguments, got "
                    f"{len(data)}."
                )
            return on_arguments(template, data, kwargs)

        return bound, template.dim
    if not callable(program) or isinstance(program, Target):
        raise TypeError(
            "fit_fn takes a program made by vf.from_numpyro or a function log_density(x, *data), got "
            f"{type(program).__name__}."
        )
    if dim is None:
        raise TypeError("fit_fn: a log density has no dimension: pass dim.")
    dim = check_count("fit_fn", "dim", dim)
    return lambda data: Target(lambda x: program(x, *data), dim), dim


def _finite_or(value: Array, other: float) -> Array:
    return jnp.where(jnp.isfinite(value), value, other)


def _mode(log_prob: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """A mode near x, and a square root of the inverse |curvature| there."""

    def spectrum(x):
        hessian = jax.hessian(log_prob)(x)
        values, vectors = jnp.linalg.eigh(-(hessian + hessian.T) / 2)
        size = jnp.abs(values)
        return jnp.maximum(size, _FLOOR * jnp.maximum(jnp.max(size), 1.0)), vectors

    def step(carry, _):
        x, value = carry
        values, vectors = spectrum(x)
        move = vectors @ ((vectors.T @ jax.grad(log_prob)(x)) / values)
        trials = x[None, :] + jnp.asarray(_SIZES, x.dtype)[:, None] * _finite_or(move, 0.0)[None, :]
        heights = _finite_or(jax.vmap(log_prob)(trials), -jnp.inf)
        best = jnp.argmax(heights)
        higher = heights[best] > value
        return (jnp.where(higher, trials[best], x), jnp.where(higher, heights[best], value)), None

    start = _finite_or(log_prob(x), -jnp.inf)
    (x, _), _ = jax.lax.scan(step, (x, start), length=_NEWTON_STEPS)
    values, vectors = spectrum(x)
    return x, _triangular(vectors / jnp.sqrt(values)[None, :])


def _triangular(root: Array) -> Array:
    """The lower Cholesky factor of root @ root.T."""
    upper = jnp.linalg.qr(root.T, mode="r")
    return (upper * jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0)[:, None]).T


def _gaussian(
    log_prob: Callable[[Array], Array], loc: Array, tril: Array, noise: Array
) -> tuple[Array, Array]:
    """Mean and Cholesky factor of the Gaussian with the best bound over fixed draws."""
    dim = loc.shape[0]

    def bound(loc, tril):
        values = jax.vmap(log_prob)(loc[None, :] + noise @ tril.T)
        scales = jnp.diagonal(tril)
        value = jnp.mean(values) + jnp.sum(jnp.log(jnp.where(scales > 0, scales, jnp.nan)))
        return _finite_or(value, -jnp.inf)

    def step(carry, _):
        loc, tril, value = carry
        points = loc[None, :] + noise @ tril.T
        grad = jnp.mean(jax.vmap(jax.grad(log_prob))(points), axis=0)
        hessian = jnp.mean(jax.vmap(jax.hessian(log_prob))(points), axis=0)
        white = -tril.T @ hessian @ tril
        turn = (white + white.T) / 2 - jnp.eye(dim, dtype=loc.dtype)
        eigen, vectors = jnp.linalg.eigh(_finite_or(turn, 0.0))

        def moved(rho):
            precision = 1 + rho * eigen + 0.5 * rho**2 * eigen**2  # at least 1/2
            root = tril @ (vectors / jnp.sqrt(precision)[None, :])
            return loc + rho * root @ (root.T @ _finite_or(grad, 0.0)), _triangular(root)

        locs, trils = jax.vmap(moved)(jnp.asarray(_RHOS, loc.dtype))
        bounds = jax.vmap(bound)(locs, trils)
        best = jnp.argmax(bounds)
        better = bounds[best] > value
        keep = lambda new, old: jnp.where(better, new[best], old)
        return (keep(locs, loc), keep(trils, tril), keep(bounds, value)), None

    start = (loc, tril, bound(loc, tril))
    (loc, tril, _), _ = jax.lax.scan(step, start, length=_GAUSSIAN_STEPS)
    return loc, tril


def _train(
    key: PRNGKeyArray, flow: Any, target: Target, num_steps: int, num_samples: int
) -> tuple[Any, Array]:
    """The flow after stochastic ascent of the ELBO, and the bound by step."""
    refusal = flow.path_refusal() if hasattr(flow, "path_refusal") else "no path gradient"
    objective = elbo()
    estimate = expect(
        lambda flow: objective(flow, target),
        num_samples,
        gradient="path" if refusal is None else "total",
    )
    trainable, static = partition(flow)
    optimizer = default_optimizer(num_steps)

    def step(carry, key):
        params, state = carry
        value, grad = value_and_grad(lambda key, t: estimate(key, combine(t, static)))(key, params)
        updates, new_state = optimizer.update(jax.tree.map(jnp.negative, grad), state, params)
        new = optax.apply_updates(params, updates), new_state
        leaves = jax.tree.leaves((value, grad, new[0]))
        sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        carry = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, carry)
        return carry, jnp.where(sound, value, jnp.nan)

    start = (trainable, optimizer.init(trainable))
    (trainable, _), history = jax.lax.scan(step, start, jax.random.split(key, num_steps))
    return combine(trainable, static), history
