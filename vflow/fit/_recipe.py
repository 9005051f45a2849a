"""The default choices of a fit: float type, flow, gradient, optimiser."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from vflow._core import ProgramError
from vflow._core._compile import filter_jit_once, jit_once
from vflow.bijections import Affine, Chain, Freeze, SinhArcsinhTransformer, TriangularAffine
from vflow.distributions import Flow, Mixture
from vflow.fit._cover import Cover
from vflow.fit._dtype import cast, default_dtype
from vflow.fit._low_rank import LowRank
from vflow.fit._precondition import DENSE_LIMIT, Gaussian
from vflow.flows import coupling
from vflow.flows.stochastic import StochasticFlow
from vflow.objectives import elbo
from vflow.programs import expect
from vflow.targets import Target

# float32 will do if rounding moves the log density by less than this between draws, in nats.
_ROUNDING = 0.02
_NEAR = 0.02  # nats: means and sds of the best Gaussian are right to first order of this, not of its root
_OUTSIDE = 0.4  # share of the mass outside the Gaussian from which on it is no place to start


def choose_dtype(target: Target, gaussian: Gaussian | None) -> tuple[str, str | None]:
    """The float type to compute in, and a sentence if it is not the caller's default.

    float32 is kept where it reproduces the float64 log density on draws of the Gaussian fit, up to
    a constant.
    """
    if default_dtype() == "float64" or gaussian is None:
        return default_dtype(), None
    x, exact = gaussian.draws[:64], gaussian.log_p[:64]
    rounded = np.asarray(jit_once(jax.vmap(target.log_prob))(x.astype(np.float32)), np.float64)
    known = np.isfinite(exact)
    if not np.isfinite(rounded[known]).all():
        return "float64", (
            "Computed in float64: in float32 the log density is not finite at "
            f"{int((~np.isfinite(rounded[known])).sum())} of {int(known.sum())} points."
        )
    error = float(np.std((rounded - exact)[known])) if known.any() else 0.0
    if error > _ROUNDING:
        return "float64", (
            f"Computed in float64: rounding to float32 moves the log density by {error:.2g} nats."
        )
    return "float32", None


def covering(gaussian: Gaussian | None) -> Cover | None:
    """Draws to start from, where much of the target's mass is known to lie outside the Gaussian."""
    cover = None if gaussian is None else gaussian.cover
    if gaussian is None or cover is None or not cover.trusted:
        return None
    return cover if cover.outside(gaussian.loc, gaussian.tril) > _OUTSIDE else None


def near(gaussian: Gaussian | None) -> bool:
    """Whether the target is as good as Gaussian, so that there is nothing to train."""
    return gaussian is not None and gaussian.gap() < _NEAR


def whitening(gaussian: Gaussian, dtype: str) -> Freeze:
    """The affine layer that carries the standard normal to the Gaussian fit; not trained."""
    if len(gaussian.loc) > DENSE_LIMIT:
        factors = gaussian.factors or LowRank.identity(len(gaussian.loc))
        return factors.layer(gaussian.loc, dtype)
    loc, tril = jax.numpy.asarray(gaussian.loc, dtype), jax.numpy.asarray(gaussian.tril, dtype)
    if np.count_nonzero(gaussian.tril) > len(gaussian.loc):
        return filter_jit_once(lambda m, t: Freeze(TriangularAffine.from_loc_tril(m, t)))(loc, tril)
    return Freeze(Affine(loc, jax.numpy.diagonal(tril)))


def default_flow(key: PRNGKeyArray, dim: int, *, bent: bool = False) -> Flow:
    """Affine coupling layers, or spline ones where the target is far from a Gaussian."""
    transformer = "spline" if bent else "affine" if dim > 1 else SinhArcsinhTransformer()
    return filter_jit_once(
        lambda key: coupling(key, dim, transformer=transformer, num_layers=8, hidden=(32, 32))
    )(key)


def precondition(flow: Any, layer: Any) -> Flow | Mixture | StochasticFlow:
    """The flow with one more affine layer behind it."""
    if isinstance(flow, Mixture | StochasticFlow):
        return flow.through(layer)
    if isinstance(flow, Flow):
        return Flow(flow.base, Chain([flow.bijection, layer]))
    return Flow(flow, layer)


def default_optimizer(num_steps: int, rate: float | None = None) -> optax.GradientTransformation:
    """Adam with cosine decay and a bound on the norm of the gradient."""
    schedule = optax.cosine_decay_schedule(rate or 3e-3, num_steps, alpha=0.01)
    return optax.flatten(optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule)))


def choose_objective(objective: Callable | None) -> Callable:
    """The ELBO by default."""
    return elbo() if objective is None else objective


def choose_gradient(
    gradient: str | None, objective: Callable, flow: Any, target: Target
) -> tuple[str, str | None]:
    """The gradient rule and a sentence if it is not "path"; explicit wishes are met or refused.

    Raises:
        ValueError: `gradient="path"` where objective or flow do not admit it.
    """
    if gradient == "total":
        return "total", None
    if hasattr(flow, "path_refusal"):
        reason = flow.path_refusal()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        reason = f"{type(flow).__name__} has no path gradient"
    if reason is None:
        estimate = expect(lambda flow: objective(flow, target), gradient="path")
        try:
            eqx.filter_eval_shape(estimate, jax.random.key(0), flow)
        except ProgramError as error:
            name = getattr(objective, "__name__", type(objective).__name__)
            reason = f"in objective {name}, {error}".removesuffix(".")
    if reason is None:
        return gradient or "path", None
    if gradient is not None:
        raise ValueError(
            f"fit: gradient={gradient!r} is not possible: {reason}. Use gradient='total'."
        )
    return "total", f"Ordinary gradient instead of path: {reason}."


def to_default(tree: Any) -> Any:
    """The tree in the caller's default float type."""
    return cast(tree, default_dtype())
