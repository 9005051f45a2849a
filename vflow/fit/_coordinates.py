"""The coordinates in which a target is nearest to a Gaussian, and that Gaussian."""

from jaxtyping import PRNGKeyArray

from vflow._core import FitError
from vflow.fit._dtype import scope
from vflow.fit._precondition import Gaussian, race
from vflow.targets import Target, decentre, funnels

_GAIN = 0.1  # nats of the Gaussian's bound that make new coordinates worth while
_NUM_POINTS = 4  # at which the scales of sites are compared


def choose_coordinates(
    target: Target, key: PRNGKeyArray
) -> tuple[Target, Gaussian, tuple[str, ...]]:
    """The target as it is, or decentred where its best Gaussian is then a better one.

    Only the Gaussian that is kept gets a cover.

    Args:
        target: the unconstrained log density.
        key: PRNG key.

    Returns:
        The target, its best Gaussian, and the names of the decentred sites.
    """
    gaussian, cover = race(target, key)
    with scope("float64"):
        names = funnels(target, points=gaussian.draws[:_NUM_POINTS])
    if not names:
        return target, cover(), ()
    other = decentre(target, names)
    try:
        rival, cover_of_rival = race(other, key)
    except FitError:
        return target, cover(), ()
    if not rival.elbo > gaussian.elbo + _GAIN:
        return target, cover(), ()
    return other, cover_of_rival(), names
