"""NumPyro models and guides as programs: the joint density of given values, and simulation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from scipy import stats

import vflow as vf

X = np.array([0.5, 1.0, -0.3, 0.9])


def mixed(x=X):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Bernoulli(0.3))
    numpyro.deterministic("mean", z + b)
    with numpyro.plate("n", len(x)):
        numpyro.sample("x", dist.Normal(z + b, 1.0), obs=x)


def mixed_by_hand(z, b, x=X):
    prior = stats.norm.logpdf(z) + stats.bernoulli.logpmf(b, 0.3)
    return prior + stats.norm.logpdf(x, z + b).sum()


def test_log_prob_is_the_joint_density_discrete_latents_included():
    program = vf.from_numpyro(mixed)
    for z, b in ((0.3, 1), (-1.2, 0)):
        assert program.log_prob({"z": z, "b": b}) == pytest.approx(mixed_by_hand(z, b), rel=1e-13)
    values = {"z": jnp.array([0.3, -1.2]), "b": jnp.array([1, 0])}
    found = jax.jit(jax.vmap(program.log_prob))(values)
    np.testing.assert_allclose(found, [mixed_by_hand(0.3, 1), mixed_by_hand(-1.2, 0)], rtol=1e-13)


def test_log_prob_takes_what_constrain_gives_and_later_arguments():
    program = vf.from_numpyro(mixed)
    values = {"z": 0.3, "b": 1, "mean": 99.0}  # a deterministic site is ignored
    expected = mixed_by_hand(0.3, 1, X[:2])
    assert program.log_prob(values, X[:2]) == pytest.approx(expected, rel=1e-13)


def test_log_prob_scales_masks_and_adds_factors():
    def model():
        with handlers.scale(scale=3.0), handlers.mask(mask=np.array([True, False])):
            numpyro.sample("a", dist.Exponential(2.0).expand([2]))
        numpyro.factor("extra", -7.0)

    value = vf.from_numpyro(model).log_prob({"a": np.array([0.5, 0.2])})
    assert value == pytest.approx(3 * stats.expon.logpdf(0.5, scale=0.5) - 7.0, rel=1e-13)


def test_a_value_outside_its_support_is_impossible():
    def model():
        numpyro.sample("a", dist.Exponential(2.0))

    assert vf.from_numpyro(model).log_prob({"a": -1.0}) == -np.inf


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"z": 0.0}, "latent site 'b' of model mixed has no value"),
        ({"z": 0.0, "b": 1, "c": 2.0}, "'c' is not a site of model mixed"),
        ({"z": 0.0, "b": 1, "x": X}, "'x' is observed in model mixed"),
        ({"z": np.zeros(4), "b": 1}, r"latent site 'z' has shape \(\), got .*\(4,\)"),
    ],
)
def test_values_that_do_not_fit_are_named(values, match):
    with pytest.raises(vf.ProgramError, match=match):
        vf.from_numpyro(mixed).log_prob(values)


def guide(params):
    a = numpyro.sample("a", dist.Normal(params["loc"], jnp.exp(params["log_scale"])))
    with numpyro.plate("n", 3):
        numpyro.sample("b", dist.Normal(a, 2.0))


PARAMS = {"loc": jnp.array(0.4), "log_scale": jnp.array(-0.3)}


def test_simulate_draws_from_the_guide_and_scores_its_draw(key, no_key_reuse):
    def draws_of(pick):
        estimate = vf.expect(lambda: pick(*vf.from_numpyro(guide, PARAMS).simulate()))
        return jax.jit(jax.vmap(estimate))(keys)

    keys = jax.random.split(key, 2000)
    a = draws_of(lambda values, log_q: values["a"])
    step = draws_of(lambda values, log_q: values["b"][0] - values["a"])
    log_q = draws_of(lambda values, log_q: log_q)
    assert stats.kstest(a, stats.norm(0.4, np.exp(-0.3)).cdf).pvalue > 1e-4
    assert stats.kstest(step, stats.norm(0.0, 2.0).cdf).pvalue > 1e-4
    entropy = 4 * 0.5 * np.log(2 * np.pi * np.e) - 0.3 + 3 * np.log(2)
    assert abs(log_q.mean() + entropy) < 4.5 * log_q.std() / np.sqrt(len(keys))


def test_log_q_is_the_density_of_the_values():
    def objective(params):
        q = vf.from_numpyro(guide, params)
        values, log_q = q.simulate()
        return jnp.abs(log_q - q.log_prob(values))

    assert float(vf.expect(objective)(jax.random.key(0), PARAMS)) < 1e-13


def test_gradients_reach_the_parameters_of_a_guide(key):
    """E[a^2 + sum b^2] = 4 (loc^2 + scale^2) + 12."""

    def objective(params):
        values, _ = vf.from_numpyro(guide, params).simulate()
        return values["a"] ** 2 + jnp.sum(values["b"] ** 2)

    gradient = jax.jit(jax.vmap(jax.grad(vf.expect(objective), argnums=1), in_axes=(0, None)))
    found = gradient(jax.random.split(key, 4000), PARAMS)
    truth = {"loc": 8 * 0.4, "log_scale": 8 * np.exp(-0.6)}
    for name, draws in found.items():
        error = abs(draws.mean() - truth[name]) / (draws.std() / np.sqrt(len(draws)))
        assert error < 4.5, name


def test_programs_may_be_made_of_traced_arguments():
    def objective(params):
        values, log_q = vf.from_numpyro(guide, params).simulate()
        p = vf.from_numpyro(lambda scale: guide({"loc": 0.0, "log_scale": scale}), params["loc"])
        return p.log_prob(values) - log_q

    value, grad = jax.jit(vf.value_and_grad(vf.expect(objective)))(jax.random.key(0), PARAMS)
    assert np.isfinite(value)
    assert all(np.isfinite(g) for g in grad.values())


def test_a_site_without_a_strategy_is_refused_by_name():
    with pytest.raises(vf.ProgramError, match=r"'b'.*strateg"):
        vf.expect(lambda: vf.from_numpyro(mixed).simulate()[1])(jax.random.key(0))


def test_simulate_outside_an_objective_says_so():
    with pytest.raises(vf.ProgramError, match="outside an objective"):
        vf.from_numpyro(mixed).simulate()


def test_a_program_holds_no_trained_leaf_and_is_static_to_jit():
    program = vf.from_numpyro(mixed, jnp.asarray(X))
    assert jax.tree.leaves(program) == []
    value = eqx.filter_jit(lambda program, z: program.log_prob({"z": z, "b": 1}))(program, 0.3)
    assert value == pytest.approx(mixed_by_hand(0.3, 1), rel=1e-13)
