"""Measure-valued (weak) derivatives, one function per family."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from vflow.programs._site import Site, first_order, no_derivative
from vflow.programs._strategy import Strategy


def _spread(base, flat_values):
    """Lane i: `base` with component i replaced by component i of `flat_values`; (n, *shape)."""
    n = base.size
    lanes = jnp.where(jnp.eye(n, dtype=bool), flat_values[None, :], base.reshape(1, n))
    return lanes.reshape((n, *base.shape))


def _stop(x):
    return jax.lax.stop_gradient(x)


def _bernoulli(site, base):
    p = site.view.parameter("probs", base)
    weights = ((1 - 2 * base) * first_order(p, site.name)).ravel()
    return _spread(base, (1 - base).ravel()), weights, -weights.sum()


def _categorical(site, base):
    size = site.view.base().probs.shape[-1]
    p = site.view.parameter("probs", base, size)
    flat = jnp.ones((base.size,), base.dtype)
    values = jnp.stack([_spread(base, flat * a) for a in range(size)], axis=1)
    weights = first_order(p, site.name).reshape(base.size, size)
    return values.reshape((-1, *base.shape)), weights.ravel(), 0.0


def _poisson(site, base):
    weights = first_order(site.view.parameter("rate", base), site.name).ravel()
    return _spread(base, (base + 1).ravel()), weights, -weights.sum()


def _geometric(site, base):
    p = site.view.parameter("probs", base)
    again = site.draw_detached(jax.random.fold_in(site.key, 1))
    weights = -(first_order(p, site.name) / _stop(p)).ravel()
    return _spread(base, (base + again + 1).ravel()), weights, -weights.sum()


def _normal(site, base):
    loc, scale = (site.view.parameter(name, base) for name in ("loc", "scale"))
    mean_key, norm_key, sign_key = (jax.random.fold_in(site.key, i) for i in (1, 2, 3))
    m, s = _stop(loc), _stop(scale)
    uniform = jax.random.uniform(mean_key, base.shape, base.dtype, minval=1e-30)
    rayleigh = s * jnp.sqrt(-2 * jnp.log(uniform))
    by_mean = (first_order(loc, site.name) / (s * math.sqrt(2 * math.pi))).ravel()
    maxwell = jnp.sqrt((jax.random.normal(norm_key, (3, *base.shape), base.dtype) ** 2).sum(axis=0))
    sign = jax.random.rademacher(sign_key, base.shape, base.dtype)
    by_scale = (first_order(scale, site.name) / s).ravel()
    values = [(m + rayleigh).ravel(), (m - rayleigh).ravel(), (m + s * sign * maxwell).ravel()]
    values = jnp.concatenate([_spread(base, v) for v in values])
    return values, jnp.concatenate([by_mean, -by_mean, by_scale]), -by_scale.sum()


def _gamma(site, base):
    refused = site.error(
        "measure_valued() has the derivative of a gamma's rate only, and its concentration depends "
        "on what is differentiated: use vf.implicit() or vf.reinforce()."
    )
    shape = no_derivative(site.view.parameter("concentration", base), refused)
    rate = site.view.parameter("rate", base)
    extra = jax.random.exponential(jax.random.fold_in(site.key, 1), base.shape, base.dtype)
    # The scale is 1 / rate, so d scale / scale = - d rate / rate.
    weights = -(shape * first_order(rate, site.name) / _stop(rate)).ravel()
    return _spread(base, (base + extra / _stop(rate)).ravel()), weights, -weights.sum()


_FAMILIES = {
    "Bernoulli": _bernoulli,
    "Categorical": _categorical,
    "Gamma": _gamma,
    "Geometric": _geometric,
    "Normal": _normal,
    "Poisson": _poisson,
}


@dataclasses.dataclass(frozen=True, repr=False)
class MeasureValued(Strategy):
    """See `measure_valued`."""

    def draw(self, site: Site) -> Any:
        """The base draw, or the alternative of this lane."""
        family = site.view.family()
        if family not in _FAMILIES:
            raise site.error(
                f"measure_valued() has no weak derivative of {family} (it has "
                f"{', '.join(_FAMILIES)}): use vf.reinforce() or vf.reparam()."
            )
        base = jnp.asarray(site.draw_detached())
        values, weights, base_weight = _FAMILIES[family](site, base)
        return site.star(base, _stop(values), weights, base_weight)


def measure_valued() -> Strategy:
    r"""Measure-valued derivatives, $\partial \mathbb{E} F = c (\mathbb{E}^+ F - \mathbb{E}^- F)$.

    The program is run once more for each alternative, with the noise of all other sites in common.
    Alternatives per scalar component: Bernoulli 1, the flip; Categorical K; Poisson 1, x + 1;
    Geometric (failures, on 0, 1, ...) 1, x + x' + 1; Normal 3, two for the mean (Rayleigh) and one
    for the scale (double-sided Maxwell); Gamma 1, x + Exp(1) / rate, for its rate only. Right in
    the first derivative; the second raises.

    Example:
        >>> import vflow as vf
        >>> vf.measure_valued()
        measure_valued()

    Source: Pflug (1996); Mohamed et al., Monte Carlo Gradient Estimation (2020), table 1.
    """
    return MeasureValued()
