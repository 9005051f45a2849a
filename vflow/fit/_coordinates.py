"""The coordinates in which a target is nearest to a Gaussian, and that Gaussian."""

import jax
from jaxtyping import PRNGKeyArray

from vflow._core import FitError
from vflow.fit._dtype import scope
from vflow.fit._precondition import Gaussian, fit_gaussian
from vflow.targets import Target, decentre, funnels

_GAIN = 0.1  # nats of the Gaussian's bound that make new coordinates worth while


def choose_coordinates(
    target: Target, key: PRNGKeyArray
) -> tuple[Target, Gaussian, tuple[str, ...]]:
    """The target as it is, or decentred where its best Gaussian is then a better one.

    Args:
        target: the unconstrained log density.
        key: PRNG key.

    Returns:
        The target, its best Gaussian, and the names of the decentred sites.
    """
    gaussian = fit_gaussian(target, key)
    with scope("float64"):
        names = funnels(target, jax.random.fold_in(key, 1))
    if not names:
        return target, gaussian, ()
    other = decentre(target, names)
    try:
        rival = fit_gaussian(other, key)
    except FitError:
        return target, gaussian, ()
    if not rival.elbo > gaussian.elbo + _GAIN:
        return target, gaussian, ()
    return other, rival, names
