"""Constrained values to unconstrained points, and densities at them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vflow.fit._dtype import cast, scope
from vflow.targets import Target


class Points:
    """The maps between a target's two spaces, on one point or a batch of them.

    Args:
        target: the unconstrained log density.
        dtype: "float32" or "float64", the type to compute in.
    """

    def __init__(self, target: Target, dtype: str):
        self.target, self.dtype = target, dtype
        self._constrain = eqx.filter_jit(jax.vmap(target.constrain))
        self._unconstrain = eqx.filter_jit(jax.vmap(target.unconstrain))

        @eqx.filter_jit
        def log_prob(flow: Any, values: dict[str, Array]):
            def one(values):
                x = target.unconstrain(values)
                inside = jnp.all(jnp.isfinite(x))
                back = target.constrain(x)
                for name, value in values.items():  # some inverses map the outside somewhere
                    tolerance = jnp.sqrt(jnp.finfo(x.dtype).eps) * (1 + jnp.abs(value))
                    inside &= jnp.all(jnp.abs(back[name] - value) <= tolerance)
                return jnp.where(inside, flow.log_prob(x) - log_det(target, x), -jnp.inf)

            return jax.vmap(one)(values)

        self._log_prob = log_prob

    def constrain(self, x: Any) -> dict[str, np.ndarray]:
        """Site -> values at `x` of shape (dim,) or (n, dim)."""
        x = np.asarray(x)
        if x.ndim not in (1, 2) or x.shape[-1] != self.target.dim:
            dim = self.target.dim
            raise ValueError(f"x must have shape ({dim},) or (n, {dim}), got {x.shape}.")
        with scope(self.dtype):
            values = self._constrain(jnp.asarray(x.reshape(-1, x.shape[-1]), self.dtype))
            return {k: np.asarray(v).reshape(x.shape[:-1] + v.shape[1:]) for k, v in values.items()}

    def unconstrain(self, sites: dict[str, Any]) -> np.ndarray:
        """Points of shape (dim,) or (n, dim)."""
        batch, values = self._batched(sites)
        with scope(self.dtype):
            x = np.asarray(self._unconstrain(cast(values, self.dtype)))
        return x.reshape(*batch, self.target.dim)

    def log_prob(self, flow: Any, sites: dict[str, Any]) -> np.ndarray:
        """Log density of the constrained values, shape () or (n,)."""
        batch, values = self._batched(sites)
        for name, value in values.items():
            if np.isnan(value).any():
                raise ValueError(f"site {name!r} is NaN in {np.isnan(value).sum()} places.")
        with scope(self.dtype):
            out = self._log_prob(cast(flow, self.dtype), cast(values, self.dtype))
            return np.asarray(out).reshape(batch)

    def _batched(self, sites: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
        """The batch shape, () or (n,), and the latent values with one batch axis."""
        values, batches = {}, {}
        for site in self.target.sites:
            if site.name not in sites:
                raise ValueError(f"site {site.name!r} is missing; got {sorted(sites)}.")
            value = np.asarray(sites[site.name], np.float64)
            extra = value.ndim - len(site.shape)
            if extra not in (0, 1) or value.shape[extra:] != site.shape:
                raise ValueError(
                    f"site {site.name!r} must have shape {site.shape}, or (n, ...) with that after "
                    f"it, got {value.shape}."
                )
            batches[site.name] = value.shape[:extra]
            values[site.name] = value.reshape(-1 if extra else 1, *site.shape)
        if len(set(batches.values())) > 1:
            raise ValueError(f"the sites have different numbers of points: {batches}.")
        return next(iter(batches.values())), values


def log_det(target: Target, x: Array) -> Array:
    r"""$\log|\det \partial T/\partial x|$ of the constraining map."""
    parts = [
        jnp.sum(value) for name, value in target.terms(x).items() if name.startswith("jacobian of ")
    ]
    return sum(parts, start=jnp.zeros_like(x, shape=()))
