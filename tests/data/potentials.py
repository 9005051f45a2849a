"""The energies U1 to U4 of Rezende & Mohamed 2015 (arXiv 1505.05770, table 1), with their log Z.

U2, U3 and U4 are flat in the first coordinate: on the whole plane they have no normalising constant.
A soft wall, quadratic beyond |z1| = 4, makes them proper, and log Z has a closed form, since the
integral over the second coordinate does not depend on the first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Potential(NamedTuple):
    """An unnormalised log density on the plane and the logarithm of its integral."""

    log_density: Callable
    log_z: float


def _wall(z):
    return 0.5 * (jnp.maximum(jnp.abs(z[0]) - 4, 0) / 0.4) ** 2


def _bump(x, scale):
    return -0.5 * (x / scale) ** 2


def _wave(z):
    return jnp.sin(2 * math.pi * z[0] / 4)


def _ring(z):
    two = jnp.logaddexp(_bump(z[0] - 2, 0.6), _bump(z[0] + 2, 0.6))
    return two + _bump(jnp.sqrt(z @ z) - 2, 0.4)


def _strip(z):
    return _bump(z[1] - _wave(z), 0.4) - _wall(z)


def _fork(z):
    gap = 3 * jnp.exp(_bump(z[0] - 1, 0.6))
    first = _bump(z[1] - _wave(z), 0.35)
    return jnp.logaddexp(first, _bump(z[1] - _wave(z) + gap, 0.35)) - _wall(z)


def _step(z):
    gap = 3 * jax.nn.sigmoid((z[0] - 1) / 0.3)
    first = _bump(z[1] - _wave(z), 0.4)
    return jnp.logaddexp(first, _bump(z[1] - _wave(z) + gap, 0.35)) - _wall(z)


_ROOT = math.sqrt(2 * math.pi)
_LENGTH = 8 + 0.4 * _ROOT  # the integral of the wall

POTENTIALS = {
    "U1": Potential(_ring, 1.877502),  # the others are exact; this one by quadrature
    "U2": Potential(_strip, math.log(0.4 * _ROOT * _LENGTH)),
    "U3": Potential(_fork, math.log(2 * 0.35 * _ROOT * _LENGTH)),
    "U4": Potential(_step, math.log((0.4 + 0.35) * _ROOT * _LENGTH)),
}
