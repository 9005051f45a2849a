"""The unconstrained log density of a NumPyro model."""

import copy
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
from numpyro.distributions.transforms import IdentityTransform, IndependentTransform
from numpyro.distributions.util import sum_rightmost

from vflow._core._compile import jit_once
from vflow.programs._numpyro import (
    NumpyroCall,
    NumpyroProgram,
    is_latent,
    latent_values,
    log_probs,
    sum_terms,
)
from vflow.programs._numpyro_checks import is_concrete, model_name, running_model, site_shape
from vflow.targets._site import Site, transform_of
from vflow.targets._space import AbstractSpace, join, scalar, split
from vflow.targets._survey import Dims, Trace, is_data, survey


class NumpyroSpace(AbstractSpace):
    r"""$\log p(T(x), \text{data}) + \log |\det \partial T / \partial x|$ for a NumPyro model.

    The bijection $T$ of a site may depend on the sites before it: it is built anew in every run
    from the support that the model gives it there.

    A decentred site has the coordinates $z = (u - m) / s$ with $u$ the unconstrained value, $m$ and
    $s$ the location and scale (or $L^{-1}(u - m)$ with a Cholesky factor) that the sites before it
    give it.

    Args:
        program: the model with its data.
        latent: sites that are latent on purpose although their data could have been passed.
        decentred: sites in coordinates free of their location and scale.
    """

    program: NumpyroProgram
    latent: tuple[str, ...] = eqx.field(static=True)
    decentred: tuple[str, ...] = eqx.field(static=True)
    sites: tuple[Site, ...] = eqx.field(static=True)
    dims: tuple[tuple[str, Dims], ...] = eqx.field(static=True)
    validate: bool = eqx.field(static=True)

    def __init__(
        self,
        program: NumpyroProgram,
        latent: tuple[str, ...] = (),
        decentred: tuple[str, ...] = (),
    ):
        self.program, self.latent, self.decentred = program, latent, decentred
        self.sites, self.dims, self.validate = survey(program.call, latent)

    def with_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "NumpyroSpace":
        """The same model on arguments of the same shapes, traced ones too; it is not run."""
        call = self.program.call
        new = copy.copy(self)
        program = NumpyroProgram(NumpyroCall(call.model, args, kwargs, call.strategies))
        object.__setattr__(new, "program", program)
        return new

    def _run(self, substitute_fn: Callable[[Any], Any], key: PRNGKeyArray | None = None) -> Trace:
        call = self.program.call
        with running_model(call.model, validate=self.validate) as guard:
            model = guard if key is None else handlers.seed(guard, key)
            model = handlers.substitute(model, substitute_fn=substitute_fn)
            args, kwargs = _in_default_precision((call.args, call.kwargs))
            return dict(handlers.trace(model).get_trace(*args, **kwargs))

    def _push(self, x: Array) -> tuple[Trace, dict[str, Array]]:
        """The trace at an unconstrained point, and the log-Jacobians by site."""
        free, log_dets = split(self.sites, x), {}

        def place(site):
            name = site["name"]
            if name not in free or not is_latent(site):
                return None
            value, log_det = _constrain_site(site, free[name], name in self.decentred)
            if log_det is None:
                return value
            if "_scan_current_index" in site["infer"]:  # inside a scan a sum would leak
                numpyro.factor(f"jacobian of {name}", log_det)
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
        return self._free(self._run(lambda site: values.get(site["name"])), values)

    def _free(self, trace: Trace, values: dict[str, Array]) -> Array:
        with running_model(self.program.call.model):
            free = {
                name: _unconstrain_site(trace[name], values[name], name in self.decentred)
                for name in (site.name for site in self.sites)
            }
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
            x = self._free(trace, {name: trace[name]["value"] for name in names})
            return jnp.where(jnp.isfinite(x), x, jax.random.normal(spare, x.shape, x.dtype))

        # This generator compiles in half the time, which is nearly all that these draws cost.
        def many(key):
            data = jax.random.bits(key, (n, 4), "uint32")
            return jax.vmap(one)(jax.random.wrap_key_data(data, impl="unsafe_rbg"))

        return jit_once(many)(key)

    def hierarchical(self, x: Array) -> dict[str, Array]:
        """The scale of each site that could be decentred, at an unconstrained point."""
        scales = {name: _location_scale(site) for name, site in self._push(x)[0].items()}
        return {name: jnp.asarray(found[1]) for name, found in scales.items() if found is not None}

    def observed(self) -> dict[str, Array]:
        """The data by observed site, where it does not depend on a latent."""
        dim = self.sites[-1].stop
        box = []

        def run(x):
            values = {k: s["value"] for k, s in self._push(x)[0].items() if is_data(s)}
            box.append(values)
            return {k: jnp.asarray(v) for k, v in values.items()}

        jax.eval_shape(run, jnp.zeros(dim))
        if all(is_concrete(value) for value in box[0].values()):
            return {name: jnp.asarray(value) for name, value in box[0].items()}
        here, there = (jit_once(run)(jnp.full(dim, at)) for at in (0.0, 0.5))
        return {k: v for k, v in here.items() if bool(jnp.array_equal(v, there[k], equal_nan=True))}


def _in_default_precision(arguments):
    """Under x64, float32 arrays among the arguments as float64, so that no step rounds to float32.

    They stay concrete, inside a trace too. What a model captures by closure stays as it is.
    """
    if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        return arguments

    def promote(leaf):
        if isinstance(leaf, jax.Array) and leaf.dtype == np.float32 and is_concrete(leaf):
            with jax.ensure_compile_time_eval():
                return leaf.astype(np.float64)
        return leaf

    return jax.tree.map(promote, arguments)


def _location_scale(site) -> Any:
    """Location and scale of the unconstrained value of a latent site, None where it has none.

    The scale of a multivariate normal is its Cholesky factor. Sites inside a scan are left alone.
    """
    if not is_latent(site) or "_scan_current_index" in site["infer"]:
        return None
    fn = _innermost(site)
    if type(fn) is dist.MultivariateNormal:
        return fn.loc, fn.scale_tril
    return (fn.loc, fn.scale) if type(fn) in _LOCATION_SCALE else None


def _innermost(site) -> Any:
    fn = site["fn"]
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


_LOCATION_SCALE = (
    dist.Normal,
    dist.StudentT,
    dist.Cauchy,
    dist.Laplace,
    dist.Logistic,
    dist.Gumbel,
    dist.LogNormal,
)


def _centre(site, free):
    """Back from the coordinates of a decentred site, and the log-Jacobian."""
    loc, scale = _location_scale(site)
    if type(_innermost(site)) is dist.MultivariateNormal:
        moved = loc + jnp.squeeze(scale @ free[..., None], -1)
        log_scale = jnp.log(jnp.diagonal(scale, axis1=-2, axis2=-1))
    else:
        moved, log_scale = loc + scale * free, jnp.log(scale)
    return moved, jnp.broadcast_to(log_scale, free.shape)


def _constrain_site(site, free, decentred):
    """A site's value from its unconstrained one, and the log-Jacobian (None where it is 0)."""
    transform = transform_of(site["name"], site["fn"].support)
    index = site["infer"].get("_scan_current_index")
    if index is not None and jnp.ndim(free) > len(transform.inverse_shape(site_shape(site))):
        free = free[index]
    log_det = None
    if decentred:
        free, log_det = _centre(site, free)
    base = transform
    while isinstance(base, IndependentTransform):
        base = base.base_transform
    if isinstance(base, IdentityTransform):
        return free, log_det
    value = transform(free)
    inner = transform.log_abs_det_jacobian(free, value)
    return value, inner if log_det is None else inner + sum_rightmost(
        log_det, jnp.ndim(log_det) - jnp.ndim(inner)
    )


def _unconstrain_site(site, value: Any, decentred: bool) -> Any:  # noqa: FBT001
    """A site's coordinates from its value."""
    free: Any = transform_of(site["name"], site["fn"].support).inv(value)
    if not decentred:
        return free
    loc, scale = _location_scale(site)
    if type(_innermost(site)) is not dist.MultivariateNormal:
        return (free - loc) / scale
    scale = jnp.broadcast_to(scale, (*free.shape, free.shape[-1]))
    return jnp.squeeze(
        jax.scipy.linalg.solve_triangular(scale, (free - loc)[..., None], lower=True), -1
    )


def _prior_value(site):
    """A draw from a site's distribution, or a standard normal before the bijection."""
    kwargs = site["kwargs"]
    key, shape = kwargs["rng_key"], kwargs.get("sample_shape", ())
    try:
        return site["fn"].sample(key, shape)
    except NotImplementedError:
        transform = transform_of(site["name"], site["fn"].support)
        return transform(jax.random.normal(key, transform.inverse_shape(site_shape(site))))
