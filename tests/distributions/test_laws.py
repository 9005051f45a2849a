"""What every distribution promises; a new one joins through the registry."""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow.distributions as vd
from tests.distributions.registry import DISTRIBUTIONS

STEPS = {1: 4001, 2: 401}
CELLS = {1: 20, 2: 6}
REACH = {1: 40.0, 2: 20.0}

names = pytest.mark.parametrize("name", DISTRIBUTIONS)


@ft.cache
def _make(name):
    return DISTRIBUTIONS[name](jax.random.key(1))


def test_every_exported_distribution_is_in_the_registry():
    built = {type(make(jax.random.key(1))).__name__ for make in DISTRIBUTIONS.values()}
    classes = {
        name: getattr(vd, name) for name in vd.__all__ if isinstance(getattr(vd, name), type)
    }
    final = {
        name
        for name, kind in classes.items()
        if issubclass(kind, vd.AbstractDistribution) and kind is not vd.AbstractDistribution
    }
    assert built == final


@ft.cache
def _grid_masses(name):
    """Masses of the boxes of a fine grid in u = arcsinh(x), by the trapezoidal rule."""
    distribution = _make(name)
    dim = math.prod(distribution.shape)
    u = np.linspace(-REACH[dim], REACH[dim], STEPS[dim])
    mesh = np.stack(np.meshgrid(*[u] * dim, indexing="ij"), -1).reshape(-1, dim)
    points = jnp.sinh(mesh).reshape(-1, *distribution.shape)
    log_density = jax.jit(jax.vmap(distribution.log_prob))(points)
    step = u[1] - u[0]
    masses = np.exp(log_density + np.sum(np.log(np.cosh(mesh) * step), 1))
    return mesh, masses


@names
def test_the_density_integrates_to_one(name):
    _, masses = _grid_masses(name)
    assert np.isfinite(masses).all()
    np.testing.assert_allclose(masses.sum(), 1.0, atol=1e-6)


def _chi_square_p(name, x):
    """p-value of the counts of arcsinh(x) in cells, against the density's masses there."""
    mesh, masses = _grid_masses(name)
    dim = mesh.shape[1]
    step = 2 * REACH[dim] / (STEPS[dim] - 1)
    edges = []
    for axis in range(dim):
        order = np.argsort(mesh[:, axis])
        cumulative = np.cumsum(masses[order]) / masses.sum()
        inner = np.searchsorted(cumulative, np.arange(1, CELLS[dim]) / CELLS[dim])
        # Edges half a step beside grid points, where the trapezoidal masses end.
        cuts = np.unique(mesh[order[inner], axis]) + step / 2
        edges.append(np.r_[-np.inf, cuts, np.inf])
    expected, _ = np.histogramdd(mesh, edges, weights=masses)
    counts, _ = np.histogramdd(np.arcsinh(x), edges)
    return scipy.stats.chisquare(
        counts.ravel(), expected.ravel() / expected.sum() * counts.sum()
    ).pvalue


@names
def test_draws_follow_the_density(name):
    distribution = _make(name)
    draw = jax.jit(lambda key: vd.sample_and_log_prob(key, distribution, 20_000))
    x, log_q = draw(jax.random.key(2))
    np.testing.assert_allclose(log_q, jax.vmap(distribution.log_prob)(x), rtol=1e-9, atol=1e-9)
    x = np.asarray(x).reshape(len(x), -1)
    assert _chi_square_p(name, x) > 1e-4
    # Power: the same test rejects draws that are five percent too wide.
    assert _chi_square_p(name, 1.05 * x) < 1e-4


@names
def test_score_is_the_gradient_of_the_log_density(name):
    distribution = _make(name)
    x = jnp.full(distribution.shape, 0.7)
    np.testing.assert_allclose(
        distribution.score(x), jax.grad(distribution.log_prob)(x), rtol=1e-12
    )


@names
def test_float32(name):
    double = _make(name)
    x = np.full(double.shape, 0.7)
    with jax.enable_x64(False):
        single = DISTRIBUTIONS[name](jax.random.key(1))
        single = jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), single, double)
        y, log_q = single.sample_and_log_prob(jax.random.key(3))
        value = single.log_prob(jnp.asarray(x, jnp.float32))
    assert y.dtype == log_q.dtype == value.dtype == jnp.float32
    np.testing.assert_allclose(value, double.log_prob(jnp.asarray(x)), rtol=1e-5)


@names
def test_second_call_does_not_recompile(name):
    distribution = _make(name)
    traces = []

    @jax.jit
    def run(distribution, key):
        traces.append(None)
        return distribution.sample_and_log_prob(key)

    run(distribution, jax.random.key(0))
    run(jax.tree.map(lambda a: a + 0, distribution), jax.random.key(1))
    assert len(traces) == 1


@names
def test_no_key_is_used_twice(name, no_key_reuse):
    vd.sample_and_log_prob(jax.random.key(0), _make(name), 2)
