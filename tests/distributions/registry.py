"""Distributions that the law tests run over. A new one joins by one line."""

import jax.numpy as jnp

import vflow.bijections as vb
import vflow.distributions as vd
from tests.flows.registry import perturb


def _flow_of_flow(key):
    inner = vd.Flow(vd.StudentT(jnp.array([3.0])), vb.Affine(jnp.ones(1), 2.0))
    layer = vb.Elementwise(key, 1, transformer=vb.SinhArcsinhTransformer())
    return perturb(vd.Flow(inner, layer), key)


def _rows(key):
    layer = vb.Elementwise(key, 1, transformer=vb.SinhArcsinhTransformer())
    row = perturb(vd.Flow(vd.Normal(1), layer), key)
    return vd.RowCorrelated(row, jnp.array([[1.0, 0.8], [0.8, 1.0]]), 0.3)


def _mixture(key):
    parts = [
        vd.Flow(vd.Normal(2), vb.Affine(jnp.array([m, 0.5]), 1.0 + 0.2 * m**2)) for m in (-1.0, 2.0)
    ]
    return vd.Mixture(parts, jnp.array([0.3, 0.7]))


# Events of one or two coordinates: the laws integrate them on a grid.
DISTRIBUTIONS = {
    "Normal 1": lambda key: vd.Normal(1),
    "Normal 2": lambda key: vd.Normal((2,)),
    "EllipticalStudentT": lambda key: vd.EllipticalStudentT(2, 3.0, trainable=True),
    "Mixture": _mixture,
    "RowCorrelated": _rows,
    "StudentT heavy": lambda key: vd.StudentT(jnp.array([1.5])),
    "StudentT mixed": lambda key: vd.StudentT(jnp.array([jnp.inf, 3.0]), trainable=True),
    "StudentT light": lambda key: vd.StudentT(jnp.array([jnp.inf]), trainable=True),
    "Flow of a flow": _flow_of_flow,
    "Flow triangular": lambda key: perturb(
        vd.Flow(vd.StudentT(jnp.array([jnp.inf, 4.0])), vb.TriangularAffine(2)), key
    ),
}
