"""The low-rank plus diagonal Gaussian behind fits in more than 200 dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from vflow.fit._low_rank import find_low_rank


def correlated(dim, seed):
    """Mean, scale D, factor F of the covariance D (I + F F^T) D; badly scaled, three directions wide."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(dim))
    factor = rng.standard_normal((dim, 3)) * np.array([2.0, 1.0, 0.5])
    return 3 * scale * rng.standard_normal(dim), scale, factor


def quantities(dim, seed):
    """Mean, covariance and precision."""
    mean, scale, factor = correlated(dim, seed)
    covariance = scale[:, None] * (np.eye(dim) + factor @ factor.T) * scale
    return mean, covariance, np.linalg.inv(covariance)


@pytest.fixture(scope="module")
def found():
    mean, covariance, precision = quantities(80, 0)
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]

    def density(x):
        grad = -(x - mean) @ precision
        return 0.5 * ((x - mean) * grad).sum(axis=1) - 0.5 * log_det, grad

    start = np.zeros(80), 1 / np.sqrt(np.diag(precision))
    return mean, covariance, *find_low_rank(density, *start, np.random.default_rng(1))


def divergence(covariance, root):
    """KL of the two centred normals, in nats."""
    white = np.linalg.solve(np.linalg.cholesky(covariance), root)
    values = np.linalg.eigvalsh(white @ white.T)
    return 0.5 * (values.sum() - len(values) - np.log(values).sum())


def test_a_correlated_gaussian_is_found(found):
    mean, covariance, loc, root, _ = found
    assert np.abs((loc - mean) / np.sqrt(np.diag(covariance))).max() < 0.05
    assert divergence(covariance, root.tril()) < 0.1
    diagonal = np.diag(root.scale)  # what it started from is far away
    assert divergence(covariance, diagonal) > 2.0


def test_one_narrow_direction_whose_diagonal_says_nothing_of_the_rest():
    dim = 100
    precision = np.eye(dim) + np.ones((dim, dim))  # unit diagonal after scaling: all others are 1/2

    def density(x):
        grad = -x @ precision
        return 0.5 * (x * grad).sum(axis=1), grad

    start = np.ones(dim), np.full(dim, 0.5**0.5)
    _, root, _ = find_low_rank(density, *start, np.random.default_rng(0))
    covariance = np.linalg.inv(precision)
    assert divergence(covariance, root.tril()) < 1e-3
    assert divergence(covariance, np.diag(start[1])) > 10.0


def test_the_layer_is_the_gaussian(found):
    _, _, loc, root, _ = found
    layer = root.layer(loc, "float64")
    z = np.random.default_rng(2).standard_normal(80)
    y, log_det = layer.forward_and_log_det(jnp.asarray(z))
    np.testing.assert_allclose(y, loc + root.root(z[None])[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_det, root.log_det(), rtol=1e-9)
    np.testing.assert_allclose(root.log_det(), np.log(np.diag(root.tril())).sum(), rtol=1e-9)
    inverse = np.linalg.norm(layer.inverse_and_log_det(y)[0] - z)
    assert inverse < 1e-8
    matrix = root.root(np.eye(80)).T
    np.testing.assert_allclose(root.transposed(z[None])[0], matrix.T @ z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(matrix @ matrix.T, root.tril() @ root.tril().T, atol=1e-8)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_dimensions():
    mean, scale, factor = correlated(1000, 3)
    small = np.linalg.inv(np.eye(3) + factor.T @ factor)

    def log_density(x):  # Woodbury: never a (1000, 1000) matrix
        z = (x - mean) / scale
        return -0.5 * (z @ z - (z @ factor) @ small @ (factor.T @ z))

    posterior = vf.fit(
        jax.random.key(0), vf.Target(log_density, dim=1000), num_steps=200, progress=False
    )
    assert posterior.status == "ok"
    log_z = 500 * np.log(2 * np.pi) + np.log(scale).sum() - 0.5 * np.linalg.slogdet(small)[1]
    assert abs(posterior.log_evidence.value - log_z) < 0.2
    draws = np.asarray(posterior.sample(jax.random.key(1), 4000)["x"])
    sd = scale * np.sqrt(1 + (factor**2).sum(axis=1))
    assert np.abs((draws.mean(axis=0) - mean) / sd).max() < 0.15
    assert np.abs(np.log(draws.std(axis=0) / sd)).max() < 0.15
