"""The Gaussian fit against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import vflow as vf
from vflow.fit._precondition import fit_gaussian


def test_a_badly_scaled_gaussian_is_recovered_exactly():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    covariance = (rotation * np.array([1e-4, 1e-1, 1e1, 1e4])) @ rotation.T
    precision, loc = np.linalg.inv(covariance), np.array([300.0, -4.0, 0.02, 1e3])
    target = vf.Target(lambda x: -0.5 * (x - loc) @ precision @ (x - loc), dim=4)
    found = fit_gaussian(target, jax.random.key(0))
    np.testing.assert_allclose(found.tril @ found.tril.T, covariance, rtol=1e-3, atol=1e-3)
    white = np.linalg.solve(np.linalg.cholesky(covariance), found.loc - loc)
    assert np.abs(white).max() < 1e-2
    log_z = 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    # the draws' second moments are not exactly one: the bound on them scatters around log Z
    assert abs(found.elbo - log_z) < 1.0
    assert (np.triu(found.tril, 1) == 0).all() and (np.diag(found.tril) > 0).all()


def test_a_skewed_density_gets_the_best_gaussian_and_not_the_laplace_one():
    # log p = a x - exp(x): the ELBO-optimal Gaussian has variance 1/a and mean log a - 1/(2a).
    a = 0.5
    target = vf.Target(lambda x: jnp.sum(a * x - jnp.exp(x)), dim=1)
    found = fit_gaussian(target, jax.random.key(1))
    sd = float(found.tril[0, 0])
    assert abs(found.loc[0] - (np.log(a) - 0.5 / a)) < 0.25 * a**-0.5
    assert abs(np.log(sd * a**0.5)) < 0.2
    assert abs(found.loc[0] - np.log(a)) > 0.5  # the mode, where Laplace would sit


def test_above_the_dense_limit_the_gaussian_of_independent_coordinates_is_right():
    scale = np.exp(np.linspace(-3, 3, 220))
    loc = np.linspace(-5, 5, 220)
    target = vf.Target(lambda x: -0.5 * jnp.sum(((x - loc) / scale) ** 2), dim=220)
    found = fit_gaussian(target, jax.random.key(2))
    assert np.abs(found.tril / scale[:, None] - np.eye(220)).max() < 0.05
    assert np.abs((found.loc - loc) / scale).max() < 0.05


def test_the_better_of_two_modes_wins_and_the_rival_is_reported():
    def log_density(x):
        high = jnp.log(0.9) - 0.5 * ((x[0] - 6.0) / 0.3) ** 2
        low = jnp.log(0.1) - 0.5 * ((x[0] + 6.0) / 0.3) ** 2
        return jnp.logaddexp(high, low)

    found = fit_gaussian(vf.Target(log_density, dim=1), jax.random.key(3))
    assert abs(found.loc[0] - 6.0) < 0.1
    assert len(found.rivals) >= 3


def test_a_density_that_is_finite_nowhere_is_refused_with_its_sites():
    target = vf.target(
        lambda s: jnp.sum(jnp.log(-s["rate"])), sites={"rate": (constraints.positive, (2,))}
    )
    with pytest.raises(vf.FitError, match="rate"):
        fit_gaussian(target, jax.random.key(0))


def test_a_start_where_the_density_breaks_is_left_out():
    # NaN for x[0] <= 0: half of the starts break, the rest find the mode at 1.
    target = vf.Target(lambda x: 20 * jnp.log(x[0]) - 20 * x[0] - 0.5 * x[1] ** 2, dim=2)
    found = fit_gaussian(target, jax.random.key(4))
    assert abs(found.loc[0] - 1.0) < 0.2
