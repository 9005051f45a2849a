"""A hierarchical model in coordinates in which its sites do not depend on each other's scale."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core._compile import jit_once
from vflow.targets._numpyro import NumpyroSpace
from vflow.targets._target import Target

_NUM_POINTS = 4


def funnels(
    target: Target, key: PRNGKeyArray | None = None, *, points: Any = None
) -> tuple[str, ...]:
    """The location-scale sites of a NumPyro model whose scale depends on other sites.

    Args:
        target: any target.
        key: PRNG key of the prior draws at which the scales are compared.
        points: instead of a key, other points (n, dim) to compare them at.

    Returns:
        Names of sites; none for a target that is no NumPyro model.
    """
    space = target.space
    if not isinstance(space, NumpyroSpace):
        return ()
    points = space.prior_draws(key, _NUM_POINTS) if key is not None else points
    scales = jit_once(jax.vmap(space.hierarchical))(points)
    varied = {name for name, scale in scales.items() if np.ptp(scale, axis=0).max() > 0}
    return tuple(site.name for site in target.sites if site.name in varied)


def decentre(target: Target, names: tuple[str, ...]) -> Target:
    r"""The same target with other coordinates for some sites: $z = (x - m)/s$ instead of $x$.

    Location $m$ and scale $s$ are those that the model gives the site, functions of the sites before
    it. The constrained values and their density stay what they are; the funnel between a site and
    its scale, which no flow bends straight easily, is gone where data say little about each
    element, and comes into being where they say much.

    Args:
        target: of a NumPyro model.
        names: sites as `funnels` finds them.

    Source:
        Papaspiliopoulos, Roberts & Skold 2007, A general framework for the parametrization of
        hierarchical models; Betancourt & Girolami 2015 (arXiv 1312.0906).
    """
    space = target.space
    if not isinstance(space, NumpyroSpace) or not names:
        return target
    return Target(NumpyroSpace(space.program, space.latent, names))
