"""Misuse of the language: an error that names the site and the remedy."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

import vflow as vf

KEY = jax.random.key(0)


def flip(strategy=None):
    return vf.sample("s", dist.Bernoulli(probs=0.3), strategy or vf.reinforce()) * 1.0


def raw_vmap(t):
    return jax.vmap(lambda _: flip())(jnp.arange(3)).sum()


def raw_scan(t):
    return jax.lax.scan(lambda c, _: (c + flip(), None), 0.0, None, length=3)[0]


def raw_cond(t):
    return jax.lax.cond(t > 0, flip, lambda: 0.0)


def raw_jit(t):
    return jax.jit(flip)()


def raw_grad(t):
    return jax.grad(lambda t: t * flip())(t)


def raw_checkpoint(t):
    return jax.checkpoint(lambda t: t * flip())(t)


@pytest.mark.parametrize("outer", ["eager", "jit"])
@pytest.mark.parametrize(
    "body", [raw_vmap, raw_scan, raw_cond, raw_jit, raw_grad, raw_checkpoint], ids=lambda body: body.__name__
)
def test_a_site_inside_a_raw_transformation(body, outer):
    estimate = vf.expect(body)
    run = jax.jit(estimate) if outer == "jit" else estimate
    with pytest.raises(vf.ProgramError, match=r"'s'.*vf\.scan"):
        run(KEY, 0.3)


def test_given_sites_are_guarded_too():
    @vf.program
    def model():
        jax.vmap(lambda _: flip())(jnp.arange(3))

    with pytest.raises(vf.ProgramError, match=r"'s'.*vf\.vmap"):
        model.log_prob({"s": 1.0})


def test_blocks_are_guarded_too():
    def objective(t):
        return jax.vmap(lambda _: vf.vmap(flip, 2).sum())(jnp.arange(3)).sum()

    with pytest.raises(vf.ProgramError, match=r"vmap #0.*raw jax.vmap"):
        vf.expect(objective)(KEY, 0.3)


@pytest.mark.parametrize("strategy", [None, vf.reparam(), vf.path(), vf.implicit()], ids=repr)
def test_no_reparameterised_sampler(strategy):
    with pytest.raises(vf.ProgramError, match=r"'b'.*vf\.reinforce"):
        vf.expect(lambda: vf.sample("b", dist.Bernoulli(probs=0.3), strategy) * 1.0)(KEY)


def scan_twice(body):
    return vf.scan(lambda c, _: (c + body(), None), jnp.zeros(()), length=2)[0]


@pytest.mark.parametrize("loop", [lambda f: vf.vmap(f, 2).sum(), scan_twice])
def test_enumeration_inside_a_random_loop(loop):
    with pytest.raises(vf.ProgramError, match=r"'s'.*measure_valued"):
        vf.expect(lambda: loop(lambda: flip(vf.enum())))(KEY)


@pytest.mark.parametrize(
    ("dist", "strategy", "message"),
    [
        (dist.Bernoulli(probs=jnp.array([0.1, 0.2])), vf.enum(), r"'s'.*batch shape \(2,\)"),
        (dist.Poisson(1.0), vf.enum(), r"'s'.*finite support"),
        (dist.Beta(1.0, 2.0), vf.measure_valued(), r"'s'.*weak derivative of Beta"),
        (dist.Normal(0.0, 1.0), vf.disarm(), r"'s'.*Bernoulli"),
        (dist.Bernoulli(probs=0.2), vf.rao_blackwell(), r"'s'.*categorical"),
        (dist.Normal(0.0, 1.0), "reparam", r"'s'.*vf\.Strategy"),
        (dist.Normal(0.0, 1.0), vf.reinforce("loo"), r"'s'.*num_samples=2"),
        (dist.Normal(0.0, 1.0), vf.reinforce(jnp.zeros(2)), r"'s'.*scalar"),
        ("normal", None, r"'s'.*distribution, got str"),
    ],
)
def test_a_strategy_that_does_not_apply(dist, strategy, message):
    with pytest.raises(vf.ProgramError, match=message):
        vf.expect(lambda: 1.0 * vf.sample("s", dist, strategy))(KEY)


def test_measure_valued_gamma_has_no_derivative_in_the_concentration():
    estimate = vf.expect(lambda a: vf.sample("g", dist.Gamma(a, 2.0), vf.measure_valued()))
    assert jnp.isfinite(estimate(KEY, 1.5))
    with pytest.raises(vf.ProgramError, match=r"'g'.*vf\.implicit"):
        jax.grad(estimate, argnums=1)(KEY, 1.5)


@pytest.mark.parametrize("strategy", [vf.measure_valued(), vf.disarm()], ids=repr)
def test_second_derivatives_through_a_first_order_strategy(strategy):
    def objective(t):
        return 1.0 * vf.sample("b", dist.Bernoulli(probs=t), strategy)

    slope = jax.grad(vf.expect(objective), argnums=1)
    assert jnp.isfinite(slope(KEY, 0.3))
    with pytest.raises(vf.ProgramError, match=r"'b'.*first"):
        jax.grad(slope, argnums=1)(KEY, 0.3)


def test_duplicate_names():
    def objective():
        return vf.sample("x", dist.Normal(0.0, 1.0)) + vf.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(vf.ProgramError, match="two sites are named 'x'"):
        vf.expect(objective)(KEY)


def test_names_of_equal_hash():
    def objective():
        first = vf.sample("plumless", dist.Normal(0.0, 1.0))
        return first + vf.sample("buckeroo", dist.Normal(0.0, 1.0))

    with pytest.raises(vf.ProgramError, match=r"'buckeroo'.*'plumless'"):
        vf.expect(objective)(KEY)


@pytest.mark.parametrize(
    ("result", "message"),
    [(jnp.zeros(3), r"shape \(3,\)"), (jnp.array(1), "dtype int"), (None, r"no vf\.cost")],
)
def test_an_objective_that_is_not_a_real_scalar(result, message):
    with pytest.raises(vf.ProgramError, match=message):
        vf.expect(lambda: result)(KEY)


def test_a_cost_that_is_not_a_scalar():
    with pytest.raises(vf.ProgramError, match=r"vf\.cost.*\(2,\)"):
        vf.expect(lambda: vf.cost(jnp.zeros(2)))(KEY)


@pytest.mark.parametrize(
    "call",
    [
        lambda: vf.sample("x", dist.Normal(0.0, 1.0)),
        lambda: vf.cost(1.0),
        lambda: vf.vmap(lambda: 1.0, 2),
        lambda: vf.scan(lambda c, _: (c, c), 0.0, length=2),
        lambda: vf.cond(True, lambda: 1.0, lambda: 2.0),
        lambda: vf.program(flip).simulate(),
    ],
)
def test_words_outside_an_objective(call):
    with pytest.raises(vf.ProgramError, match=r"vf\.expect"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vf.expect(3.0), "objective"),
        (lambda: vf.program(3.0), "fn|function"),
        (lambda: vf.expect(lambda: vf.sample(3, dist.Normal(0.0, 1.0)))(KEY), "name"),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vf.expect(flip, 0), "num_samples"),
        (lambda: vf.expect(flip, True), "num_samples"),
        (lambda: vf.expect(flip, gradient="stl"), "gradient"),
        (lambda: vf.reinforce(baseline="mean"), "baseline"),
        (lambda: vf.rao_blackwell(0), "num_exact"),
        (lambda: vf.expect(lambda: vf.vmap(flip, 0).sum())(KEY), "n must be"),
        (lambda: vf.expect(lambda: vf.vmap(flip, 2, control="mean").sum())(KEY), "control"),
    ],
)
def test_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda: vf.vmap(lambda x: x, 3, jnp.zeros(2)).sum(), "leading axis 3"),
        (lambda: vf.vmap(flip, 1, control="vimco").sum(), "at least 2"),
        (lambda: vf.vmap(lambda: (flip(), flip), 2, control="vimco"), "two sites|not a valid"),
        (lambda: vf.vmap(lambda: jnp.ones(3) * flip(), 2, control="vimco").sum(), "log-weight"),
        (lambda: vf.vmap(lambda: flip() > 0, 2, control="loo").sum(), "floating-point"),
        (lambda: vf.scan(lambda c, x: (c, x), 0.0, jnp.zeros(2), 3)[0], "number of steps"),
        (lambda: vf.scan(lambda c, x: (c, x), 0.0)[0], "number of steps"),
    ],
)
def test_blocks_that_do_not_fit(body, message):
    with pytest.raises((vf.ProgramError, TypeError), match=message):
        vf.expect(body)(KEY)


def test_values_that_do_not_fit_a_program():
    @vf.program
    def guide():
        vf.sample("x", dist.Normal(0.0, 1.0))
        vf.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(vf.ProgramError, match=r"'y'.*no value"):
        guide.log_prob({"x": 0.0})
    with pytest.raises(vf.ProgramError, match=r"does not have: \['z'\]"):
        guide.log_prob({"x": 0.0, "y": 0.0, "z": 0.0})


def test_branches_of_a_guide_with_different_sites():
    @vf.program
    def guide():
        vf.cond(True, lambda: vf.sample("x", dist.Normal(0.0, 1.0)), lambda: jnp.zeros(()))

    with pytest.raises(vf.ProgramError, match="same sites"):
        vf.expect(lambda: guide.simulate()[1])(KEY)
