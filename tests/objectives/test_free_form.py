"""The surrogate for the change of volume against determinants; training against PCA."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.programs.power import check


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


def _pair(encoder):
    """An encoder and the decoder that inverts it."""
    d, dim = encoder.shape
    return vf.distributions.FreeForm(Linear(encoder), Linear(jnp.linalg.pinv(encoder)), dim, d)


@pytest.mark.parametrize("d", [1, 3, 5])
def test_gradient_is_that_of_the_volume(d, key):
    """With d probes and a decoder that inverts the encoder W: grad of 1/2 log det(W W')."""
    encoder = jax.random.normal(key, (d, 5))
    x = jax.random.normal(jax.random.key(1), (1, 5))
    estimate = vf.objectives.free_form(x, beta=0.0, num_probes=d)

    def loss(w, v):
        return estimate(key, vf.distributions.FreeForm(Linear(w), Linear(v), 5, d))

    def exact(w):
        return 0.5 * jnp.linalg.slogdet(w @ w.T)[1] - 0.5 * jnp.sum((w @ x[0]) ** 2)

    slope, of_decoder = jax.grad(loss, argnums=(0, 1))(encoder, jnp.linalg.pinv(encoder))
    np.testing.assert_allclose(slope, jax.grad(exact)(encoder), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(of_decoder, 0.0, atol=1e-14)


def test_one_probe_is_unbiased(key):
    encoder = jax.random.normal(jax.random.key(5), (2, 3))
    estimate = vf.objectives.free_form(jnp.zeros((1, 3)), beta=0.0)
    decoder = Linear(jnp.linalg.pinv(encoder))

    def loss(key, w):
        return estimate(key, vf.distributions.FreeForm(Linear(w), decoder, 3, 2))

    exact = jax.grad(lambda w: 0.5 * jnp.linalg.slogdet(w @ w.T)[1])(encoder)
    check(loss, encoder, key, gradient=exact)


def test_reported_density_is_that_of_the_decoder(key):
    """On the plane g(z) = V z: the normal density of z over the area of V."""
    encoder = jax.random.normal(key, (2, 4))
    flow = _pair(encoder)
    z = jnp.array([0.3, -1.2])
    v = np.linalg.pinv(encoder)
    truth = -0.5 * (0.3**2 + 1.2**2) - np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(v.T @ v)[1]
    np.testing.assert_allclose(flow.log_prob(flow.decode(z)), truth, rtol=1e-12)


def test_training_finds_the_principal_subspace():
    """Linear-Gaussian data of rank two and a little noise."""
    rng = np.random.default_rng(0)
    loadings = np.linalg.qr(rng.normal(size=(5, 2)))[0] * [2.0, 1.0]
    data = rng.normal(size=(400, 2)) @ loadings.T + 0.05 * rng.normal(size=(400, 5))
    start = vf.flows.injective(jax.random.key(0), 5, 2, hidden=())
    estimate = vf.objectives.free_form(jnp.asarray(data), 100, beta=10.0, num_probes=2)
    flow = vf.maximize(jax.random.key(1), estimate, start, num_steps=2000).params
    tangent = np.asarray(jax.jacfwd(flow.decode)(jnp.zeros(2)))
    within = np.linalg.svd(np.linalg.qr(tangent)[0].T @ np.linalg.svd(data)[2][:2].T)[1]
    assert within.min() > 0.999
    # and the scale: the decoder's covariance is that of the data in the subspace
    np.testing.assert_allclose(np.linalg.svd(tangent)[1], np.linalg.svd(data)[1][:2] / 20, rtol=0.1)


def test_bad_arguments_are_named():
    flow = vf.flows.injective(jax.random.key(0), 3, 2, hidden=())
    with pytest.raises(ValueError, match="num_probes"):
        vf.objectives.free_form(jnp.zeros((4, 3)), num_probes=3)(jax.random.key(0), flow)
    with pytest.raises(ValueError, match="beta"):
        vf.objectives.free_form(jnp.zeros((4, 3)), beta=-1.0)
    with pytest.raises(ValueError, match="latent_dim"):
        vf.flows.injective(jax.random.key(0), 3, 4)
    with pytest.raises(ValueError, match="encoder does not take"):
        vf.distributions.FreeForm(flow.decoder, flow.decoder, 3, 2)


def test_likelihood_of_dependent_rows_is_per_row_and_unbiased_over_batches(key):
    """All rows: the density over n; batches of two of three rows: the mean over all pairs."""
    similarity = jnp.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.2], [0.0, 0.2, 1.0]])
    rows = vf.distributions.RowCorrelated(vf.flows.gaussian(key, 1), similarity, 0.4)
    x = jnp.array([[0.3], [-1.2], [0.8]])
    whole = vf.objectives.dependent_likelihood(x)(key, rows)
    np.testing.assert_allclose(whole, rows.log_prob(x) / 3, rtol=1e-12)
    batch = vf.objectives.dependent_likelihood(x, 2)
    values = jax.vmap(lambda key: batch(key, rows))(jax.random.split(key, 60))
    pairs = [rows.log_prob_batch(x[i], i) / 3 for i in map(jnp.array, ([0, 1], [0, 2], [1, 2]))]
    np.testing.assert_allclose(np.unique(np.round(values, 9)), np.sort(pairs), atol=1e-8)
