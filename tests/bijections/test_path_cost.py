"""The cost of a path gradient in flops of the compiled program: deterministic, no timing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import vflow.bijections as vb
from vflow._core import combine, partition

DIM, LAYERS, HIDDEN, BATCH = 16, 4, (64, 64), 32


def _layer(key):
    return vb.Chain([vb.Coupling(key, DIM, hidden=HIDDEN), vb.Flip(DIM)])


def _flops(bijection, log_ratio):
    """Flops of one gradient of the mean of `log_ratio(bijection, z)`."""
    trained, rest = partition(bijection)

    def objective(trained, z):
        return jnp.mean(jax.vmap(lambda z: log_ratio(combine(trained, rest), z))(z))

    gradient = jax.jit(jax.grad(objective))
    return gradient.lower(trained, jnp.ones((BATCH, DIM))).compile().cost_analysis()["flops"]


def _target(y):
    return -jnp.sum(0.5 * y**2 + 0.05 * y**4)


def _total(bijection, z):
    y, log_det = bijection.forward_and_log_det(z)
    return -0.5 * z @ z - log_det - _target(y)


def _path(bijection, z):
    y, _, score = bijection.forward_with_score(z, -z)
    return jax.lax.stop_gradient(score) @ y - _target(y)


@pytest.mark.parametrize("kind", ["chain", "scan"])
def test_path_gradient_costs_four_thirds(kind):
    """Four products a conditioner layer against three: (4n - 1) / (3n - 1), n = 12 products.

    In the scan it holds only if the body merges a layer's two evaluations.
    """
    keys = jax.random.split(jax.random.key(0), LAYERS)
    if kind == "chain":
        bijection = vb.Chain([_layer(key) for key in keys])
    else:
        bijection = vb.Scan(eqx.filter_vmap(_layer)(keys))
    ratio = _flops(bijection, _path) / _flops(bijection, _total)
    assert ratio < 1.37
    assert ratio > 1.25  # a smaller one would mean that the score is not carried at all


def test_scan_compiles_one_layer():
    """The program of the scan does not grow with its depth; that of the chain does."""

    def size(bijection):
        lowered = jax.jit(jax.vmap(bijection.forward_and_log_det)).lower(jnp.ones((BATCH, DIM)))
        return len(lowered.as_text().splitlines())

    def layers(n):
        return [_layer(key) for key in jax.random.split(jax.random.key(0), n)]

    assert size(vb.Scan.stack(layers(8))) == size(vb.Scan.stack(layers(2)))
    assert size(vb.Chain(layers(8))) > 2 * size(vb.Chain(layers(2)))
