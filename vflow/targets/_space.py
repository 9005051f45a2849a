"""What a target delegates to, for a bare log density and for one over named sites."""

import abc
import operator
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost

from vflow._core import FitError, ProgramError
from vflow.programs._fresh import fresh
from vflow.targets._site import Site, describe, transform_of


class AbstractSpace(eqx.Module):
    """What a target delegates to: a log density on R^d and its named sites."""

    sites: eqx.AbstractVar[tuple[Site, ...]]

    @abc.abstractmethod
    def log_prob(self, x: Array) -> Array:
        """The unconstrained log density, Jacobian included; a scalar."""

    @abc.abstractmethod
    def constrain(self, x: Array) -> dict[str, Array]:
        """Constrained values by site name."""

    @abc.abstractmethod
    def unconstrain(self, values: dict[str, Array]) -> Array:
        """The inverse of `constrain`."""

    @abc.abstractmethod
    def prior_draws(self, key: PRNGKeyArray, n: int) -> Array:
        """Unconstrained draws, shape (n, dim), finite."""

    @abc.abstractmethod
    def terms(self, x: Array) -> dict[str, Array]:
        """The log density by site, Jacobian included."""


def split(sites: tuple[Site, ...], x: Array) -> dict[str, Array]:
    """The unconstrained vector cut into sites."""
    return {site.name: x[site.slice].reshape(site.unconstrained_shape) for site in sites}


def join(sites: tuple[Site, ...], values: Mapping[str, Any]) -> Array:
    """The inverse of `split`."""
    return jnp.concatenate([jnp.ravel(values[site.name]) for site in sites])


def scalar(value: Any, dtype: Any, what: str) -> Array:
    """A log density's result as a real scalar of `dtype`, or a ProgramError."""
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ProgramError(f"{what} must return a real scalar, got {value!r}.") from error
    if value.shape != () or jnp.iscomplexobj(value):
        raise ProgramError(
            f"{what} must return a real scalar, got shape {value.shape} and dtype {value.dtype}; "
            "sum over its axes."
        )
    return value.astype(dtype)


def call(log_density: Callable[..., Any], argument: Any, dtype: Any) -> Array:
    """A user's log density at one point, its failures as ProgramErrors."""
    what = f"log density {getattr(log_density, '__name__', repr(log_density))}"
    try:
        with jax.numpy_rank_promotion("allow"):
            value = fresh(log_density)(argument)
    except (ProgramError, FitError):
        raise
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise ProgramError(
            f"{what} needs the concrete value of its argument: use jax.numpy instead of NumPy, and "
            "jnp.where or jax.lax.cond instead of `if`."
        ) from error
    except Exception as error:
        raise ProgramError(f"{what} failed: {type(error).__name__}: {error}") from error
    return scalar(value, dtype, what)


class BareSpace(AbstractSpace):
    """A log density on R^d as it is; one site called "x"."""

    log_density: Callable[..., Any]
    sites: tuple[Site, ...] = eqx.field(static=True)

    def __init__(self, log_density: Callable[..., Any], dim: int):
        self.log_density = log_density
        self.sites = (Site("x", (dim,), 0, dim, (dim,), "real", (None,)),)

    def log_prob(self, x: Array) -> Array:
        """The log density itself."""
        return call(self.log_density, x, x.dtype)

    def constrain(self, x: Array) -> dict[str, Array]:
        """The vector under its name."""
        return {"x": x}

    def unconstrain(self, values: dict[str, Array]) -> Array:
        """The vector itself."""
        return values["x"]

    def prior_draws(self, key: PRNGKeyArray, n: int) -> Array:
        """Standard normal: there is no prior to draw from."""
        return jax.random.normal(key, (n, self.sites[0].stop))

    def terms(self, x: Array) -> dict[str, Array]:
        """One term."""
        return {"x": self.log_prob(x)}


class _Transforms:
    """Bijections in the order of the sites; compared by identity, as NumPyro's have no hash."""

    def __init__(self, by_site: list[Transform]):
        self.by_site = tuple(by_site)


class NamedSpace(AbstractSpace):
    """A log density over a dict of sites with fixed supports."""

    log_density: Callable[..., Any]
    sites: tuple[Site, ...] = eqx.field(static=True)
    transforms: _Transforms = eqx.field(static=True)

    def __init__(self, log_density: Callable[..., Any], supports: dict[str, Any]):
        if not isinstance(supports, dict) or not supports:
            raise ValueError(
                "sites must be a non-empty dict, site name -> constraint or (constraint, shape), "
                f"got {supports!r}."
            )
        sites, transforms, start = [], [], 0
        for name, spec in supports.items():
            support, shape = _spec(spec)
            transform = transform_of(name, support)
            shape = _shape(name, shape)
            if len(shape) < support.event_dim:
                raise ValueError(
                    f"site {name!r}: a {describe(support)} support needs a shape of at least "
                    f"{support.event_dim} axes; write sites={{{name!r}: (constraint, shape)}}."
                )
            free = tuple(int(n) for n in transform.inverse_shape(shape))
            stop = start + int(np.prod(free, dtype=int))
            dims = (None,) * len(shape)
            sites.append(Site(name, shape, start, stop, free, describe(support), dims))
            transforms.append(transform)
            start = stop
        if start == 0:
            raise ProgramError(f"sites {list(supports)} have no unconstrained coordinates.")
        self.log_density = log_density
        self.sites = tuple(sites)
        self.transforms = _Transforms(transforms)

    def _push(self, x: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        values, log_dets = {}, {}
        with jax.numpy_rank_promotion("allow"):
            for site, transform in zip(self.sites, self.transforms.by_site, strict=True):
                free = x[site.slice].reshape(site.unconstrained_shape)
                values[site.name] = transform(free)
                log_det = transform.log_abs_det_jacobian(free, values[site.name])
                log_dets[site.name] = sum_rightmost(log_det, jnp.ndim(log_det))
        return values, log_dets

    def log_prob(self, x: Array) -> Array:
        """Log density of the constrained values plus the log-Jacobians."""
        values, log_dets = self._push(x)
        return call(self.log_density, values, x.dtype) + sum(log_dets.values())

    def constrain(self, x: Array) -> dict[str, Array]:
        """Through the bijections."""
        return self._push(x)[0]

    def unconstrain(self, values: dict[str, Array]) -> Array:
        """Back through the bijections."""
        pairs = zip(self.sites, self.transforms.by_site, strict=True)
        with jax.numpy_rank_promotion("allow"):
            return join(self.sites, {s.name: t.inv(values[s.name]) for s, t in pairs})

    def prior_draws(self, key: PRNGKeyArray, n: int) -> Array:
        """Standard normal: there is no prior to draw from."""
        return jax.random.normal(key, (n, self.sites[-1].stop))

    def terms(self, x: Array) -> dict[str, Array]:
        """The Jacobians by site, and the log density."""
        values, log_dets = self._push(x)
        return {f"jacobian of {name}": v for name, v in log_dets.items()} | {
            "log density": call(self.log_density, values, x.dtype)
        }


def _spec(spec: Any) -> tuple[Any, Any]:
    return spec if isinstance(spec, tuple) and len(spec) == 2 else (spec, ())


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    try:
        axes = shape if isinstance(shape, tuple | list) else (shape,)
        axes = tuple(operator.index(n) for n in axes)
    except TypeError:
        raise TypeError(f"site {name!r}: shape must be integers, got {shape!r}.") from None
    if any(n < 1 for n in axes):
        raise ValueError(f"site {name!r}: shape must be positive, got {axes}.")
    return axes
