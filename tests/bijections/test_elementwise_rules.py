"""Activations with a derivative of their own, and transformers that take whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow.bijections as vb
from vflow._core._mlp import _ACTIVATIONS

POINTS = np.array([-1e4, -50.0, -3.0, -1e-3, 0.0, 1e-3, 2.0, 50.0, 1e4])


@pytest.mark.parametrize("name", ["relu", "silu", "tanh"])
def test_derivatives_of_activations_are_those_of_jax(name):
    ours, jaxs = _ACTIVATIONS[name], jnp.tanh if name == "tanh" else getattr(jax.nn, name)
    for dtype, tolerance in ((jnp.float64, 1e-15), (jnp.float32, 3e-7)):
        x = jnp.asarray(POINTS, dtype)
        f, g = ours, jaxs
        for _ in range(3):
            np.testing.assert_allclose(jax.vmap(f)(x), jax.vmap(g)(x), rtol=0, atol=tolerance)
            f, g = jax.grad(f), jax.grad(g)
    np.testing.assert_allclose(
        jax.jacfwd(jax.jacrev(ours))(x[6]), jax.hessian(jaxs)(x[6]), atol=1e-15
    )


@pytest.mark.parametrize(
    "transformer",
    [vb.AffineTransformer(), vb.Spline(num_bins=4), vb.SinhArcsinhTransformer()],
    ids=["affine", "spline", "sinh_arcsinh"],
)
def test_a_transformer_of_whole_arrays_is_that_of_each_coordinate(transformer):
    x = jnp.linspace(-6.0, 6.0, 6).reshape(2, 3)
    params = jax.random.normal(jax.random.key(0), (transformer.num_params, 2, 3))
    assert transformer.elementwise
    for run in (transformer.forward, transformer.inverse):
        one_by_one = jax.vmap(jax.vmap(run, in_axes=(0, 1)), in_axes=(0, 1))
        for ours, theirs in zip(run(x, params), one_by_one(x, params), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-14)


class _Softmax(vb.AbstractTransformer):
    """Not elementwise: a softmax over what it takes to be its own parameters."""

    num_params: int = 2

    def forward(self, x, params):
        weight = jax.nn.softmax(params)[0]
        return x * 2 * weight, jnp.log(2 * weight)

    def inverse(self, y, params):
        weight = jax.nn.softmax(params)[0]
        return y / (2 * weight), -jnp.log(2 * weight)


def test_a_transformer_is_of_one_coordinate_unless_it_says_otherwise():
    bijection = vb.Coupling(jax.random.key(0), 4, hidden=(3,), transformer=_Softmax())
    weights = bijection.conditioner.weights
    leaves = (*weights[:-1], jax.random.normal(jax.random.key(1), weights[-1].shape))
    bijection = jax.tree.unflatten(
        jax.tree.structure(bijection),
        [leaves[-1] if leaf is weights[-1] else leaf for leaf in jax.tree.leaves(bijection)],
    )
    x = jnp.array([0.3, -1.0, 2.0, 0.5])
    y, log_det = bijection.forward_and_log_det(x)
    jacobian = jax.jacfwd(lambda x: bijection.forward_and_log_det(x)[0])(x)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobian)[1], rtol=1e-12)
    np.testing.assert_allclose(bijection.inverse_and_log_det(y)[0], x, rtol=1e-12)
