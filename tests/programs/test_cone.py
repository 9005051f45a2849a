"""The published bounds of the noisy cone, reached by optimisation."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import vflow as vf
from tests.programs.test_marginal import cone, hierarchical

pytestmark = pytest.mark.slow


def mean_field(params):
    numpyro.sample("x", dist.Normal(params[0], jnp.exp(params[2])))
    numpyro.sample("y", dist.Normal(params[1], jnp.exp(params[3])))


def elbo(params):
    values, log_q = vf.from_numpyro(mean_field, params).simulate()
    return vf.from_numpyro(cone).log_prob(values) - log_q


def many(log_weight, n):
    return lambda p: jax.nn.logsumexp(vf.vmap(lambda: log_weight(p), n)) - jnp.log(n)


@pytest.mark.parametrize(
    ("objective", "init", "published", "tolerance"),
    [
        (elbo, [0.0, 0.0, 1.0, 1.0], -8.08, 0.05),
        (many(elbo, 5), [3.0, 0.0, 1.0, 1.0], -7.6, 0.1),
        (lambda p: hierarchical(p, 1), [0.0, 0.0], -9.75, 0.05),
        (lambda p: hierarchical(p, 5), [0.0, 0.0], -8.18, 0.05),
        (many(lambda p: hierarchical(p, 5), 5), [0.0, 0.0], -7.33, 0.05),
    ],
    ids=["elbo", "iwelbo", "hvi", "iwhvi", "diwhvi"],
)
def test_published_bounds(objective, init, published, tolerance):
    estimate = vf.expect(objective, num_samples=64)
    result = vf.maximize(
        jax.random.key(0), estimate, jnp.array(init), num_steps=5000, optimizer=optax.sgd(1e-3)
    )
    assert abs(result.value.value - published) < tolerance + 3 * result.value.standard_error
