"""The unbiased path gradient of any program, draw by draw against formulas written by hand."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.flows.registry import perturb
from vflow._core import combine, partition

K = 4
# Small programs that run once: compiling them takes longer than optimising them saves.
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def log_p(x):
    return -0.25 * jnp.sum(x**4) + x[0] * x[1]


def log_mean_exp(w):
    return jax.nn.logsumexp(w) - jnp.log(w.shape[0])


# The objectives of log weights that the rule was checked with, one of them made up.
FUNCTIONS = {
    "elbo": jnp.mean,
    "iwae": log_mean_exp,
    "renyi": lambda w: log_mean_exp(0.5 * w) / 0.5,
    "square": lambda w: 0.5 * log_mean_exp(2 * w),
    "mixture": lambda w: 0.5 * jnp.mean(w) + 0.5 * log_mean_exp(w) - 0.1 * jnp.var(w),
}


def particles(F, n=K):
    def objective(q):
        def log_weight():
            x, log_q = q.simulate()
            return log_p(x) - log_q

        return F(vf.vmap(log_weight, n))

    return objective


def captured(objective, key, flow):
    """The draws of an objective's particles, with log weights, scores and live paths."""
    # The key of particle k, as the language folds it.
    from vflow.programs._frame import Frame

    frame = Frame(key)
    keys = jax.random.split(frame.key_for(frame.label("vmap"), "vmap"), K)

    def one(key):
        inner = Frame(key, scope="vmap #0/")
        x, log_q, score = flow.sample_with_score(inner.key_for(None, "simulate"))
        still = jax.lax.stop_gradient(x)
        return log_p(still) - log_q, jnp.vdot(jax.grad(log_p)(still) - score, x - still)

    return jax.vmap(one)(keys)


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def gradients():
    """By name: values with path and total gradient, path gradients of the program and by hand."""

    def of(F, key, flow):
        trained, static = partition(flow)

        def by_hand(trained):
            w, path = captured(F, key, combine(trained, static))
            at = jax.lax.stop_gradient(w)
            return jnp.sum((jax.grad(F)(at) - jnp.diag(jax.hessian(F)(at))) * path)

        value, grad = vf.value_and_grad(vf.expect(particles(F), gradient="path"))(key, flow)
        return value, vf.expect(particles(F))(key, flow), grad, jax.grad(by_hand)(trained)

    @jit
    def everything(key):
        flow = vf.distributions.Flow(vf.distributions.Normal(2), vf.bijections.TriangularAffine(2))
        flow = perturb(flow, key)
        return {name: of(F, jax.random.fold_in(key, 1), flow) for name, F in FUNCTIONS.items()}

    return everything(jax.random.key(0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_log_weights_have_first_less_second_derivatives(name, gradients):
    value, total, grad, by_hand = gradients[name]
    assert largest(by_hand) > 0.01
    off = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), grad, by_hand)
    assert largest(off) < 1e-12
    np.testing.assert_allclose(value, total, rtol=1e-12)


def test_dropping_the_score_is_biased_where_the_rule_is_not(key):
    """The mean gradient of N(m, s) on a quartic: total, the rule, and naive sticking the landing.

    The estimators are written out; that the language computes the second one is the test above.
    """
    m, s, n = -0.3, 0.5, 100_000
    z = np.asarray(jax.random.normal(key, (n, K)))
    x = m + s * z
    w = -0.25 * x**4 + 0.5 * x + 0.5 * z**2 + np.log(s)
    slope = -(x**3) + 0.5
    along_path = np.stack([slope + z / s, z * (slope + z / s)], axis=-1)
    total = np.stack([slope, z * slope + 1 / s], axis=-1)

    @jit
    def weights(w):
        one = lambda F: jax.vmap(lambda w: (jax.grad(F)(w), jnp.diag(jax.hessian(F)(w))))
        return {name: one(F)(w) for name, F in FUNCTIONS.items()}

    for name, (first, second) in jax.tree.map(np.asarray, weights(w)).items():
        mean = lambda weight, terms: (weight[..., None] * terms).sum(axis=1)
        truth = mean(first, total)
        for weight, biased in ((first - second, False), (first, name != "elbo")):
            gap = mean(weight, along_path) - truth
            se = gap.std(axis=0) / np.sqrt(n)
            assert np.all(se < 0.02 * np.abs(truth.mean(axis=0)).max()), name
            assert np.all(np.abs(gap.mean(axis=0)) < 4.5 * se) != biased, name
            assert np.any(np.abs(gap.mean(axis=0)) > 10 * se) == biased, name


def affine(loc, scale):
    loc = jnp.atleast_1d(loc)
    scale = jnp.broadcast_to(scale, loc.shape)
    return vf.distributions.Flow(
        vf.distributions.Normal(loc.size), vf.bijections.Affine(loc, scale)
    )


def used_in_many_ways(p):
    """Dependent path sites, a second use of the density, draws beside their weights."""
    a = affine(p["m"], p["s"])
    x, log_a = a.simulate()
    b = affine(p["m"] + 0.5 * x, p["t"])
    y, log_b = b.simulate()
    log_w = log_p(jnp.concatenate([x, y])) - log_a - log_b
    return jnp.exp(0.3 * log_w) * (1 + 0.2 * y[0]) + 0.3 * x[0] * a.log_prob(0.5 * y)


def naive(key, p):
    """The same with path log densities and no second term."""
    first, second = jax.random.split(key)
    a = affine(p["m"], p["s"])
    x, log_a = a.sample_and_log_prob(first, gradient="path")
    y, log_b = affine(p["m"] + 0.5 * x, p["t"]).sample_and_log_prob(second, gradient="path")
    log_w = log_p(jnp.concatenate([x, y])) - log_a - log_b
    return jnp.exp(0.3 * log_w) * (1 + 0.2 * y[0]) + 0.3 * x[0] * a.log_prob(0.5 * y)


def test_dependent_sites_and_a_second_use_of_the_density(key):
    p = {"m": jnp.array(0.3), "s": jnp.array(0.7), "t": jnp.array(0.8)}
    estimates = {
        "total": vf.expect(used_in_many_ways),
        "path": vf.expect(used_in_many_ways, gradient="path"),
        "naive": naive,
    }

    @jit
    def draws(keys):
        slopes = lambda S: jax.vmap(jax.value_and_grad(S, 1), (0, None))(keys, p)
        both = {k: slopes(S) for k, S in estimates.items()}
        return {k: (value, jnp.stack(list(g.values()), 1)) for k, (value, g) in both.items()}

    drawn = jax.tree.map(np.asarray, draws(jax.random.split(key, 250_000)))
    rows = {k: gradient for k, (_, gradient) in drawn.items()}
    se = lambda d: d.std(0) / np.sqrt(len(d))
    size = np.abs(rows["total"].mean(0)).max()
    for k, off in (("path", False), ("naive", True)):
        gap = rows[k] - rows["total"]
        assert np.all(se(gap) < 0.02 * size)
        assert np.any(np.abs(gap.mean(0)) > 10 * se(gap)) == off
        assert np.all(np.abs(gap.mean(0)) < 4.5 * se(gap)) != off
    np.testing.assert_allclose(drawn["path"][0], drawn["total"][0], rtol=1e-9)


def test_a_chain_of_flows_sticks_to_the_landing(key):
    """Upstream draws stay live in log q: at q = p the gradient is zero draw by draw."""

    def objective(p, gradient):
        x, log_a = affine(p["m"], p["s"]).simulate(gradient=gradient)
        y, log_b = affine(p["m"] + 0.5 * x, p["t"]).simulate(gradient=gradient)
        model = affine(0.3, 0.7).log_prob(x) + affine(0.3 + 0.5 * x, 0.8).log_prob(y)
        return model - log_a - log_b

    @jit
    def slope(p):
        S = {g: vf.expect(lambda p, g=g: objective(p, g)) for g in ("total", "path")}
        return {g: jax.grad(S[g], 1)(key, p) for g in S}

    slopes = slope({"m": jnp.array(0.3), "s": jnp.array(0.7), "t": jnp.array(0.8)})
    assert largest(slopes["path"]) < 1e-12
    assert largest(slopes["total"]) > 0.01


REFUSED = {
    "clip": lambda w: jnp.mean(jnp.clip(w, -1.0, 1.0)),
    "max": jnp.max,
    "sort": lambda w: jnp.sort(w)[0],
    "relu": lambda w: jnp.mean(jax.nn.relu(w)),
    "where": lambda w: jnp.mean(jnp.where(w > 0, w, 0.0)),
    "indicator": lambda w: jnp.mean((w > 0) * w),
    "stopped weights": lambda w: jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(w)) * w),
}
ALLOWED = {
    "finite": lambda w: jnp.mean(jnp.where(jnp.isfinite(w), w, 0.0)),
    "logaddexp": lambda w: jnp.logaddexp(w[0], w[1]),
    "softmax": lambda w: jnp.sum(jax.nn.softmax(w) * w),
    "entropy": lambda w: jnp.sum(jax.nn.log_softmax(w)),
}


@pytest.mark.parametrize("name", REFUSED | ALLOWED)
def test_what_no_derivative_sees_is_refused(name, key):
    objective = particles((REFUSED | ALLOWED)[name], 2)
    run = lambda: jax.eval_shape(
        vf.expect(lambda p: objective(affine(p * jnp.ones(2), 1.0)), gradient="path"), key, 0.3
    )
    if name in ALLOWED:
        assert run().shape == ()
        return
    with pytest.raises(vf.ProgramError, match=r"vmap #0/simulate #0 would be biased.*total"):
        run()


def test_second_derivatives_are_refused(key):
    S = vf.expect(lambda p: affine(p, p).simulate()[1], gradient="path")
    assert jax.eval_shape(jax.grad(S, 1), key, 0.3).shape == ()
    with pytest.raises(vf.ProgramError, match="second derivative"):
        jax.eval_shape(jax.hessian(S, 1), key, 0.3)


def exp_of_log_weight(p):
    """Linear neither in log q nor near its optimum: neither total nor path has least variance."""
    x, log_q = affine(p["m"], p["s"]).simulate()
    return jnp.exp(0.5 * (-0.5 * jnp.sum((x - 1.0) ** 2) - log_q))


def test_the_mixture_is_unbiased_and_no_noisier_than_either(key):
    """Without a loop: the coefficient of a block of samples is made of the other blocks."""
    p = {"m": jnp.array(0.2), "s": jnp.array(0.6)}
    estimates = {g: vf.expect(exp_of_log_weight, 32, gradient=g) for g in ("total", "path", "auto")}

    @jit
    def draws(keys):
        both = jax.vmap(jax.value_and_grad(estimates["total"], 1), (0, None))(keys, p)
        rows = {"total": both}
        for g in ("path", "auto"):
            rows[g] = jax.vmap(jax.value_and_grad(estimates[g], 1), (0, None))(keys, p)
        return {k: (v, jnp.stack(list(g.values()), 1)) for k, (v, g) in rows.items()}

    rows = jax.tree.map(np.asarray, draws(jax.random.split(key, 8_000)))
    spread = {k: float(g.var(0).sum()) for k, (_, g) in rows.items()}
    gap = rows["auto"][1] - rows["total"][1]
    se = gap.std(0) / np.sqrt(len(gap))
    assert np.all(np.abs(gap.mean(0)) < 4.5 * se)
    assert np.all(se < 0.02 * np.abs(rows["total"][1].mean(0)).max())
    assert spread["auto"] < 1.1 * min(spread["total"], spread["path"])
    for g in ("path", "auto"):
        np.testing.assert_allclose(rows[g][0], rows["total"][0], rtol=1e-12)


def test_a_coefficient_from_the_draws_themselves_would_be_biased(key):
    """The power of the check above: the same mixture with a coefficient of its own samples."""
    from vflow.programs._frame import mixing
    from vflow.programs._mixing import share_of

    p = {"m": jnp.array(0.2), "s": jnp.array(0.6)}
    S = vf.expect(exp_of_log_weight, gradient="auto")

    def gradient(key, share):
        with mixing(share):
            return jnp.stack(list(jax.grad(S, 1)(key, p).values()))

    @jit
    def draws(keys):
        total, path = (jax.vmap(lambda k, s=s: gradient(k, s))(keys) for s in (0.0, 1.0))
        c = path - total
        share = jax.vmap(share_of)(jnp.sum(total * c, 1), jnp.sum(c**2, 1))
        return share[:, None] * c

    off = np.asarray(draws(jax.random.split(key, 20_000)))
    assert np.max(np.abs(off.mean(0)) / (off.std(0) / np.sqrt(len(off)))) > 10


def test_loops_carry_the_coefficient(key):
    def objective(q):
        x, log_q = q.simulate(gradient="auto")
        return -0.5 * jnp.sum((x - 1.0) ** 2) - log_q

    start = affine(jnp.zeros(2), 0.5)
    result = vf.maximize(key, vf.expect(objective, 16), start, num_steps=400)
    np.testing.assert_allclose(result.params.bijection.loc, 1.0, atol=0.05)
    assert abs(float(result.value) - np.log(2 * np.pi)) < 0.01


@pytest.mark.slow
def test_a_fit_carries_the_coefficient(key):
    target = vf.Target(lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), 2)
    fitted = vf.fit(key, target, gradient="auto", num_steps=100, num_samples=16, progress=False)
    assert fitted.status == "ok" and fitted.settings["gradient"] == "auto"


def check_against_total(objective, p, key, n, **kwargs):
    """Mean difference of path and total gradient, keys in common: zero within 4.5 errors."""

    @jit
    def gaps(keys):
        slopes = [
            jax.vmap(jax.grad(vf.expect(objective, gradient=g, **kwargs), 1), (0, None))(keys, p)
            for g in ("total", "path")
        ]
        return [jnp.stack(jax.tree.leaves(slope), 1) for slope in slopes]

    total, path = (np.asarray(rows) for rows in gaps(jax.random.split(key, n)))
    gap = path - total
    se = gap.std(0) / np.sqrt(n)
    assert np.all(np.abs(gap.mean(0)) < 4.5 * se + 1e-12)
    assert np.all(se < 0.03 * np.abs(total.mean(0)).max())
    assert gap.std() > 1e-3  # two different estimators


GUIDE = {"m": jnp.array(0.3), "s": jnp.array(0.7), "t": jnp.array(0.6), "r": jnp.array(0.4)}


def test_a_guide_of_dependent_sites_flows_and_a_discrete_one(key):
    """Among particles; the log density of the discrete site keeps its ordinary gradient."""

    def sites(p):
        a = vf.sample("a", dist.Normal(p["m"], p["s"]))
        b = vf.sample("b", affine(p["t"] * a, 0.8))[0]
        vf.sample("c", dist.Bernoulli(logits=p["r"] + 0.5 * a + 0.2 * b), vf.reinforce())

    def log_joint(v):
        return (
            -0.3 * v["a"] ** 4 + 0.5 * v["a"] * v["b"][0] - v["b"][0] ** 2 + 0.7 * v["c"] * v["a"]
        )

    def objective(p):
        def log_weight():
            values, log_q = vf.program(sites)(p).simulate()
            return log_joint(values) - log_q

        return log_mean_exp(vf.vmap(log_weight, 2))

    check_against_total(objective, GUIDE, key, 80_000)


@pytest.mark.parametrize("form", ["scan", "cond", "enum and reparam"])
def test_other_forms_of_the_language(form, key):
    def draw(p, loc):
        x, log_q = affine(p["m"] + loc, p["s"]).simulate()
        return x[0], -((x[0] - 1.0) ** 2) - log_q

    def objective(p):
        if form == "scan":
            step = lambda carry, _: (lambda x, w: (0.5 * x, w))(*draw(p, carry))
            _, log_w = vf.scan(step, jnp.zeros(()), length=2)
            return jnp.exp(0.3 * jnp.sum(log_w))
        if form == "cond":
            b = vf.sample("b", dist.Bernoulli(probs=0.4), vf.reinforce())
            x, w = vf.cond(b == 1, lambda: draw(p, 0.0), lambda: draw(p, 0.5))
            return jnp.exp(0.3 * w) * (1 + 0.1 * x)
        y = vf.sample("y", dist.Normal(p["t"], 0.5))
        b = vf.sample("b", dist.Bernoulli(logits=p["t"]), vf.enum())
        x, w = draw(p, 0.3 * y + 0.5 * b)
        return jnp.exp(0.3 * w) * (1 + 0.2 * x * y)

    p = {k: GUIDE[k] for k in ("m", "s", "t")}
    check_against_total(objective, p, key, 40_000)
