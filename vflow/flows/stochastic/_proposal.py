"""A stochastic flow as the proposal of an inner algorithm."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from vflow._core import ProgramError
from vflow.flows.stochastic._flow import StochasticFlow
from vflow.programs._frame import current_frame


class Proposal:
    r"""One site drawn by a stochastic flow, for `vf.importance(n, proposal)` inside `vf.marginal`.

    What the marginal needs are $\log\hat r$ with $\mathbb{E}[1/\hat r \mid u] = 1/r(u)$ at its own draws
    and $\mathbb{E}[\hat r] = r$ at given ones (here by one reversed path), so that the density
    estimated with it is unbiased as ever. Only inside objective programs.

    Args:
        flow: the family, on the shape of the site.
        site: its name; real values.
        log_density: of the site, unnormalised: where the flow's layers move to, often the joint
            density at what is given.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, vflow as vf
        >>> S = vf.flows.stochastic
        >>> @vf.program
        ... def model():
        ...     u = vf.sample("u", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        ...     vf.sample("x", dist.Normal(u, 0.5).to_event(1))
        >>> chain = vf.flows.stochastic_flow(
        ...     jax.random.key(0), 2, [S.Langevin(num_steps=2, step_size=0.1)])
        >>> def proposal(given):
        ...     log_joint = lambda u: -0.5 * jnp.sum(u**2) - 2.0 * jnp.sum((given["x"] - u) ** 2)
        ...     return S.Proposal(chain, "u", log_joint)
        >>> p = vf.marginal(model, ("x",), vf.importance(4, proposal))
        >>> value = vf.expect(lambda: p.log_prob({"x": jnp.ones(2)}))(jax.random.key(1))
    """

    def __init__(self, flow: Any, site: str, log_density: Callable[[Array], Array]):
        if not isinstance(flow, StochasticFlow):
            raise TypeError(
                f"Proposal: flow must be a stochastic flow, got {type(flow).__name__}; a vf.program "
                "is a proposal as it is."
            )
        self.flow, self.site, self.log_density = flow, site, log_density

    def simulate(self, *, gradient: str | None = None) -> tuple[dict[str, Array], Array]:
        """`({site: value}, log r)`."""
        x, log_r = self.flow.simulate(gradient=gradient, log_density=self.log_density)
        return {self.site: x}, log_r

    def log_prob(self, values: dict[str, Any]) -> Array:
        """The log of an unbiased estimate of the density of given values."""
        if set(values) != {self.site}:
            raise ProgramError(
                f"this proposal draws the site {self.site!r}, got values for {sorted(values)}."
            )
        key = current_frame("Proposal.log_prob").key_for(None, "reversed path")
        return self.flow.estimate_log_q(key, values[self.site], self.log_density)
