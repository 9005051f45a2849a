"""Programs with estimated densities: unbiased in the sense each side needs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.programs.power import check

PROBS = jnp.array([0.3, 0.7])
LOCS = jnp.array([-1.0, 1.5])


@vf.program
def mixture(strategy=None):
    a = vf.sample("a", dist.Categorical(PROBS), strategy or vf.reinforce())
    vf.sample("x", dist.Normal(LOCS[a], 0.8))


def density(x):
    return (PROBS * jnp.exp(dist.Normal(LOCS, 0.8).log_prob(x))).sum()


@vf.program
def other_proposal():
    vf.sample("a", dist.Categorical(jnp.array([0.6, 0.4])), vf.reinforce())


INNER = {
    "importance(1)": vf.importance(1),
    "importance(3)": vf.importance(3),
    "proposal": vf.importance(3, other_proposal),
    "proposal of the given": vf.importance(2, lambda given: other_proposal),
    "exact": vf.exact_enumeration(),
    "smc": vf.smc(3),
}


def close(estimate, key, truth, batch=200_000):
    draws = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(key, batch)))
    se = draws.std() / np.sqrt(batch)
    assert se < 0.01 * abs(truth)
    assert abs(draws.mean() - truth) < 4.5 * se + 1e-9


@pytest.mark.parametrize("inner", [k for k in INNER if k != "importance(1)"])
def test_the_density_of_a_model_is_unbiased(key, inner):
    q = vf.marginal(mixture, ("x",), INNER[inner])
    x = jnp.array(0.4)
    close(vf.expect(lambda: jnp.exp(q.log_prob({"x": x}))), key, density(x))


@pytest.mark.parametrize("inner", INNER)
def test_the_reciprocal_density_of_a_guide_is_unbiased(key, inner):
    """E over x of t(x) / q_hat is the integral of t, here one, for any t."""
    q = vf.marginal(mixture, ("x",), INNER[inner])

    def objective():
        values, log_q = q.simulate()
        x = values["x"]
        bump = dist.Normal(0.2, 0.5).log_prob(x)
        return jnp.exp(bump - log_q)

    close(vf.expect(objective), key, 1.0)


def test_a_bound_that_forgets_the_first_particle_is_caught(key):
    q = vf.marginal(mixture, ("x",), vf.importance(3))

    def objective():
        values, _ = q.simulate()
        fresh = q.log_prob(values)
        return jnp.exp(dist.Normal(0.2, 0.5).log_prob(values["x"]) - fresh)

    with pytest.raises(AssertionError):
        close(vf.expect(objective), key, 1.0)


def test_the_exact_marginal_needs_no_noise():
    q = vf.marginal(mixture, ("x",), vf.exact_enumeration())
    np.testing.assert_allclose(q.log_prob({"x": jnp.array(0.4)}), jnp.log(density(0.4)), rtol=1e-12)


@pytest.mark.parametrize("inner", [vf.importance(4), vf.smc(4)], ids=["importance", "smc"])
def test_the_gradient_of_an_estimated_density(key, inner):
    """A chain of two steps, each observed: p_hat and its derivative, resampling included."""

    @vf.program
    def chain(t):
        a = vf.sample("a", dist.Normal(t, 1.0))
        vf.sample("x", dist.Normal(a, 1.0))
        b = vf.sample("b", dist.Normal(t * a, 1.0))
        vf.sample("y", dist.Normal(b, 1.0))

    data = {"x": jnp.array(0.5), "y": jnp.array(-0.2)}

    def estimate(key, t):
        objective = lambda: jnp.exp(vf.normalize(chain(t), data, inner).log_evidence)
        return vf.expect(objective)(key)

    def exact(t):
        # (x, y) is Gaussian: mean (t, t^2), covariance [[2, t], [t, 2 + t^2]]
        mean = jnp.stack([t, t**2])
        cov = jnp.stack([jnp.stack([2.0, t]), jnp.stack([t, 2.0 + t**2])])
        both = dist.MultivariateNormal(mean, cov)
        return jnp.exp(both.log_prob(jnp.stack([data["x"], data["y"]])))

    value, slope = jax.value_and_grad(exact)(jnp.array(0.7))
    check(estimate, jnp.array(0.7), key, value=value, gradient=slope)


def test_weighted_values_of_the_posterior(key):
    """The posterior probability of a component, exactly and by importance sampling."""
    truth = 0.7 * jnp.exp(dist.Normal(1.5, 0.8).log_prob(0.4)) / density(0.4)

    def objective(algorithm):
        values, weights, _ = vf.normalize(mixture, {"x": 0.4}, algorithm)
        return (weights * values["a"]).sum()

    exact = vf.expect(lambda: objective(vf.exact_enumeration()))(key)
    many = jax.jit(vf.expect(lambda: objective(vf.importance(500)), 100))(key)
    np.testing.assert_allclose(exact, truth, rtol=1e-12)
    np.testing.assert_allclose(many, truth, rtol=0.02)


def test_numpyro_models_with_their_data_bound(key):
    def model(x):
        a = numpyro.sample("a", dist.Categorical(PROBS))
        numpyro.sample("x", dist.Normal(LOCS[a], 0.8), obs=x)

    program = vf.from_numpyro(model, 0.4, strategies={"a": vf.reinforce()})
    for algorithm in (vf.exact_enumeration(), vf.importance(2000), vf.smc(2000)):
        result = vf.expect(lambda a=algorithm: vf.normalize(program, {}, a).log_evidence)(key)
        np.testing.assert_allclose(result, jnp.log(density(0.4)), atol=0.05)


def cone(z=5.0):
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    y = numpyro.sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    numpyro.sample("z", dist.Normal(r, 0.1 + r / 100.0), obs=z)


def ring(params):
    u = numpyro.sample("u", dist.Uniform(0.0, 1.0))
    angle = 2 * jnp.pi * u
    numpyro.sample("x", dist.Normal(jnp.sqrt(5.0) * jnp.cos(angle), jnp.exp(params[0])))
    numpyro.sample("y", dist.Normal(jnp.sqrt(5.0) * jnp.sin(angle), jnp.exp(params[1])))


def hierarchical(params, num_inner):
    program = vf.from_numpyro(ring, params)
    q = vf.marginal(program, keep=("x", "y"), inner=vf.importance(num_inner))
    values, log_q = q.simulate()
    return vf.from_numpyro(cone).log_prob(values) - log_q


def test_hierarchical_bounds_of_the_cone_are_ordered(key):
    """At fixed parameters: HVI < IWHVI < DIWHVI < log Z = -5.3232 (quadrature)."""
    params = jnp.array([-0.5, -0.5])
    log_w = lambda p: vf.vmap(lambda: hierarchical(p, 5), 5)
    bounds = [
        lambda p: hierarchical(p, 1),
        lambda p: hierarchical(p, 5),
        lambda p: jax.nn.logsumexp(log_w(p)) - jnp.log(5.0),
    ]
    values = [float(jax.jit(vf.expect(b, 20_000))(key, params)) for b in bounds]
    grid = jnp.linspace(-4.0, 4.0, 801)
    r = grid[:, None] ** 2 + grid[None, :] ** 2
    terms = dist.Normal(r, 0.1 + r / 100).log_prob(5.0) + dist.Normal(0.0, 10.0).log_prob(
        grid[:, None] + 0 * r
    )
    terms = terms + dist.Normal(0.0, 10.0).log_prob(grid[None, :] + 0 * r)
    log_z = float(jax.nn.logsumexp(terms)) + 2 * np.log(0.01)
    assert abs(log_z + 5.3232) < 1e-3
    assert values[0] < values[1] - 0.1 < values[2] - 0.2 < log_z - 0.2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vf.importance(0), ValueError, "importance"),
        (lambda: vf.smc(True), ValueError, "smc"),
        (lambda: vf.marginal(mixture, "x", vf.importance(2)), TypeError, "names"),
        (lambda: vf.normalize(mixture, {}, vf.importance), TypeError, "algorithm|importance"),
        (lambda: vf.normalize(density, {}, vf.importance(2)), TypeError, "program"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (lambda: vf.marginal(mixture, ("y",), vf.importance(2)).simulate(), r"\['y'\]"),
        (lambda: vf.marginal(mixture, ("a",), vf.exact_enumeration()).simulate(), "finite support"),
        (lambda: vf.marginal(mixture, ("x",), vf.smc(1)).simulate(), "n >= 2"),
        (lambda: vf.marginal(mixture, ("x",), vf.smc(2)).log_prob({"a": 1}), r"\['x'\]"),
        (lambda: vf.marginal(mixture, ("x",), vf.smc(2)).simulate(gradient="path"), "path"),
    ],
)
def test_marginals_that_cannot_be(q, message):
    with pytest.raises(vf.ProgramError, match=message):
        vf.expect(lambda: q() and jnp.zeros(()))(jax.random.key(0))
