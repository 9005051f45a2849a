"""What every flow constructor promises; a new one joins through the registry."""

import functools as ft
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.flows.registry import FLOWS, perturb
from vflow._core import combine, partition

# Compilation is dear: the wide variants of a family wait for `make slow`.
WIDE = {name for name in FLOWS if set(name) & set("35")}
names = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in WIDE else ()) for name in FLOWS]
)
CONDITION = jnp.array([0.3, -1.0, 0.5])
N = 6
NEAR_THE_BASE = {"block_autoregressive"}  # start near it, not at it
ELSEWHERE = {"heavy_tail 5"}  # start at their last layers
# XLA makes a product and a sum one rounding in one of two programs; without such instructions
# (XLA_FLAGS=--xla_cpu_max_isa=AVX) these are equal bit for bit as well.
FUSED = {"coupling spline", "heavy_tail 5"}


def _log_p(x):
    return -0.25 * jnp.sum(x**4) ** 0.5 + jnp.sum(jnp.sin(x)) * x[0]


class _Results(NamedTuple):
    start: Any
    at_start: Any  # draws and densities of `start`
    flow: Any
    condition: Any
    keys: Any
    values: Any
    gradients: Any


@ft.cache
def _results(name) -> _Results:
    """Per draw: the draw, log q by inversion, and gradients of log p - log q in several ways.

    "naive" is the path gradient by its definition, log q with stopped parameters at the live draw;
    "at optimum" takes the flow itself, stopped, as the target.
    """
    start = FLOWS[name](jax.random.key(0))
    # Far from the identity a stack of splines has a density of needles that no grid resolves.
    flow = perturb(start, jax.random.key(1), 0.1 if "spline" in name else 0.3)
    condition = None if flow.condition_shape is None else CONDITION
    trained, static = partition(flow)

    def run(trained, key, condition):
        def draw(gradient):
            return lambda trained, condition: combine(trained, static).sample_and_log_prob(
                key, condition, gradient=gradient
            )

        (x, log_q), pull_total = jax.vjp(draw("total"), trained, condition)
        path_values, pull_path = jax.vjp(draw("path"), trained, condition)
        own, own_slope = jax.value_and_grad(combine(trained, static).log_prob)(x, condition)
        slope, one = jax.grad(_log_p)(x), jnp.ones_like(log_q)
        # one backward pass each to compile, for all the directions
        total = jax.vmap(pull_total)(
            (jnp.stack([slope, own_slope, slope - own_slope]), jnp.stack([-one, -one, 0 * one]))
        )
        path = jax.vmap(pull_path)((jnp.stack([slope, own_slope]), jnp.stack([-one, -one])))
        part = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
        gradients = {
            "total": part(total, 0),
            "path": part(path, 0),
            "naive": part(total, 2),
            "total at optimum": part(total, 1),
            "path at optimum": part(path, 1),
        }
        return {"total": (x, log_q), "path": path_values, "own": own}, gradients

    keys = jax.random.split(jax.random.key(2), N)
    compiled = jax.jit(jax.vmap(run, (None, 0, None)))
    at_start = compiled(partition(start)[0], keys, condition)[0]["total"]
    values, gradients = jax.tree.map(np.asarray, compiled(trained, keys, condition))
    return _Results(start, at_start, flow, condition, keys, values, gradients)


# Families outside the laws, and the tests of their own.
OTHERS = {
    "continuous": "bijections/test_continuous.py",  # exact to a tolerance
    "injective": "objectives/test_free_form.py",
    "mixture": "distributions/test_mixture.py",  # its draws are not differentiable
    "stochastic": "stochastic/test_weights.py",  # a namespace of layers, not a flow
    "stochastic_flow": "stochastic/test_weights.py",  # has no log density at a point
}


def test_every_exported_flow_is_in_the_registry():
    assert {name.split()[0] for name in FLOWS} | set(OTHERS) == set(vf.flows.__all__)
    tests = pathlib.Path(__file__).parents[1]
    assert all((tests / path).is_file() for path in OTHERS.values())


def _largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


@names
def test_draws_and_densities_agree(name):
    values = _results(name).values
    np.testing.assert_allclose(values["total"][1], values["own"], rtol=1e-9)


@names
def test_path_draws_the_samples_and_values_of_total(name):
    values = _results(name).values
    if name in FUSED:
        for path, total in zip(values["path"], values["total"], strict=True):
            np.testing.assert_allclose(path, total, rtol=1e-14, atol=1e-15)
    else:
        np.testing.assert_array_equal(values["path"][0], values["total"][0])
        np.testing.assert_allclose(values["path"][1], values["total"][1], rtol=1e-15)


@names
def test_path_gradient_is_the_naive_one(name):
    path, naive, total = (_results(name).gradients[way] for way in ("path", "naive", "total"))
    scale = _largest(naive)
    assert scale > 1e-2
    for a, b in zip(jax.tree.leaves(path), jax.tree.leaves(naive), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * scale)
    assert _largest(jax.tree.map(np.subtract, path, total)) > 1e-2 * scale  # not simply "total"


@names
def test_path_gradient_vanishes_where_the_flow_is_its_target(name):
    gradients = _results(name).gradients
    assert _largest(gradients["path at optimum"]) < 1e-10
    assert _largest(gradients["total at optimum"]) > 0.1


@names
def test_every_trained_leaf_gets_a_gradient(name):
    for leaf in jax.tree.leaves(_results(name).gradients["total"]):
        assert np.isfinite(leaf).all()
        assert leaf.any()


@names
def test_starts_at_the_base(name):
    if name in ELSEWHERE:
        return
    start, (x, log_q), *_ = results = _results(name)
    near = 0.5 if name in NEAR_THE_BASE else 0.0
    base = start.base.sample(results.keys[0])
    np.testing.assert_allclose(x[0], base, rtol=1e-12, atol=near)
    np.testing.assert_allclose(log_q[0], start.base.log_prob(x[0]), rtol=1e-12, atol=near)


@names
def test_the_density_integrates_to_one(name):
    flow, condition = _results(name).flow, _results(name).condition
    (dim,) = flow.shape
    if dim > 2:
        return  # the same layers are in the registry with two coordinates
    u = np.linspace(-12.0, 12.0, {1: 1201, 2: 301}[dim])
    mesh = np.stack(np.meshgrid(*[u] * dim, indexing="ij"), -1).reshape(-1, dim)
    log_density = jax.jit(jax.vmap(flow.log_prob, (0, None)))(jnp.sinh(mesh), condition)
    total = np.sum(np.exp(log_density + np.sum(np.log(np.cosh(mesh) * (u[1] - u[0])), 1)))
    # a spline's density has kinks, the others are smooth
    np.testing.assert_allclose(total, 1.0, atol=1e-4 if "spline" in name else 1e-6)


@names
def test_float32_without_a_second_compilation(name):
    results, traces = _results(name), []
    with jax.enable_x64(False):
        single = FLOWS[name](jax.random.key(0))
        single = jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), single, results.flow)
        condition = None if single.condition_shape is None else CONDITION.astype(jnp.float32)
        points = jnp.asarray(results.values["total"][0][0], jnp.float32)

        @jax.jit
        def run(flow, key, points):
            traces.append(None)
            draw = flow.sample_and_log_prob(key, condition, gradient="path")
            return *draw, flow.log_prob(points, condition)

        x, log_q, again = run(single, results.keys[0], points)
        run(jax.tree.map(lambda a: a + 0, single), results.keys[1], points)
    assert len(traces) == 1
    assert x.dtype == log_q.dtype == again.dtype == jnp.float32
    np.testing.assert_allclose(again, results.values["own"][0], rtol=1e-4, atol=1e-4)
