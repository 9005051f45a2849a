"""Kernelised coupling: its formula, its parameters, where it is the identity, what learns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow.bijections as vb
from vflow._core import params, partition


def _randomised(layer, seed=0):
    rng = np.random.default_rng(seed)
    trained, rest = partition(layer)
    noisy = jax.tree.map(lambda a: a + 0.5 * jnp.asarray(rng.normal(size=a.shape)), trained)
    return eqx.combine(noisy, rest)


def _layer(**options):
    options = {"num_centres": 5, "condition_dim": 2, "linear_mean": True} | options
    return _randomised(vb.KernelisedCoupling(jax.random.key(0), 5, **options))


def _kernel(r, name):
    return {
        "rbf": np.exp(-(r**2) / 2),
        "matern12": np.exp(-r),
        "matern32": (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r),
        "matern52": (1 + np.sqrt(5) * r + 5 / 3 * r**2) * np.exp(-np.sqrt(5) * r),
    }[name]


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern32", "matern52"])
def test_formula(kernel):
    layer = _layer(kernel=kernel, min_log_scale=-1.5, max_log_scale=0.5)
    rng = np.random.default_rng(3)
    x, c = rng.normal(size=5), rng.normal(size=2)
    u = np.concatenate([x[:2], c])
    shift, raw = layer.mean[0] + layer.mean[1].T @ u, np.zeros(3)
    for i, w in enumerate(np.asarray(layer.centres)):
        k = _kernel(np.linalg.norm((u - w) / np.exp(layer.log_lengthscale)), kernel)
        shift = shift + k * np.asarray(layer.shift_coefficients)[i]
        raw = raw + k * np.asarray(layer.scale_coefficients)[i]
    bound = np.where(raw < 0, 1.5, 0.5)
    log_scale = 2 * bound / np.pi * np.arctan(raw / bound)
    y, log_det = layer.forward_and_log_det(x, c)
    np.testing.assert_allclose(y, [*x[:2], *(x[2:] * np.exp(log_scale) + shift)], rtol=1e-12)
    np.testing.assert_allclose(log_det, log_scale.sum(), rtol=1e-12)
    assert np.abs(log_scale).max() > 1e-2 and np.abs(y[2:] - x[2:]).max() > 1e-2


@pytest.mark.parametrize("dim", [2, 3, 6])
@pytest.mark.parametrize("condition_dim", [None, 3])
def test_number_of_parameters(dim, condition_dim):
    n, k, c = 7, dim // 2, condition_dim or 0
    options = {"num_centres": n, "condition_dim": condition_dim}
    plain = vb.KernelisedCoupling(jax.random.key(0), dim, **options)
    with_mean = vb.KernelisedCoupling(jax.random.key(0), dim, linear_mean=True, **options)
    count = [sum(a.size for a in jax.tree.leaves(params(b))) for b in (plain, with_mean)]
    assert count[0] == n * (k + c) + 2 * n * (dim - k) + k + c
    assert count[1] - count[0] == (dim - k) * (1 + k + c)


def test_identity_at_the_start_and_far_from_all_centres():
    fresh = vb.KernelisedCoupling(jax.random.key(0), 4, linear_mean=True)
    x = jnp.asarray([0.3, -1.0, 2.0, 5.0])
    for out, expected in zip(fresh.forward_and_log_det(x), (x, 0.0), strict=True):
        np.testing.assert_array_equal(out, expected)
    trained = _layer(linear_mean=False, condition_dim=None)
    far = jnp.asarray([200.0, -300.0, 1.0, 2.0, 3.0])
    assert np.abs(trained.forward_and_log_det(x=far / 300)[0] - far / 300).max() > 1e-2
    for out, expected in zip(trained.forward_and_log_det(far), (far, 0.0), strict=True):
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
def test_derivatives_reach_centres_lengthscales_and_earlier_layers(kernel):
    """Against differences. A kernel evaluated outside the gradient would leave exact zeros."""
    second = _layer(kernel=kernel)
    chain = vb.Chain([_randomised(vb.Affine(jnp.zeros(5)), 1), second, vb.Flip(5), second])
    rng = np.random.default_rng(4)
    y, c = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=2))
    trained, rest = partition(chain)

    def loss(trained, y, c):
        """A log likelihood as in density estimation, and draws as in variational inference."""
        chain = eqx.combine(trained, rest)
        x, inverse_log_det = chain.inverse_and_log_det(y, c)
        forward, log_det = chain.forward_and_log_det(y, c)
        return inverse_log_det - 0.5 * jnp.sum(x**2) + log_det + jnp.sum(jnp.sin(forward))

    value, gradient = jax.jit(loss), jax.jit(jax.grad(loss, (0, 1, 2)))(trained, y, c)
    leaves, tree = jax.tree.flatten((trained, y, c))
    for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = jnp.asarray(rng.normal(size=leaf.shape))
        moved = [
            value(*jax.tree.unflatten(tree, [*leaves[:i], leaf + h * direction, *leaves[i + 1 :]]))
            for h in (-1e-5, 1e-5)
        ]
        expected = (moved[1] - moved[0]) / 2e-5
        assert abs(expected) > 1e-4
        np.testing.assert_allclose(jnp.sum(slope * direction), expected, rtol=1e-6)


def test_centres_are_placed_among_the_inputs():
    layer = vb.KernelisedCoupling(jax.random.key(0), 3, num_centres=8, lengthscale=3.0)
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(20, 3)) * [4.0, 1.0, 1.0])
    placed = layer.place_centres(jax.random.key(1), x)
    chosen = {float(w[0]) for w in placed.centres}
    assert len(chosen) == 8 and chosen <= {float(a) for a in x[:, 0]}
    gaps = [(a - b) ** 2 for a in chosen for b in chosen if a < b]
    heuristic = np.sqrt(np.quantile(gaps, 0.5, method="lower") / 2)
    np.testing.assert_allclose(np.exp(placed.log_lengthscale), 3 * heuristic, rtol=1e-12)
    # fewer rows than centres: each is used, and no two centres coincide
    few = layer.place_centres(jax.random.key(1), x[:3])
    assert len({float(w[0]) for w in few.centres}) == 8
    assert {float(a) for a in x[:3, 0]} <= {float(w[0]) for w in few.centres}
    # the condition joins the input
    wide = vb.KernelisedCoupling(jax.random.key(0), 3, num_centres=4, condition_dim=2)
    placed = wide.place_centres(jax.random.key(1), x, 100 + x[:, :2])
    assert placed.centres.shape == (4, 3)
    np.testing.assert_allclose(placed.centres[:, 1], 100 + placed.centres[:, 0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dim": 1}, "dim = 1 without a condition"),
        ({"dim": 0}, "dim must be"),
        ({"num_centres": 1}, "num_centres must be an integer of at least 2, got 1"),
        ({"kernel": "cubic"}, "kernel must be one of rbf"),
        ({"lengthscale": 0.0}, "lengthscale must be positive, got 0.0"),
        ({"max_log_scale": -1.0}, "min_log_scale < 0 < max_log_scale"),
        ({"num_identity": 3}, "num_identity must be between 1 and dim - 1 = 2, got 3"),
        ({"condition_dim": 0}, "condition_dim"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        vb.KernelisedCoupling(jax.random.key(0), **({"dim": 3} | change))
