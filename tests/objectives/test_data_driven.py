"""Objectives driven by data, and those of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.objectives.test_importance_weighted import OPTIMUM, PARAMS, guide, target
from tests.programs.power import check, moments

DATA = 1.0 + jax.random.normal(jax.random.key(3), (4000, 1))


def over(estimate):
    """The estimate as a function of the parameters of the guide."""
    return jax.jit(jax.value_and_grad(lambda key, p: estimate(key, guide(p)), argnums=1))


def test_forward_kl_is_the_mean_log_likelihood(key):
    value, slope = over(vf.objectives.forward_kl(None, DATA))(key, PARAMS)
    log_q = lambda p: dist.Normal(p["m"], p["s"]).log_prob(DATA).mean()
    truth, gradient = jax.value_and_grad(log_q)(PARAMS)
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    for name in PARAMS:
        np.testing.assert_allclose(slope[name], gradient[name], rtol=1e-10)


def test_minibatches_are_unbiased(key):
    data = DATA[:6]
    batches = vf.objectives.forward_kl(None, data, batch_size=2)
    log_q = lambda p: dist.Normal(p["m"], p["s"]).log_prob(data).mean()
    truth, gradient = jax.value_and_grad(log_q)(PARAMS)
    check(
        lambda key, p: batches(key, guide(p)),
        PARAMS,
        key,
        value=truth,
        gradient=gradient,
        absolute=0.004,
    )


def test_path_gradient_of_the_forward_divergence(key):
    total = over(vf.objectives.forward_kl(target, DATA))
    path = over(vf.objectives.forward_kl(target, DATA, gradient="path"))
    np.testing.assert_allclose(total(key, PARAMS)[0], path(key, PARAMS)[0], rtol=1e-12)
    for leaf in jax.tree.leaves(path(key, OPTIMUM)[1]):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-12)
    # E log N(x; m, s) under N(1, 1): one datum at a time, drawn from p
    exact = jax.grad(lambda p: -jnp.log(p["s"]) - (1 + (1 - p["m"]) ** 2) / (2 * p["s"] ** 2))

    def one(key, p):
        datum = 1.0 + jax.random.normal(key, (1, 1))
        return vf.objectives.forward_kl(target, datum, gradient="path")(key, guide(p))

    check(one, PARAMS, key, gradient=exact(PARAMS))


def test_path_gradient_of_a_base_with_parameters(key):
    flow = vf.distributions.Flow(
        vf.distributions.StudentT(jnp.array([6.0]), trainable=True),
        vf.bijections.Affine(jnp.zeros(1), jnp.ones(1)),
    )
    log_p = dist.StudentT(6.0).log_prob

    def one(gradient):
        def run(key, flow):
            datum = dist.StudentT(6.0).sample(key, (1, 1))
            S = vf.objectives.forward_kl(lambda x: log_p(x).sum(), datum, gradient=gradient)
            return S(key, flow)

        _, grad = vf.value_and_grad(run)(key, flow)
        return jax.tree.leaves(grad.base)[0]

    np.testing.assert_allclose(one("path"), one("total"), rtol=1e-8)


def test_fisher_divergence(key):
    # s_p - s_q = -(x - 1) + (x - m)/s^2, x ~ N(m, s)
    def exact(p):
        m, s = p["m"], p["s"]
        return -((1 / s**2 - 1) ** 2 * s**2 + (m - 1) ** 2)

    estimate = vf.expect(lambda p: vf.objectives.fisher()(guide(p), target))
    value, slope = jax.value_and_grad(exact)(PARAMS)
    check(estimate, PARAMS, key, value=value, gradient=slope)
    assert np.all(moments(estimate, OPTIMUM, key, 1, batch=100).sd < 1e-9)


def test_score_matching(key):
    data = jnp.concatenate([DATA, 0.5 * DATA], axis=1)
    params = {"m": jnp.array([0.4, 0.2]), "s": jnp.array([0.8, 1.2])}
    exact = lambda p: (-0.5 * (data - p["m"]) ** 2 / p["s"] ** 4 + 1 / p["s"] ** 2).sum(1).mean()
    with jax.numpy_rank_promotion("allow"):
        value, slope = jax.value_and_grad(exact)(params)
    found = over(vf.objectives.score_matching(data))(key, params)
    np.testing.assert_allclose(found[0], value, rtol=1e-10)
    for name in params:
        np.testing.assert_allclose(found[1][name], slope[name], rtol=1e-9)


def test_data_emphasised_elbo(key):
    likelihood = lambda x: dist.Normal(0.5, 0.7).log_prob(x).sum()

    def exact(p):
        m, s = p["m"], p["s"]
        prior = -0.5 * ((m - 1) ** 2 + s**2) - 0.5 * jnp.log(2 * jnp.pi) + 0.3
        fit = -0.5 * ((m - 0.5) ** 2 + s**2) / 0.49 - jnp.log(0.7) - 0.5 * jnp.log(2 * jnp.pi)
        return prior + 2.5 * fit + 0.5 * jnp.log(2 * jnp.pi * jnp.e * s**2)

    objective = vf.objectives.data_emphasised_elbo(likelihood, 2.5)
    joint = lambda x: target(x) + likelihood(x)
    value, slope = jax.value_and_grad(exact)(PARAMS)
    for gradient in ("total", "path"):
        estimate = vf.expect(lambda p: objective(guide(p), joint), gradient=gradient)
        check(estimate, PARAMS, key, value=value, gradient=slope)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.forward_kl(None, DATA, gradient="path"), "log density"),
        (lambda o: o.forward_kl(None, DATA, gradient="stl"), "gradient"),
        (lambda o: o.forward_kl(None, jnp.zeros((0, 2))), "data"),
        (lambda o: o.forward_kl(None, DATA, 5000), "batch_size"),
        (lambda o: o.score_matching(jnp.array(1.0)), "data"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(vf.objectives)
