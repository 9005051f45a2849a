"""One run of a NumPyro model in shapes only: its sites, and what makes it unfit to be a target."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import numpyro.handlers as handlers
from numpyro.distributions import constraints

from vflow._core import ProgramError
from vflow.programs._numpyro import NumpyroCall, is_latent
from vflow.programs._numpyro_checks import (
    bind_arguments,
    count_nan,
    is_concrete,
    model_name,
    running_model,
    site_shape,
    sites_of_missing_arguments,
)
from vflow.targets._site import Site, describe, transform_of

Trace = dict[str, Any]
Dims = tuple[str | None, ...]

_BOUNDED = (
    type(constraints.unit_interval),
    constraints.interval,
    constraints.open_interval,
    type(constraints.simplex),
    type(constraints.circular),
    type(constraints.corr_cholesky),
    type(constraints.corr_matrix),
    type(constraints.l1_ball),
)


class Survey(NamedTuple):
    """What is known of a model before any value is.

    Attributes:
        sites: the latent sites, in the order of the model.
        dims: for each latent, deterministic and observed site the plates along its axes.
        validate: whether data may leave the support of its distribution, which then has to be
            looked at in every run: the support depends on a latent, or the data is computed.
    """

    sites: tuple[Site, ...]
    dims: tuple[tuple[str, Dims], ...]
    validate: bool


def survey(call: NumpyroCall, latent: tuple[str, ...]) -> Survey:
    """Run a model in shapes and look at it.

    Args:
        call: the model with its arguments.
        latent: sites that are latent on purpose although their data could have been passed.

    Raises:
        ProgramError: the model cannot be a target.
    """
    bind_arguments(call.model, call.args, call.kwargs, partial=False)

    def look(trace):
        _refuse_missing_data(call, trace, latent)
        _refuse_latents(call, trace)
        _refuse_improper(call, trace)
        _refuse_parameters(trace)
        data = {name: site for name, site in trace.items() if is_data(site)}
        return _layout(trace), tuple(_all_dims(trace)), data

    with running_model(call.model) as guard:
        sites, dims, data = _abstractly(look, guard, call.args, call.kwargs)
        inside = [_inside(name, site) for name, site in data.items()]
    return Survey(sites, dims, not all(inside))


def _abstractly(look: Callable[[Trace], Any], model: Any, args: Any, kwargs: Any) -> Any:
    """What `look` sees in a run in shapes: the latents' values are tracers, so it runs inside."""
    seen = []

    def run(key):
        seeded = handlers.substitute(handlers.seed(model, key), substitute_fn=_feasible)
        seen.append(look(dict(handlers.trace(seeded).get_trace(*args, **kwargs))))

    jax.eval_shape(run, jax.random.key(0))
    return seen[0]


def _feasible(site: dict[str, Any]) -> Any:
    """Some value in the support of a latent site; None where it has to be drawn."""
    if not is_latent(site) or site["value"] is not None or site["fn"].support.is_discrete:
        return None
    try:
        transform = transform_of(site["name"], site["fn"].support)
    except ProgramError:  # refused by name once all sites are known
        return None
    return transform(jnp.zeros(transform.inverse_shape(site_shape(site))))


def _refuse_missing_data(call: NumpyroCall, trace: Trace, latent: tuple[str, ...]) -> None:
    name = model_name(call.model)
    suspects = [key for key, site in trace.items() if is_latent(site) and key not in latent]
    for site in latent:
        if site not in trace or not is_latent(trace[site]):
            raise ProgramError(f"latent={site!r} is not a latent site of model {name}.")
    found = sites_of_missing_arguments(
        call.model, call.args, call.kwargs, suspects, lambda *watched: _abstractly(len, *watched)
    )
    for site, argument in found.items():
        if site in suspects:
            raise ProgramError(
                f"site {site!r} of model {name} has no data: its argument {argument!r} is None, "
                f"which makes the site a latent. Pass {argument}=..., or say that it is meant, "
                f"vf.target(program, latent=({site!r},))."
            )


def _refuse_latents(call: NumpyroCall, trace: Trace) -> None:
    latent = {name: site["fn"] for name, site in trace.items() if is_latent(site)}
    if not latent:
        raise ProgramError(
            f"model {model_name(call.model)} has no latent site: there is nothing to infer."
        )
    for name, fn in latent.items():
        transform_of(name, fn.support)
        if any(isinstance(layer, dist.Delta) for layer in _layers(fn)):
            raise ProgramError(f"site {name!r} is a Delta: make it numpyro.deterministic instead.")
        imputed = f"{name.removesuffix('_unobserved')}_observed" in trace  # by numpyro's obs_mask
        if _masked_in_part(fn, imputed=imputed):
            raise ProgramError(
                f"entries of latent site {name!r} are masked, so that nothing bounds them: take "
                "the site out of the mask. For missing data, mask the observed site only "
                "(numpyro.handlers.mask, not obs_mask)."
            )


def _refuse_improper(call: NumpyroCall, trace: Trace) -> None:
    if any(site["type"] == "sample" and site["is_observed"] for site in trace.values()):
        return
    for name, site in trace.items():
        if not is_latent(site):
            continue
        support = site["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        flat = any(isinstance(layer, dist.ImproperUniform) for layer in _layers(site["fn"]))
        if flat and not isinstance(support, _BOUNDED):
            raise ProgramError(
                f"site {name!r} has an improper prior and model {model_name(call.model)} has "
                "neither data nor a factor: there is no posterior."
            )


def _refuse_parameters(trace: Trace) -> None:
    """Scales and rates that are known not to be positive, and parameters that are known to be NaN."""
    for name, site in trace.items():
        layers = list(_layers(site["fn"])) if site["type"] == "sample" else []
        if any(isinstance(layer, dist.MaskedDistribution) for layer in layers):
            continue
        for layer in layers:
            for parameter, constraint in layer.arg_constraints.items():
                value = vars(layer).get(parameter)
                if value is None or isinstance(value, dist.Distribution) or not is_concrete(value):
                    continue
                nan = count_nan(value)
                positive = isinstance(constraint, type(constraints.positive))
                if not nan and (not positive or np.all(constraint(np.asarray(value)))):
                    continue
                what = (
                    f"{nan} NaN" if nan else f"{np.min(value):.6g}, must be {describe(constraint)}"
                )
                raise ProgramError(
                    f"site {name!r}: {parameter} of its {type(layer).__name__} has {what}."
                )


def _inside(name: str, site: dict[str, Any]) -> bool:
    """Whether the data of a site is known to lie in the support of its distribution, always.

    Raises:
        ProgramError: it is known not to.
    """
    value, support = site["value"], site["fn"].support
    if not is_concrete((value, support)):
        return False
    outside, nan = int(np.sum(~np.asarray(support(value)))), count_nan(value)
    if not outside:
        return True
    if any(isinstance(layer, dist.MaskedDistribution) for layer in _layers(site["fn"])):
        return False
    what = f"{nan} NaN" if nan else f"{outside} outside its support ({describe(support)})"
    raise ProgramError(
        f"observed site {name!r} has, among {np.size(value)} values, {what}: correct or drop them, "
        "or mask them with numpyro.handlers.mask."
    )


def _masked_in_part(fn: Any, *, imputed: bool) -> bool:
    """Whether a mask with axes leaves something out; mask=False makes a flat site on purpose.

    A mask that is traced counts where it comes from `obs_mask`.
    """
    masks = [getattr(layer, "_mask", True) for layer in _layers(fn)]
    arrays = [mask for mask in masks if np.ndim(mask)]
    return any(not np.all(mask) if is_concrete(mask) else imputed for mask in arrays)


def _layers(fn: Any):
    """A distribution and what it wraps."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def is_data(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is observed; a factor is not."""
    return (
        site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit)
    )


def _layout(trace: Trace) -> tuple[Site, ...]:
    sites, start = [], 0
    for name, site in trace.items():
        if is_latent(site):
            shape = tuple(jnp.shape(site["value"]))
            support = site["fn"].support
            free = tuple(int(n) for n in transform_of(name, support).inverse_shape(shape))
            stop = start + int(np.prod(free, dtype=int))
            sites.append(Site(name, shape, start, stop, free, describe(support), _dims(site)))
            start = stop
    if start == 0:
        raise ProgramError(f"the latent sites {[s.name for s in sites]} have no coordinates.")
    return tuple(sites)


def _all_dims(trace: Trace):
    for name, site in trace.items():
        if site["type"] == "deterministic" or is_latent(site) or is_data(site):
            yield name, _dims(site)


def _dims(site: dict[str, Any]) -> Dims:
    """For each axis of a site's value the plate along it, or None."""
    shape = jnp.shape(site["value"])
    batch = len(shape) - (site["fn"].event_dim if site["type"] == "sample" else 0)
    dims: list[str | None] = [None] * len(shape)
    for frame in site["cond_indep_stack"]:
        axis = batch + frame.dim
        if axis >= 0 and shape[axis] == frame.size:
            dims[axis] = frame.name
    return tuple(dims)
