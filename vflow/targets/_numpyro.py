"""The unconstrained log density of a NumPyro model."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.handlers as handlers
from jaxtyping import Array, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.transforms import IdentityTransform, IndependentTransform
from numpyro.distributions.util import sum_rightmost

from vflow._core import ProgramError
from vflow.programs._numpyro import NumpyroProgram, is_latent, latent_values, log_probs, sum_terms
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
from vflow.targets._space import AbstractSpace, join, scalar, split

Trace = dict[str, Any]

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


class NumpyroSpace(AbstractSpace):
    r"""$\log p(T(x), \text{data}) + \log |\det \partial T / \partial x|$ for a NumPyro model.

    The bijection $T$ of a site may depend on the sites before it: it is built anew in every run
    from the support that the model gives it there.

    Args:
        program: the model with its data.
        latent: sites that are latent on purpose although their data could have been passed.
    """

    program: NumpyroProgram
    sites: tuple[Site, ...] = eqx.field(static=True)
    dims: tuple[tuple[str, tuple[str | None, ...]], ...] = eqx.field(static=True)
    validate: bool = eqx.field(static=True)

    def __init__(self, program: NumpyroProgram, latent: tuple[str, ...] = ()):
        call = program.call
        bind_arguments(call.model, call.args, call.kwargs, partial=False)

        def look(trace):
            _refuse(call, trace, latent)
            data = {name: site for name, site in trace.items() if _is_data(site)}
            dims = tuple((name, _dims(site)) for name, site in trace.items() if _has_value(site))
            return _layout(trace), dims, data

        with running_model(call.model) as guard:
            self.sites, self.dims, data = _abstractly(look, guard, call.args, call.kwargs)
            inside = [_inside(name, site) for name, site in data.items()]
        self.validate = not all(inside)
        self.program = program

    def _run(self, substitute_fn: Callable[[Any], Any], key: PRNGKeyArray | None = None) -> Trace:
        call = self.program.call
        with running_model(call.model, validate=self.validate) as guard:
            model = guard if key is None else handlers.seed(guard, key)
            model = handlers.substitute(model, substitute_fn=substitute_fn)
            return dict(handlers.trace(model).get_trace(*call.args, **call.kwargs))

    def _push(self, x: Array) -> tuple[Trace, dict[str, Array]]:
        """The trace at an unconstrained point, and the log-Jacobians by site."""
        free, log_dets = split(self.sites, x), {}

        def place(site):
            name = site["name"]
            if name not in free or not is_latent(site):
                return None
            value, log_det = _constrain_site(site, free[name])
            if log_det is None:
                return value
            if "_scan_current_index" in site["infer"]:  # inside a scan a sum would leak
                numpyro.factor(f"_{name}_log_det", log_det)
            else:
                log_dets[name] = sum_rightmost(log_det, jnp.ndim(log_det))
            return value

        return self._run(place), log_dets

    def log_prob(self, x: Array) -> Array:
        """The joint density of the constrained values and the data, and the log-Jacobians."""
        total = sum_terms(self._terms(x))
        return scalar(total, x.dtype, f"model {model_name(self.program.call.model)}")

    def terms(self, x: Array) -> dict[str, Array]:
        """The log density by site; a latent's log-Jacobian under "jacobian of"."""
        return {name: jnp.asarray(value) for name, value in self._terms(x).items()}

    def _terms(self, x: Array) -> dict[str, Array]:
        with running_model(self.program.call.model, validate=self.validate):
            trace, log_dets = self._push(x)
            terms = log_probs(trace)
        return terms | {f"jacobian of {name}": value for name, value in log_dets.items()}

    def constrain(self, x: Array) -> dict[str, Array]:
        """Latent and deterministic sites."""
        trace, _ = self._push(x)
        return latent_values(trace) | {
            name: jnp.asarray(site["value"])
            for name, site in trace.items()
            if site["type"] == "deterministic"
        }

    def unconstrain(self, values: dict[str, Array]) -> Array:
        """Through the inverse bijections, built along the way."""
        values = {name: jnp.asarray(value) for name, value in values.items()}
        names = {site.name for site in self.sites}
        trace = self._run(lambda site: values[site["name"]] if site["name"] in names else None)
        free = {}
        with running_model(self.program.call.model):
            for site in self.sites:
                transform = transform_of(site.name, trace[site.name]["fn"].support)
                free[site.name] = transform.inv(values[site.name])
        return join(self.sites, free)

    def prior_draws(self, key: PRNGKeyArray, n: int) -> Array:
        """Draws of the latent sites by ancestry; improper ones as standard normal before $T$.

        A coordinate at the edge of its support (infinite after $T^{-1}$) is drawn anew as standard
        normal.
        """
        names = {site.name for site in self.sites}

        def one(key):
            key, spare = jax.random.split(key)
            trace = self._run(lambda s: _prior_value(s) if s["name"] in names else None, key)
            free = {s.name: _unconstrain_site(trace[s.name]) for s in self.sites}
            x = join(self.sites, free)
            return jnp.where(jnp.isfinite(x), x, jax.random.normal(spare, x.shape, x.dtype))

        return jax.jit(jax.vmap(one))(jax.random.split(key, n))

    def observed(self) -> dict[str, Array]:
        """The data by observed site, where it does not depend on a latent."""
        dim = self.sites[-1].stop
        box = []

        def run(x):
            values = {k: s["value"] for k, s in self._push(x)[0].items() if _is_data(s)}
            box.append(values)
            return {k: jnp.asarray(v) for k, v in values.items()}

        jax.eval_shape(run, jnp.zeros(dim))
        if all(is_concrete(value) for value in box[0].values()):
            return {name: jnp.asarray(value) for name, value in box[0].items()}
        here, there = (jax.jit(run)(jnp.full(dim, at)) for at in (0.0, 0.5))
        return {k: v for k, v in here.items() if bool(jnp.array_equal(v, there[k], equal_nan=True))}


def _constrain_site(site, free):
    """A site's value from its unconstrained one, and the log-Jacobian (None where it is 0)."""
    transform = transform_of(site["name"], site["fn"].support)
    index = site["infer"].get("_scan_current_index")
    if index is not None and jnp.ndim(free) > len(transform.inverse_shape(site_shape(site))):
        free = free[index]
    base = transform
    while isinstance(base, IndependentTransform):
        base = base.base_transform
    if isinstance(base, IdentityTransform):
        return free, None
    value = transform(free)
    return value, transform.log_abs_det_jacobian(free, value)


def _unconstrain_site(site):
    return transform_of(site["name"], site["fn"].support).inv(site["value"])


def _prior_value(site):
    """A draw from a site's distribution, or a standard normal before the bijection."""
    kwargs = site["kwargs"]
    key, shape = kwargs["rng_key"], kwargs.get("sample_shape", ())
    try:
        return site["fn"].sample(key, shape)
    except NotImplementedError:
        transform = transform_of(site["name"], site["fn"].support)
        return transform(jax.random.normal(key, transform.inverse_shape(site_shape(site))))


def _feasible(site):
    """Some value in the support of a latent site; None where it has to be drawn."""
    if not is_latent(site) or site["value"] is not None or site["fn"].support.is_discrete:
        return None
    try:
        transform = transform_of(site["name"], site["fn"].support)
    except ProgramError:
        return None
    return transform(jnp.zeros(transform.inverse_shape(site_shape(site))))


def _abstractly(look: Callable[[Trace], Any], model, args, kwargs) -> Any:
    """What `look` sees in the trace of a run in shapes only: the latents' values are tracers."""
    seen = []

    def run(key):
        seeded = handlers.substitute(handlers.seed(model, key), substitute_fn=_feasible)
        seen.append(look(dict(handlers.trace(seeded).get_trace(*args, **kwargs))))

    jax.eval_shape(run, jax.random.key(0))
    return seen[0]


def _refuse(call, trace: Trace, allowed: tuple[str, ...]) -> None:
    """Raise a ProgramError for what has no unconstrained density."""
    name = model_name(call.model)
    latent = {k: site for k, site in trace.items() if is_latent(site)}
    unmeant = sites_of_missing_arguments(
        call.model,
        call.args,
        call.kwargs,
        [k for k in latent if k not in allowed],
        lambda *watched: _abstractly(len, *watched),
    )
    for site, argument in unmeant.items():
        if site not in allowed:
            raise ProgramError(
                f"site {site!r} of model {name} has no data: its argument {argument!r} is None, "
                f"which makes the site a latent. Pass {argument}=..., or say that it is meant, "
                f"vf.target(program, latent=({site!r},))."
            )
    if not latent:
        raise ProgramError(f"model {name} has no latent site: there is nothing to infer.")
    for key, site in latent.items():
        transform_of(key, site["fn"].support)
        if any(isinstance(fn, dist.Delta) for fn in _layers(site["fn"])):
            raise ProgramError(f"site {key!r} is a Delta: make it numpyro.deterministic instead.")
    if not any(site["type"] == "sample" and site["is_observed"] for site in trace.values()):
        for key, site in latent.items():
            if any(isinstance(fn, dist.ImproperUniform) for fn in _layers(site["fn"])) and not (
                isinstance(_innermost(site["fn"].support), _BOUNDED)
            ):
                raise ProgramError(
                    f"site {key!r} has an improper prior and model {name} has neither data nor a "
                    "factor: there is no posterior."
                )


def _inside(name: str, site) -> bool:
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
    if any(isinstance(fn, dist.MaskedDistribution) for fn in _layers(site["fn"])):
        return False
    what = f"{nan} NaN" if nan else f"{outside} values outside its support ({describe(support)})"
    raise ProgramError(
        f"observed site {name!r} has {what} among {np.size(value)}: correct or drop them, or mask "
        "them with numpyro.handlers.mask."
    )


def _layers(fn):
    """A distribution and what it wraps."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)


def _innermost(support):
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_data(site) -> bool:
    return (
        site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit)
    )


def _has_value(site) -> bool:
    return site["type"] == "deterministic" or is_latent(site) or _is_data(site)


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


def _dims(site) -> tuple[str | None, ...]:
    """For each axis of a site's value the plate along it, or None."""
    shape = jnp.shape(site["value"])
    batch = len(shape) - (site["fn"].event_dim if site["type"] == "sample" else 0)
    dims: list[str | None] = [None] * len(shape)
    for frame in site["cond_indep_stack"]:
        axis = batch + frame.dim
        if 0 <= axis and shape[axis] == frame.size:
            dims[axis] = frame.name
    return tuple(dims)
