"""Every strategy against closed forms; notes of the project number the cases."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy.special import i0e, i1e
from scipy import integrate, special

import vflow as vf
from tests.programs.power import check
from vflow.programs.strategies._von_mises import von_mises_slope

T = jnp.array(0.7)
REINFORCE, MEASURE, ENUM, REPARAM = (
    vf.reinforce(),
    vf.measure_valued(),
    vf.enum(),
    vf.reparam(),
)
DISCRETE = [ENUM, MEASURE, REINFORCE]
# The same programs are checked without noise, and faster, in test_exact.
slow = pytest.mark.slow


def square(strategy):
    return vf.expect(lambda t: vf.sample("x", dist.Normal(t, 1.0), strategy) ** 2)


@pytest.mark.parametrize("strategy", [REPARAM, REINFORCE, MEASURE], ids=repr)
def test_normal_mean(key, strategy):
    check(square(strategy), T, key, value=1.49, gradient=1.4)


@pytest.mark.parametrize("baseline", ["loo", "ema", 1.5])
def test_normal_mean_with_a_baseline(key, baseline):
    strategy = vf.reinforce(baseline=baseline)
    estimate = vf.expect(lambda t: vf.sample("x", dist.Normal(t, 1.0), strategy) ** 2, 8)
    check(estimate, T, key, value=1.49, gradient=1.4)


def test_the_rule_rejects_a_biased_twin(key):
    def twin(key, t):
        value = square(REPARAM)(key, t)
        return 1.05 * value - 0.05 * jax.lax.stop_gradient(value)

    with pytest.raises(AssertionError, match="truth"):
        check(twin, T, key, value=1.49, gradient=1.4)


def test_normal_scale(key):
    def objective(s):
        return vf.sample("x", dist.Normal(0.3, s), MEASURE) ** 4

    # E x^4 = m^4 + 6 m^2 s^2 + 3 s^4
    truth = 12 * 0.3**2 * 0.7 + 12 * 0.7**3
    check(vf.expect(objective), T, key, gradient=truth)


@pytest.mark.parametrize("strategy", [MEASURE, REINFORCE], ids=repr)
def test_poisson(key, strategy):
    estimate = vf.expect(lambda t: 1.0 * vf.sample("x", dist.Poisson(t), strategy) ** 2)
    check(estimate, T, key, value=1.19, gradient=2.4)


@pytest.mark.parametrize("strategy", [MEASURE, REINFORCE], ids=repr)
def test_geometric(key, strategy):
    estimate = vf.expect(lambda t: 1.0 * vf.sample("x", dist.Geometric(t), strategy) ** 2)
    # failures: E x^2 = (1 - p)(2 - p) / p^2
    exact = lambda p: (1 - p) * (2 - p) / p**2
    check(estimate, T, key, value=float(exact(0.7)), gradient=jax.grad(exact)(T))


def test_gamma_rate(key):
    estimate = vf.expect(lambda t: vf.sample("x", dist.Gamma(2.0, t), MEASURE) ** 2)
    check(estimate, T, key, value=6 / 0.49, gradient=-12 / 0.7**3)


@pytest.mark.parametrize("strategy", [*DISCRETE, vf.rao_blackwell(2)], ids=repr)
def test_categorical(key, strategy):
    worth = jnp.array([4.0, 1.0, 2.5, 6.0])

    def objective(logits):
        return worth[vf.sample("a", dist.Categorical(logits=logits), strategy)]

    logits = jnp.array([0.1, 0.9, -0.4, 0.3])
    exact = lambda logits: jax.nn.softmax(logits) @ worth
    truth = {"value": exact(logits), "gradient": jax.grad(exact)(logits)}
    check(vf.expect(objective), logits, key, **truth, absolute=0.005)


@pytest.mark.parametrize("strategy", [MEASURE, vf.rao_blackwell(1)], ids=repr)
def test_several_categoricals_at_one_site(key, strategy):
    probs = jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])

    def objective(logits):
        a = vf.sample("a", dist.Categorical(logits=logits).to_event(1), strategy)
        return 1.0 * (a.sum() + 1) ** 2

    def exact(logits):
        p = jax.nn.softmax(logits)
        joint = p[0][:, None] * p[1][None, :]
        total = jnp.arange(3)[:, None] + jnp.arange(3)[None, :] + 1
        return (joint * total**2).sum()

    logits = jnp.log(probs)
    check(vf.expect(objective), logits, key, value=exact(logits), gradient=jax.grad(exact)(logits))


@slow
@pytest.mark.parametrize("first", [*DISCRETE, vf.disarm()], ids=repr)
@pytest.mark.parametrize("second", DISCRETE, ids=repr)
def test_two_flips(key, first, second):
    def objective(t):
        a = vf.sample("a", dist.Bernoulli(probs=t), first)
        b = vf.sample("b", dist.Bernoulli(probs=jnp.where(a == 1, t, t / 2)), second)
        return a + 2.0 * b * jnp.where(a == 1, 1, 2)

    check(vf.expect(objective), T, key, value=2.1, gradient=3.0)


@pytest.mark.parametrize("strategy", [ENUM, MEASURE, vf.reinforce(baseline=2.0)], ids=repr)
def test_branch_then_normal(key, strategy):
    def objective(t):
        b = vf.sample("b", dist.Bernoulli(probs=t), strategy)
        return vf.sample("x", dist.Normal(jnp.where(b == 1, t, 2 * t), 1.0)) ** 2

    check(vf.expect(objective), T, key, value=1.931, gradient=1.19)


@pytest.mark.parametrize(
    "strategy",
    [ENUM, pytest.param(MEASURE, marks=slow), pytest.param(REINFORCE, marks=slow)],
    ids=repr,
)
def test_sites_in_the_branches_of_a_cond(key, strategy):
    def objective(t):
        b = vf.sample("b", dist.Bernoulli(probs=t), strategy)

        def on():
            c = vf.sample("c", dist.Bernoulli(probs=t), ENUM)
            return 2.0 * c + vf.sample("x", dist.Normal(t, 1.0)) ** 2

        def off():
            d = vf.sample("d", dist.Bernoulli(probs=t / 2), MEASURE)
            return 3.0 * d + vf.sample("x", dist.Normal(2 * t, 1.0), REINFORCE) ** 2

        return vf.cond(b == 1, on, off)

    exact = lambda t: t * (2 * t + t**2 + 1) + (1 - t) * (1.5 * t + 4 * t**2 + 1)
    check(vf.expect(objective), T, key, value=float(exact(0.7)), gradient=jax.grad(exact)(T))


@pytest.mark.parametrize("strategy", [REPARAM, REINFORCE, MEASURE], ids=repr)
def test_scan(key, strategy):
    def objective(t):
        def step(total, _):
            return total + vf.sample("x", dist.Normal(t, 1.0), strategy) ** 2, None

        return vf.scan(step, jnp.zeros(()), length=3)[0]

    check(vf.expect(objective), T, key, value=4.47, gradient=4.2)


@slow
@pytest.mark.parametrize("costs", ["returned", "registered"])
@pytest.mark.parametrize("strategy", [MEASURE, REINFORCE], ids=repr)
def test_markov_flips_in_a_scan(key, strategy, costs):
    def objective(t):
        def step(b, _):
            b = vf.sample("b", dist.Bernoulli(probs=jnp.where(b == 1, t, t / 2)), strategy)
            if costs == "registered":
                vf.cost(1.0 * b)
            return b, b

        bits = vf.scan(step, 1, length=3)[1]
        return 1.0 * bits.sum() if costs == "returned" else None

    state = check(vf.expect(objective), T, key, value=1.85325, gradient=3.4175)
    if strategy is REINFORCE and costs == "registered":
        assert state.sd[1] < 6.5  # 6.9 where every cost is multiplied by every score


@slow
def test_scan_inside_vmap(key):
    def objective(t):
        def lane():
            def step(count, _):
                return count + vf.sample("b", dist.Bernoulli(probs=t), MEASURE), None

            return vf.scan(step, 0, length=2)[0] ** 2

        return 1.0 * vf.vmap(lane, 2).sum()

    check(vf.expect(objective), jnp.array(0.6), key, value=3.84, gradient=8.8)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(MEASURE, marks=slow), pytest.param(REINFORCE, marks=slow), vf.disarm()],
    ids=repr,
)
def test_vector_of_flips(key, strategy):
    p = jnp.array([0.2, 0.5, 0.7])

    def objective(p):
        return 1.0 * vf.sample("b", dist.Bernoulli(probs=p), strategy).sum() ** 2

    value = p.sum() + p.sum() ** 2 - (p**2).sum()
    check(vf.expect(objective), p, key, value=value, gradient=[3.4, 2.8, 2.4])


def iwelbo(strategy, control=None):
    def log_weight(q):
        z = vf.sample("z", dist.Bernoulli(probs=q), strategy)
        return jnp.where(z == 1, jnp.log(0.1 / q), jnp.log(0.3 / (1 - q)))

    def objective(q):
        log_w = vf.vmap(lambda: log_weight(q), 3, control=control)
        return jax.nn.logsumexp(log_w) - jnp.log(3)

    return vf.expect(objective)


@slow
@pytest.mark.parametrize(
    ("strategy", "control"),
    [(MEASURE, None), (REINFORCE, None), (REINFORCE, "vimco"), (REINFORCE, "loo")],
    ids=["measure", "reinforce", "vimco", "loo"],
)
def test_discrete_importance_weighted_bound(key, strategy, control):
    estimate = iwelbo(strategy, control)
    check(estimate, jnp.array(0.6), key, value=-1.01474, gradient=-0.67327)


def test_costs_inside_controlled_particles_keep_their_scores(key):
    def objective(t):
        def particle():
            x = vf.sample("x", dist.Normal(t, 1.0), REINFORCE)
            vf.cost(x**2)
            return x

        vf.cost(vf.sample("before", dist.Normal(t, 1.0), REINFORCE))
        return vf.vmap(particle, 2, control="loo").sum() ** 2

    # 2 (t^2 + 1) + t + 4 t^2 + 2
    exact = lambda t: 6 * t**2 + t + 4
    check(vf.expect(objective), T, key, value=float(exact(0.7)), gradient=jax.grad(exact)(T))


def test_costs_count_for_earlier_sites_only(key):
    def objective(t):
        vf.cost(vf.sample("x", dist.Normal(t, 1.0)) ** 2)
        vf.cost(vf.sample("y", dist.Normal(t, 1.0), REINFORCE))

    check(vf.expect(objective), T, key, value=2.19, gradient=2.4)


def test_implicit_beta(key):
    params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}

    def objective(p):
        return vf.sample("x", dist.Beta(p["a"], p["b"]), vf.implicit()) ** 2

    truth = {"a": 0.28 / 3, "b": -0.22 / 3}
    check(vf.expect(objective), params, key, value=0.2, gradient=truth)


@pytest.mark.parametrize(
    ("make", "params", "second_moment"),
    [
        (lambda p: dist.Gamma(p[0], p[1]), [2.0, 1.5], lambda p: p[0] * (p[0] + 1) / p[1] ** 2),
        (
            dist.Dirichlet,
            [2.0, 1.0, 3.0],
            lambda p: p[0] * (p[0] + 1) / (p.sum() * (p.sum() + 1)),
        ),
        (
            lambda p: dist.StudentT(p[0], 0.0, p[1]),
            [12.0, 1.5],
            lambda p: p[1] ** 2 * p[0] / (p[0] - 2),
        ),
    ],
    ids=["gamma", "dirichlet", "student"],
)
def test_implicit_families(key, make, params, second_moment):
    params = jnp.array(params)
    estimate = vf.expect(lambda p: jnp.ravel(vf.sample("x", make(p), vf.implicit()))[0] ** 2)
    value, slope = jax.value_and_grad(second_moment)(params)
    check(estimate, params, key, value=value, gradient=slope, absolute=0.003)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_slope_of_a_von_mises_quantile(dtype):
    for kappa in (1e-3, 0.5, 4.0, 60.0, 101.0, 3000.0):

        def log_density(t, k):
            return k * (np.cos(t) - 1.0) - np.log(2 * np.pi * special.i0e(k))

        for spread in (0.1, 0.9, 2.0, 5.0):
            angle, h = min(spread / kappa**0.5, 3.1), 1e-4 * kappa
            cdf = [
                integrate.quad(lambda t: np.exp(log_density(t, k)), 0.0, angle, epsabs=1e-14)[0]  # noqa: B023
                for k in (kappa - h, kappa + h)
            ]
            truth = -(cdf[1] - cdf[0]) / (2 * h) / np.exp(log_density(angle, kappa))
            with jax.enable_x64(dtype == "float64"):
                at, k = jnp.asarray([angle, -angle], dtype), jnp.full(2, kappa, dtype)
                slope = np.asarray(von_mises_slope(at, k))
            noise = 1e-12 / h / np.exp(log_density(angle, kappa))  # of the finite difference
            assert abs(slope[0] - truth) < 2e-4 * abs(truth) + noise, (kappa, spread)
            assert slope[1] == -slope[0]


@pytest.mark.parametrize("at", [(0.7, 2.0), (3.0, 0.4)], ids=["inside", "wrapped"])
def test_implicit_von_mises(key, at):
    """E cos(x - 0.3) = A(kappa) cos(loc - 0.3), also where draws wrap around."""

    def objective(p):
        return jnp.cos(vf.sample("x", dist.VonMises(p[0], p[1])) - 0.3)

    def exact(p):
        return i1e(p[1]) / i0e(p[1]) * jnp.cos(p[0] - 0.3)

    p = jnp.array(at)
    check(vf.expect(objective), p, key, value=exact(p), gradient=jax.grad(exact)(p))


def test_implicit_by_the_distribution_function(key):
    # no sampler of its own derivative: the cdf alone
    class Opaque(dist.Exponential):
        reparametrized_params = ()

    estimate = vf.expect(lambda t: vf.sample("x", Opaque(t)) ** 2)
    check(estimate, T, key, value=2 / 0.49, gradient=-4 / 0.343)


def test_enumeration_of_one_site_has_no_variance(key):
    estimate = vf.expect(
        lambda t: (1 - vf.sample("b", dist.Bernoulli(probs=t), ENUM)) * (-t / 2), num_samples=2
    )
    value, slope = jax.jit(jax.value_and_grad(estimate, argnums=1))(key, T)
    assert jnp.allclose(value, -0.105, rtol=1e-12)
    assert jnp.allclose(slope, 0.2, rtol=1e-12)


def test_a_learned_baseline_is_trained_by_least_squares(key):
    params = {"t": T, "b": jnp.array(0.5)}

    def objective(p):
        site = dist.Normal(p["t"], 1.0)
        return vf.sample("x", site, vf.reinforce(baseline=lambda: p["b"])) ** 2

    # d/db of -E(x^2 - b)^2 / 2 is E x^2 - b
    estimate = vf.expect(objective)
    check(estimate, params, key, value=1.49, gradient={"b": 0.99, "t": 1.4})


@pytest.mark.parametrize("num_samples", [1, 4])
def test_second_order_reinforce(key, num_samples):
    estimate = vf.expect(lambda t: vf.sample("x", dist.Normal(t, 1.0), REINFORCE) ** 2, num_samples)
    slope = jax.grad(estimate, argnums=1)
    check(slope, T, key, value=1.4, gradient=2.0)


def test_second_order_enumeration(key):
    def objective(t):
        b = vf.sample("b", dist.Bernoulli(probs=t), ENUM)
        return vf.sample("x", dist.Normal(jnp.where(b == 1, t, 2 * t), 1.0)) ** 2

    check(jax.grad(vf.expect(objective), argnums=1), T, key, value=1.19, gradient=-4.6)


def test_a_plate_of_expectations_is_exact(key):
    p = jnp.array([0.2, 0.5, 0.7])
    one = vf.expect(lambda p: (vf.sample("b", dist.Bernoulli(probs=p), ENUM) + p) ** 2)

    def plate(key, p):
        return jax.vmap(one)(jax.random.split(key, 3), p).sum()

    slope = jax.jit(jax.grad(plate, argnums=1))(key, p)
    exact = jax.grad(lambda p: (p * (1 + p) ** 2 + (1 - p) * p**2).sum())(p)
    assert jnp.allclose(slope, exact, rtol=1e-12)
