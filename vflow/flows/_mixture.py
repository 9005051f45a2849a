"""Mixtures of flows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vflow.bijections import Affine, Chain
from vflow.distributions import Flow, Mixture
from vflow.flows._checks import check_count


def mixture(
    key: PRNGKeyArray,
    make: Callable[[PRNGKeyArray], Flow],
    num_components: int,
    *,
    spread: float = 1.0,
) -> Mixture:
    r"""Several flows of one kind with trainable weights, started apart.

    $$q(x) = \sum_k w_k\, q_k(x)$$

    A flow is one connected piece of probability, and separated modes need thin bridges; a
    component per mode needs none. Every training step draws from every component and evaluates all
    densities at each draw, `num_components` squared in all.

    Args:
        key: PRNG key.
        make: builds a component from a key, as in `lambda key: vf.flows.coupling(key, 2)`.
        num_components: number of components.
        spread: standard deviation of the starting locations, in units of the base distribution
            (whitened ones inside `fit`); components that start together stay together.

    Returns:
        The mixture, a `vf.distributions.Mixture`.

    Raises:
        ValueError: a number of components or a spread out of range.

    Example:
        >>> import jax, vflow as vf
        >>> make = lambda key: vf.flows.coupling(key, 2, num_layers=2)
        >>> q = vf.flows.mixture(jax.random.key(0), make, 3)
        >>> print(q.shape, q.log_weights.shape)
        (2,) (3,)

    Source:
        Morningstar et al. 2021 (arXiv 2003.01687); Papamakarios et al. 2021 (arXiv 1912.02762),
        section 4.
    """
    check_count("mixture", "num_components", num_components)
    if not spread >= 0:
        raise ValueError(f"mixture: spread must not be negative, got {spread}.")

    def component(key: PRNGKeyArray) -> Flow:
        key_flow, key_place = jax.random.split(key)
        flow = make(key_flow)
        place = spread * jax.random.normal(key_place, flow.shape)
        shift = Affine(place, jnp.ones(flow.shape))
        return Flow(flow.base, Chain([flow.bijection, shift]))

    return Mixture([component(k) for k in jax.random.split(key, num_components)])
