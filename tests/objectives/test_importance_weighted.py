"""Objectives of importance weights, against closed forms between Gaussians."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.programs.power import check, moments

LOG_Z = 0.3


def guide(p):
    affine = vf.bijections.Affine(jnp.atleast_1d(p["m"]), jnp.atleast_1d(p["s"]))
    return vf.distributions.Flow(vf.distributions.Normal(affine.shape[0]), affine)


def target(x):
    """N(1, 1), with log Z = 0.3."""
    return dist.Normal(1.0, 1.0).log_prob(x).sum() + LOG_Z


PARAMS = {"m": jnp.array(0.4), "s": jnp.array(0.8)}
OPTIMUM = {"m": jnp.array(1.0), "s": jnp.array(1.0)}


def estimate(objective, num_samples=1, **kwargs):
    return vf.expect(lambda p: objective(guide(p), target), num_samples, **kwargs)


@pytest.mark.parametrize("gradient", ["total", "path"])
def test_elbo(key, gradient):
    kl = lambda p: (p["s"] ** 2 + (p["m"] - 1) ** 2 - 1) / 2 - jnp.log(p["s"])
    slope = jax.grad(lambda p: LOG_Z - kl(p))(PARAMS)
    bound = estimate(vf.objectives.elbo(), gradient=gradient)
    check(bound, PARAMS, key, gradient=slope)
    sd = moments(bound, OPTIMUM, key, 1, batch=1000).sd[1:]
    assert np.all(sd < 1e-12) if gradient == "path" else np.all(sd > 0.1)


def test_one_particle_is_the_elbo(key):
    one = jax.jit(estimate(vf.objectives.iwelbo(1), 2000))(key, PARAMS)
    elbo = jax.jit(estimate(vf.objectives.elbo(), 2000))(key, PARAMS)
    assert abs(one - elbo) < 0.1


def test_the_orders_of_renyi(key):
    obj = vf.objectives
    run = lambda objective: float(jax.jit(estimate(objective))(key, PARAMS))
    np.testing.assert_allclose(run(obj.renyi(0.0, 5)), run(obj.iwelbo(5)), rtol=1e-12)
    mean = obj.importance_weighted(jnp.mean, 5)
    np.testing.assert_allclose(run(obj.renyi(1.0, 5)), run(mean), rtol=1e-12)
    np.testing.assert_allclose(run(obj.renyi(1 + 1e-7, 5)), run(mean), rtol=1e-5)
    np.testing.assert_allclose(run(obj.renyi(-1.0, 5)), -run(obj.chi_square(5)), rtol=1e-12)
    values = [run(obj.renyi(alpha, 5)) for alpha in (-2.0, -0.5, 0.0, 0.5, 1.0, 3.0)]
    assert all(a > b for a, b in itertools.pairwise(values))


def log_moment(n, m, s):
    """log E_q w^n for q = N(m, s) and p = Z N(1, 1), by quadrature."""
    x = jnp.linspace(-30.0, 30.0, 60_001)
    log_q = dist.Normal(m, s).log_prob(x)
    log_w = dist.Normal(1.0, 1.0).log_prob(x) + LOG_Z - log_q
    return jax.nn.logsumexp(n * log_w + log_q) + jnp.log(x[1] - x[0])


@pytest.mark.parametrize("alpha", [-1.0, 0.3, 0.7])
def test_many_particles_reach_the_divergence(key, alpha):
    p = {"m": jnp.array(0.6), "s": jnp.array(1.1)}
    value = jax.jit(estimate(vf.objectives.renyi(alpha, 100_000)))(key, p)
    truth = log_moment(1 - alpha, 0.6, 1.1) / (1 - alpha)
    np.testing.assert_allclose(value, truth, atol=0.01)
    if alpha == -1.0:
        assert -jax.jit(estimate(vf.objectives.chi_square(100_000)))(key, p) > LOG_Z


def test_symmetric_divergence(key):
    p = {"m": jnp.array(0.6), "s": jnp.array(1.1)}
    kl = lambda m1, s1, m2, s2: jnp.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    truth = -kl(0.6, 1.1, 1.0, 1.0) - kl(1.0, 1.0, 0.6, 1.1)
    value = jax.jit(estimate(vf.objectives.symmetric_kl(100_000)))(key, p)
    np.testing.assert_allclose(value, truth, atol=0.01)


def paired(objective, key, params, model=target, batch=20_000, rounds=10):
    """Mean, standard error and sd of total, path and their difference, the keys in common."""

    def grads(key, params):
        rows = []
        for gradient in ("total", "path"):
            made = objective(gradient)
            S = vf.expect(lambda p, made=made: made(guide(p), lambda x: model(x, p)))
            grad = jax.grad(S, argnums=1)(key, params)
            rows.append(jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(grad)]))
        rows.append(rows[1] - rows[0])
        return jnp.stack(rows)

    @jax.jit
    def sums(key):
        draws = jax.vmap(grads, (0, None))(jax.random.split(key, batch), params)
        return draws.sum(axis=0), (draws**2).sum(axis=0)

    parts = [sums(jax.random.fold_in(key, i)) for i in range(rounds)]
    n = batch * rounds
    mean, square = (sum(p[i] for p in parts) / n for i in (0, 1))
    sd = np.sqrt(np.maximum(square - mean**2, 0))
    return np.asarray(mean), sd / np.sqrt(n), sd


def test_dreg_has_the_mean_of_the_total_gradient_and_a_fifth_of_its_variance(key):
    params = {
        "m": jnp.linspace(-0.5, 0.5, 10),
        "s": jnp.full(10, jnp.exp(-0.2)),
        "theta": jnp.array(0.1),
    }

    def model(x, p):
        return dist.Normal(p["theta"], 1.0).log_prob(x).sum()

    bound = lambda gradient: vf.objectives.iwelbo(8, gradient=gradient)
    mean, se, sd = paired(bound, key, params, model, rounds=5)
    assert np.all(np.abs(mean[2]) < 4.5 * se[2] + 1e-12)
    assert np.all(se[2][:10] < 0.02 * np.abs(mean[0][0]))
    np.testing.assert_allclose(mean[0][0], 0.2662, atol=0.01)  # published with the prototype
    assert (sd[1] ** 2)[:10].sum() < 0.2 * (sd[0] ** 2)[:10].sum()
    np.testing.assert_allclose(mean[2][-1], 0.0, atol=1e-12)  # theta: identical draw by draw


def test_the_path_rule_for_a_function_of_ones_own(key):
    """Not a bound, not in any menu: the total gradient, and where naive path is wrong."""

    def F(log_w):
        return jax.nn.logsumexp(0.5 * log_w) + 0.1 * jnp.var(log_w)

    make = lambda gradient: vf.objectives.importance_weighted(F, 4, gradient=gradient)
    params = {"m": jnp.array(0.2), "s": jnp.array(0.7)}
    mean, se, _ = paired(make, key, params, lambda x, p: target(x), rounds=20)
    assert np.all(np.abs(mean[2]) < 4.5 * se[2])
    assert np.all(se[2] < 0.02 * np.abs(mean[0]))

    def naive(key, p):
        def log_weight(key):
            x, log_q = guide(p).sample_and_log_prob(key, gradient="path")
            return target(x) - log_q

        return F(jax.vmap(log_weight)(jax.random.split(key, 4)))

    biased = moments(naive, params, key, 100_000)
    assert np.any(np.abs(biased.mean[1:] - mean[0]) > 4.5 * np.hypot(biased.se[1:], se[0]))


def test_values_agree_between_gradients(key):
    for objective in (vf.objectives.iwelbo(3), vf.objectives.renyi(0.4, 3)):
        total = jax.jit(estimate(objective, 4))(key, PARAMS)
        path = jax.jit(estimate(objective, 4, gradient="path"))(key, PARAMS)
        np.testing.assert_allclose(total, path, rtol=1e-12)


@pytest.mark.parametrize("control", [None, "vimco"])
def test_a_discrete_guide(key, control):
    @vf.program
    def flips(q):
        vf.sample("z", dist.Bernoulli(probs=q), vf.reinforce())

    def log_p(values):
        return jnp.where(values["z"] == 1, jnp.log(0.1), jnp.log(0.3))

    bound = vf.objectives.iwelbo(3, control=control)
    estimate = vf.expect(lambda q: bound(flips(q), log_p))
    check(estimate, jnp.array(0.6), key, value=-1.01474, gradient=-0.67327)
    with pytest.raises(vf.ProgramError, match="continuous sites"):
        vf.expect(lambda q: bound(flips(q), log_p), gradient="path")(key, 0.6)


def test_wake_phases(key):
    """z ~ N(0,1), x | z ~ N(theta z, 1), q = N(phi x, .8): near the exact gradients at K = 50."""
    x, params = 1.3, {"theta": jnp.array(0.7), "phi": jnp.array(0.2)}

    def phase(wake):
        def objective(p):
            q = guide({"m": p["phi"] * x, "s": jnp.array(0.8)})

            def joint(z):
                prior = dist.Normal(0.0, 1.0).log_prob(z).sum()
                return prior + dist.Normal(p["theta"] * z, 1.0).log_prob(x).sum()

            return wake(50)(q, joint)

        return moments(vf.expect(objective), params, key, 40_000).mean[1:]

    evidence = lambda t: dist.Normal(0.0, jnp.sqrt(1 + t**2)).log_prob(x)
    of_p = phase(vf.objectives.wake_p)
    np.testing.assert_allclose(of_p, [0.0, jax.grad(evidence)(0.7)], atol=0.004)
    of_q = phase(vf.objectives.wake_q)
    mean = 0.7 * x / (1 + 0.7**2)
    np.testing.assert_allclose(of_q, [(mean - 0.2 * x) * x / 0.64, 0.0], atol=0.03)


def test_self_normalised_renyi_and_its_limits(key):
    """The target split into prior N(0, 1.5) and what is left as its likelihood."""
    prior = lambda x: dist.Normal(0.0, 1.5).log_prob(x).sum()
    likelihood = lambda x: target(x) - prior(x)
    p = {"m": jnp.array(0.6), "s": jnp.array(1.1)}

    def run(alpha, n, shift=0.0):
        objective = vf.objectives.vod(likelihood, alpha, n)
        return float(
            jax.jit(vf.expect(lambda p: objective(guide(p), lambda x: prior(x) + shift)))(key, p)
        )

    for alpha in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(run(alpha, 4), run(alpha, 4, 11.0), rtol=1e-10)
    np.testing.assert_allclose(run(0.0, 100_000), LOG_Z, atol=0.01)
    truth = log_moment(0.5, 0.6, 1.1) / 0.5
    np.testing.assert_allclose(run(0.5, 100_000), truth, atol=0.01)
    kl = (1.1**2 + 0.4**2 - 1) / 2 - np.log(1.1)
    np.testing.assert_allclose(run(1.0, 100_000), LOG_Z - kl, atol=0.01)
    np.testing.assert_allclose(run(1.0, 4), run(1 - 1e-7, 4), rtol=1e-5)


def test_path_among_particles_is_refused_where_weights_are_clipped():
    flow = guide(PARAMS)
    body = lambda: flow.simulate(gradient="path")[1]
    clipped = lambda: jnp.minimum(vf.vmap(body, 2), 0.0).sum()
    with pytest.raises(vf.ProgramError, match="clipped"):
        vf.expect(clipped)(jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.iwelbo(0), "num_particles"),
        (lambda o: o.iwelbo(2, gradient="stl"), "gradient"),
        (lambda o: o.renyi(float("inf"), 2), "alpha"),
        (lambda o: o.chi_square(2, order=0.5), "order"),
        (lambda o: o.symmetric_kl(1), "2 or more"),
        (lambda o: o.wake_q(True), "num_particles"),
        (lambda o: o.vod(target, float("nan"), 2), "alpha"),
        (lambda o: o.vod(target, 0.5, 1), "2 or more"),
        (lambda o: o.data_emphasised_elbo(target, 0.0), "kappa"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(vf.objectives)
