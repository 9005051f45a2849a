"""A log density on unconstrained R^d with names for its parts."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from vflow.programs._numpyro import NumpyroProgram
from vflow.targets._numpyro import NumpyroSpace
from vflow.targets._site import Site
from vflow.targets._space import AbstractSpace, BareSpace, NamedSpace


class Target(eqx.Module):
    r"""An unconstrained log density $\log \tilde p(x)$, $x \in R^d$, normalised or not.

    `vf.target` makes one from a program or from named sites. `log_prob` computes in the dtype of
    `x`, so a float64 `x` under x64 gives float64 throughout.

    Args:
        log_density: a function of a vector of shape `(dim,)` that returns a scalar, in nats.
        dim: the number of coordinates.

    Raises:
        TypeError, ValueError: `dim` is not a positive integer, `log_density` not callable.
        ProgramError: `log_density` fails, or does not return a real scalar.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> target = vf.Target(lambda x: -0.5 * jnp.sum(x**2), dim=2)
        >>> float(target.log_prob(jnp.array([1.0, 1.0])))
        -1.0
    """

    space: AbstractSpace

    def __init__(self, log_density: Any, dim: Any = None):
        if isinstance(log_density, AbstractSpace):
            self.space = log_density
        else:
            self.space = BareSpace(_callable(log_density), _dim(dim))
        jax.eval_shape(self.log_prob, jax.ShapeDtypeStruct((self.dim,), jnp.zeros(0).dtype))

    @property
    def dim(self) -> int:
        """The number of unconstrained coordinates."""
        return self.space.sites[-1].stop

    @property
    def sites(self) -> tuple[Site, ...]:
        """The latent sites in the order of their coordinates."""
        return self.space.sites

    @property
    def program(self) -> NumpyroProgram | None:
        """The NumPyro program behind the target, if any."""
        return self.space.program if isinstance(self.space, NumpyroSpace) else None

    @property
    def dims(self) -> dict[str, tuple[str | None, ...]]:
        """For every latent, deterministic and observed site the plate along each axis, or None."""
        if isinstance(self.space, NumpyroSpace):
            return dict(self.space.dims)
        return {site.name: site.dims for site in self.sites}

    @property
    def observed(self) -> dict[str, Array]:
        """The data by observed site; empty for a bare log density."""
        return self.space.observed() if isinstance(self.space, NumpyroSpace) else {}

    def log_prob(self, x: ArrayLike) -> Array:
        r"""$\log \tilde p(x)$, the Jacobian of the constraining map included.

        Args:
            x: shape `(dim,)`.

        Returns:
            A scalar of the dtype of `x`, in nats.
        """
        return self.space.log_prob(self._vector(x))

    def __call__(self, x: ArrayLike) -> Array:
        """`log_prob`."""
        return self.log_prob(x)

    def terms(self, x: ArrayLike) -> dict[str, Array]:
        """The log density at `x` by site; the terms add up to `log_prob(x)`."""
        return self.space.terms(self._vector(x))

    def constrain(self, x: ArrayLike) -> dict[str, Array]:
        """The named, constrained values at `x` of shape `(dim,)`, deterministic sites included."""
        return self.space.constrain(self._vector(x))

    def unconstrain(self, sites: dict[str, Any]) -> Array:
        """The vector, shape `(dim,)`, at which `constrain` gives these latent values.

        Raises:
            ValueError: a latent site is missing or has the wrong shape.
        """
        for site in self.sites:
            if site.name not in sites:
                raise ValueError(f"site {site.name!r} is missing; got {sorted(sites)}.")
            shape = jnp.shape(sites[site.name])
            if shape != site.shape:
                raise ValueError(f"site {site.name!r} has shape {site.shape}, got {shape}.")
        return self.space.unconstrain({s.name: jnp.asarray(sites[s.name]) for s in self.sites})

    def prior_draws(self, key: PRNGKeyArray, n: int) -> Array:
        """Finite unconstrained draws, shape `(n, dim)`.

        From the prior of a NumPyro model (standard normal before the constraining map where the
        prior is improper), else standard normal.
        """
        return self.space.prior_draws(key, n)

    def _vector(self, x: ArrayLike) -> Array:
        x = jnp.asarray(x)
        if x.shape != (self.dim,):
            raise ValueError(
                f"x must have shape ({self.dim},), got {x.shape}; use jax.vmap for a batch."
            )
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def on_arguments(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
    """A NumPyro model's target on arguments of the same shapes, traced ones too; it is not run."""
    new = copy.copy(target)
    object.__setattr__(new, "space", target.space.with_arguments(args, kwargs))  # pyright: ignore[reportAttributeAccessIssue]
    return new


def target(
    program: Any,
    *,
    sites: dict[str, Any] | None = None,
    latent: tuple[str, ...] = (),
) -> Target:
    r"""The unconstrained log density of a program, or of a function of named sites.

    $$\log \tilde p(x) = \log p(T(x), \text{data}) + \log |\det \partial T(x) / \partial x|$$

    with $T$ the NumPyro bijection from $R^d$ onto the supports of the latent sites.

    Args:
        program: what `vf.from_numpyro` returns; or, with `sites`, a function from a dict of
            constrained site values to a scalar log density.
        sites: `site name -> constraint` or `site name -> (constraint, shape)`, constraints from
            `numpyro.distributions.constraints`.
        latent: sites that are meant to be latent although the argument that would hold their data
            is None.

    Returns:
        A `Target`.

    Raises:
        TypeError: `program` is neither.
        ProgramError: the model has discrete latent sites, no latent site, a missing observation,
            data of a shape that does not fit, or fails.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> from numpyro.distributions import constraints
        >>> def gamma(values):
        ...     return jnp.log(values["rate"]) - values["rate"]
        >>> target = vf.target(gamma, sites={"rate": constraints.positive})
        >>> float(target.log_prob(jnp.zeros(1)))
        -1.0
    """
    if isinstance(program, Target) and sites is None:
        return program
    if isinstance(program, NumpyroProgram) and sites is None:
        return Target(NumpyroSpace(program, latent))
    if sites is None:
        raise TypeError(
            f"vf.target takes a program made by vf.from_numpyro, got {program!r}; for a log "
            "density write vf.Target(log_density, dim) or vf.target(log_density, sites={...})."
        )
    return Target(NamedSpace(_callable(program), sites))


def _callable(log_density: Any) -> Callable[..., Any]:
    if not callable(log_density) or isinstance(log_density, NumpyroProgram):
        raise TypeError(f"log_density must be a function of one argument, got {log_density!r}.")
    return log_density


def _dim(dim: Any) -> int:
    try:
        number = operator.index(dim)
    except TypeError:
        number = None
    if number is None or isinstance(dim, bool):
        raise TypeError(f"dim must be a positive integer, got {dim!r}.")
    if number < 1:
        raise ValueError(f"dim must be a positive integer, got {dim!r}.")
    return number
