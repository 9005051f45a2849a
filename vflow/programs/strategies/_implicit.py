"""Implicit reparameterisation: the derivative of a draw at fixed cumulative probability."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vflow.programs._site import Site, View
from vflow.programs._strategy import Strategy
from vflow.programs.strategies._von_mises import von_mises_slope, wrapped


@dataclasses.dataclass(frozen=True, repr=False)
class Implicit(Strategy):
    """See `implicit`."""

    @staticmethod
    def applies(site: Site) -> bool:
        """Whether the sampler is differentiable, or there is a cumulative distribution function."""
        if site.view.reparameterised:
            return True
        dist = site.view.base()
        if site.view.family() == "VonMises":
            return True
        discrete = getattr(dist, "is_discrete", False)
        return site.view.kind == "numpyro" and not discrete and _cdf(dist) is not None

    def draw(self, site: Site) -> Any:
        """The draw, its derivative that of the quantile."""
        if site.view.reparameterised:
            return site.draw()
        if not self.applies(site):
            raise site.error(
                f"{site.view.family()} has neither a differentiable sampler nor a cdf: use "
                "vf.measure_valued() or vf.reinforce()."
            )
        value = site.draw_detached()
        if site.view.family() == "VonMises":
            return _von_mises(site.view, value)
        dist = site.view.base()
        level = _cdf(dist)(value)
        density = jax.lax.stop_gradient(jnp.exp(dist.log_prob(value)))
        return value - (level - jax.lax.stop_gradient(level)) / density


def _von_mises(view: View, value: Any) -> Any:
    loc, concentration = (view.parameter(name, value) for name in ("loc", "concentration"))
    fixed_loc, fixed = jax.lax.stop_gradient((loc, concentration))
    slope = von_mises_slope(wrapped(value - fixed_loc), fixed)
    return value + (loc - fixed_loc) + slope * (concentration - fixed)


def _cdf(dist: Any) -> Any:
    """The cumulative distribution function, if the family has one of its own."""
    cdf = getattr(dist, "cdf", None)
    if cdf is None or any(
        "cdf" in vars(c) for c in type(dist).__mro__ if c.__name__ != "Distribution"
    ):
        return cdf
    return None


def implicit() -> Strategy:
    r"""Implicit reparameterisation, $\partial_\theta x = -\partial_\theta F(x;\theta) / p(x)$.

    For gamma, beta, Dirichlet and Student-t draws JAX's sampler has the derivative built in; for von
    Mises draws it is an integral over the density; other continuous distributions need a
    differentiable cumulative distribution function F.

    Example:
        >>> import vflow as vf
        >>> vf.implicit()
        implicit()

    Source: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients (2018), eq. 6.
    """
    return Implicit()
