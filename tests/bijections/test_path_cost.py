"""The cost of a path gradient in flops of the compiled program: deterministic, no timing."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow.bijections as vb
from tests.flows.registry import perturb
from vflow._core import combine, partition

pytestmark = pytest.mark.optimised

DIM, LAYERS, HIDDEN, BATCH = 16, 4, (64, 64), 32


def _layer(key, transformer="affine"):
    return vb.Chain([vb.Coupling(key, DIM, hidden=HIDDEN, transformer=transformer), vb.Flip(DIM)])


def _chain(num_layers=LAYERS, **options):
    keys = jax.random.split(jax.random.key(0), num_layers)
    return vb.Chain([_layer(key, **options) for key in keys])


def _flops(bijection, log_ratio):
    return _cost(bijection, log_ratio)["flops"]


def _cost(bijection, log_ratio):
    """XLA's counts for one gradient of the mean of `log_ratio(bijection, z)`."""
    trained, rest = partition(bijection)

    def objective(trained, z):
        return jnp.mean(jax.vmap(lambda z: log_ratio(combine(trained, rest), z))(z))

    # The count is made before machine code is, which need not be good.
    quick = {"xla_backend_optimization_level": 0}
    gradient = jax.jit(jax.grad(objective), compiler_options=quick)
    return gradient.lower(trained, jnp.ones((BATCH, DIM))).compile().cost_analysis()


def _target(y):
    return -jnp.sum(0.5 * y**2 + 0.05 * y**4)


def _total(bijection, z):
    y, log_det = bijection.forward_and_log_det(z)
    return -0.5 * z @ z - log_det - _target(y)


def _path(bijection, z):
    y, _, score = bijection.forward_with_score(z, -z)
    return jax.lax.stop_gradient(score) @ y - _target(y)


def _mixed(bijection, z):
    y, log_det, score = bijection.forward_with_score(z, -z, live=True)
    return 0.7 * jax.lax.stop_gradient(score) @ y - 0.3 * log_det - _target(y)


@pytest.mark.parametrize("kind", ["chain", "scan"])
def test_path_gradient_costs_four_thirds(kind):
    """Four products a conditioner layer against three: (4n - 1) / (3n - 1), n = 12 products.

    In the scan it holds only if the body merges a layer's two evaluations.
    """
    bijection = _chain() if kind == "chain" else vb.Scan.stack(_chain().layers)
    ratio = _flops(bijection, _path) / _flops(bijection, _total)
    assert ratio < 1.37
    assert ratio > 1.25  # a smaller one would mean that the score is not carried at all


def test_mixture_of_both_gradients_costs_no_more_than_the_path_gradient():
    """One backward pass serves both."""
    assert _flops(_chain(), _mixed) < 1.37 * _flops(_chain(), _total)


TRANSFORMERS = {
    "affine": vb.AffineTransformer(-2.0, 0.1),
    "spline": vb.Spline(num_bins=4),
    "tanh mixture": vb.TanhMixture(2),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_are_evaluated_once_in_a_scan(name):
    """Constant arrays, which JAX moves out of the loop one by one, would keep the two evaluations of a
    layer apart: XLA would not see that they are equal. (The third has no closed inverse, and needs none.)
    """
    scan = vb.Scan.stack(_chain(2, transformer=TRANSFORMERS[name]).layers)
    path, total = _cost(scan, _path), _cost(scan, _total)
    assert path["flops"] < 1.42 * total["flops"]
    assert path["transcendentals"] < 1.12 * total["transcendentals"]


def test_a_masked_network_is_evaluated_once_in_a_scan():
    layer = vb.MaskedAutoregressive(jax.random.key(0), DIM, hidden=HIDDEN, activation="tanh")
    scan = vb.Scan.stack([layer, layer])
    path, total = _cost(scan, _path), _cost(scan, _total)
    assert path["transcendentals"] < 1.12 * total["transcendentals"]


def test_path_gradient_along_the_inverse_shares_its_sweep():
    """As in the forward Kullback-Leibler divergence, and in flows made of inverted layers."""

    def likelihood(bijection, y):
        x, log_det = bijection.inverse_and_log_det(y)
        return log_det - 0.5 * x @ x

    def path(bijection, y):
        x, _, score = vb.Invert(bijection).forward_with_score(y, jax.grad(_target)(y))
        return jax.lax.stop_gradient(score + x) @ x

    assert _flops(_chain(), path) < 1.37 * _flops(_chain(), likelihood)


def test_scan_compiles_one_layer():
    """The program of the scan does not grow with its depth; that of the chain does."""

    def size(bijection):
        lowered = jax.jit(jax.vmap(bijection.forward_and_log_det)).lower(jnp.ones((BATCH, DIM)))
        return len(lowered.as_text().splitlines())

    short, long = _chain(2), _chain(8)
    assert size(vb.Scan.stack(long.layers)) == size(vb.Scan.stack(short.layers))
    assert size(long) > 2 * size(short)


def _joint_steps(key, x, score):
    """What the joint steps return, there and back, and slopes of the live log-det."""
    keys = jax.random.split(key, 4)
    scan = vb.Scan.stack([vb.Coupling(keys[0], 2, hidden=(3,))])
    shared = vb.SharedCoupling(keys[1], 2, jnp.array([[1, 0]]), hidden=(3,))
    inverted = vb.Invert(vb.MaskedAutoregressive(keys[2], 2, hidden=(3,)))
    stack = vb.Chain([scan, shared, inverted, vb.Freeze(vb.Affine(jnp.ones(2), 2 * jnp.ones(2)))])
    stack = perturb(stack, keys[3], 0.5)
    y, log_det, score_y = stack.push_score(x, score)
    slope = lambda f: jax.grad(lambda x: f(x)[1])(x)
    return {
        "push": (y, log_det, score_y),
        "there": stack.forward_with_score(x, score),
        "back": stack.inverse_with_score(y, score_y),
        "slope": slope(stack.forward_and_log_det),
        "dead slope": slope(lambda x: stack.forward_with_score(x, score)),
        "live slope": slope(lambda x: vb.Invert(stack).inverse_with_score(x, score, live=True)),
    }


def test_joint_steps_there_and_back():
    """Through chain, scan, shared layers, inverted and frozen ones."""
    x, score = jnp.array([0.3, -1.2]), jnp.array([0.7, 0.4])
    quick = {"xla_backend_optimization_level": 0}
    out = jax.jit(_joint_steps, compiler_options=quick)(jax.random.key(1), x, score)
    close = ft.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    y, log_det, score_y = out["push"]
    jax.tree.map(close, out["there"], (y, log_det, score_y))
    jax.tree.map(close, out["back"], (x, -log_det, score))
    assert np.abs(out["slope"]).max() > 0.01
    close(out["live slope"], out["slope"])
    assert not np.any(out["dead slope"])
