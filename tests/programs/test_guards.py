"""Misuse of the language: an error that names the site and the remedy."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf

KEY = jax.random.key(0)


def flip(strategy=None):
    return vf.sample("s", dist.Bernoulli(probs=0.3), strategy or vf.reinforce()) * 1.0


RAW = {
    "jax.vmap": (lambda t: jax.vmap(lambda _: flip())(jnp.arange(3)).sum(), "vf.vmap"),
    "jax.lax.scan": (
        lambda t: jax.lax.scan(lambda c, _: (c + flip(), None), 0.0, None, length=3)[0],
        "vf.scan",
    ),
    "jax.lax.map": (lambda t: jax.lax.map(lambda _: flip(), jnp.arange(3)).sum(), "vf.scan"),
    "jax.lax.fori_loop": (lambda t: jax.lax.fori_loop(0, 3, lambda i, c: c + flip(), t), "vf.scan"),
    "jax.lax.while_loop": (
        lambda t: jax.lax.while_loop(lambda c: c < 1, lambda c: c + flip(), t),
        "vf.scan",
    ),
    "jax.lax.cond": (lambda t: jax.lax.cond(t > 0, flip, lambda: 0.0), "vf.cond"),
    "jax.lax.switch": (lambda t: jax.lax.switch(1, [flip, lambda: 0.0]), "vf.cond"),
    "jax.jit": (lambda t: jax.jit(flip)(), "vf.expect"),
    "jax.grad": (lambda t: jax.grad(lambda t: t * flip())(t), "vf.expect"),
    "jax.checkpoint": (lambda t: jax.checkpoint(lambda t: t * flip())(t), "out of it"),
}


@pytest.mark.parametrize("outer", ["eager", "jit"])
@pytest.mark.parametrize("name", RAW)
def test_a_site_inside_a_raw_transformation(name, outer):
    body, remedy = RAW[name]
    estimate = vf.expect(lambda t: vf.vmap(lambda: body(t), 2).sum())
    run = jax.jit(estimate) if outer == "jit" else estimate
    with pytest.raises(vf.ProgramError, match=f"'s'.* inside a raw {name}, .*{remedy}"):
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


def bound(guide, model, language):
    """The ELBO of one site, drawn from `guide` and scored by `model`."""
    if language == "numpyro":
        q, p = (vf.from_numpyro(lambda d=d: numpyro.sample("s", d)) for d in (guide, model))
    else:
        q, p = (vf.program(lambda d=d: vf.sample("s", d)) for d in (guide, model))

    def objective():
        values, log_q = q.simulate()
        return p.log_prob(values) - log_q

    return vf.expect(objective)


SIMPLEX = dist.Dirichlet(jnp.ones(3))
WIDER = {
    "normal for half-normal": (dist.Normal(0.0, 1.0), dist.HalfNormal(1.0)),
    "positive for an interval": (dist.LogNormal(0.0, 1.0), dist.Uniform(0.0, 2.0)),
    "a longer interval": (dist.Uniform(-0.5, 1.0), dist.Beta(2.0, 2.0)),
    "a lower bound that is lower": (dist.LogNormal(0.0, 1.0), dist.Pareto(2.0, 1.0)),
    "one of two elements": (
        dist.Uniform(jnp.array([0.0, -1.0]), 1.0),
        dist.Beta(2 * jnp.ones(2), 2.0),
    ),
    "vectors": (
        dist.Normal(jnp.zeros(3), 1.0).to_event(1),
        dist.LogNormal(jnp.zeros(3)).to_event(1),
    ),
    "real for a simplex": (dist.Normal(jnp.zeros(3), 1.0).to_event(1), SIMPLEX),
}


@pytest.mark.parametrize("language", ["numpyro", "vflow"])
@pytest.mark.parametrize("case", WIDER)
def test_a_guide_whose_support_is_wider(case, language):
    with pytest.raises(vf.ProgramError, match=r"'s'.*wider than the model's"):
        bound(*WIDER[case], language)(KEY)


CONTAINED = {
    "equal": (dist.Gamma(2.0, 1.0), dist.HalfCauchy(1.0)),
    "narrower": (dist.Beta(2.0, 2.0), dist.Normal(0.0, 1.0)),
    "the same to rounding": (dist.VonMises(0.0, 1.0), dist.Uniform(-3.14159265, 3.14159265)),
    "transformed": (
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform()),
        dist.Exponential(1.0),
    ),
    "a point": (dist.Delta(0.3), dist.Exponential(1.0)),
    "simplex": (SIMPLEX, SIMPLEX),
    "fewer integers": (dist.Bernoulli(probs=0.5), dist.Poisson(2.0)),
}


@pytest.mark.parametrize("case", CONTAINED)
def test_a_guide_whose_support_is_contained(case):
    guide, model = CONTAINED[case]
    if guide.is_discrete or isinstance(guide, dist.VonMises):
        model = model.mask(True)  # masks and expansions are seen through
        q = vf.program(lambda: vf.sample("s", guide, vf.reinforce()))
        estimate = vf.expect(
            lambda: vf.program(lambda: vf.sample("s", model)).log_prob(q.simulate()[0])
        )
    else:
        estimate = bound(guide, model, "numpyro")
    assert jnp.isfinite(estimate(KEY))


def test_supports_that_are_traced_or_values_that_were_changed_are_left_alone():
    def objective(edge):
        q = vf.program(lambda: vf.sample("s", dist.Uniform(0.0, edge)))
        p = vf.program(lambda: vf.sample("s", dist.Uniform(0.0, 2.0)))
        values, log_q = q.simulate()
        return p.log_prob(values) - log_q

    assert jnp.isfinite(jax.jit(vf.expect(objective))(KEY, 1.0))

    def on_the_log_scale():
        values, log_q = vf.program(lambda: vf.sample("s", dist.Normal(0.0, 1.0))).simulate()
        p = vf.program(lambda: vf.sample("s", dist.HalfNormal(1.0)))
        return p.log_prob({"s": jnp.exp(values["s"])}) + values["s"] - log_q

    assert jnp.isfinite(vf.expect(on_the_log_scale)(KEY))


def test_a_proposal_of_importance_sampling_may_be_wider():
    model = vf.program(lambda: vf.sample("s", dist.HalfNormal(1.0)))
    wide = vf.program(lambda: vf.sample("s", dist.Normal(0.0, 1.0)))
    normalised = vf.expect(lambda: vf.normalize(model, {}, vf.importance(50, wide)).log_evidence)
    assert jnp.isfinite(normalised(KEY))


def test_discrete_here_and_continuous_there():
    with pytest.raises(vf.ProgramError, match=r"'s' is continuous in the guide and discrete"):
        bound(dist.Normal(0.0, 1.0), dist.Poisson(1.0), "numpyro")(KEY)


def noisy(t):
    return vf.sample("x", dist.Normal(t, 1.0)) ** 2


def exact(t):
    return 1.0 + vf.sample("b", dist.Bernoulli(probs=t), vf.enum())


A, B = jax.random.split(jax.random.key(7))
BENT = {
    "log": lambda t, s: jnp.log(s(A, t)),
    "square": lambda t, s: s(A, t) ** 2,
    "its own product": lambda t, s: (lambda v: v * jnp.cumsum(v * jnp.ones(2))[1])(s(A, t)),
    "denominator": lambda t, s: t / s(A, t),
    "rounded": lambda t, s: jnp.arange(9.0)[s(A, t).astype(int)],
    "choice": lambda t, s: jnp.where(s(A, t) > 1.0, t, 2.0),
    "relu": lambda t, s: jax.nn.relu(s(A, t) - 1.0),
    "compiled": lambda t, s: jax.jit(lambda v: jnp.exp(v))(s(A, t)),
    "raw scan": lambda t, s: jax.lax.scan(lambda c, _: (c * c, None), s(A, t), length=2)[0],
    "raw cond": lambda t, s: jax.lax.cond(s(A, t) > 1.0, lambda: t, lambda: 2.0),
    "particles": lambda t, s: jax.nn.logsumexp(vf.vmap(lambda k: s(k, t), 2, jnp.stack([A, B]))),
    "cost": lambda t, s: vf.cost(jnp.abs(s(A, t))),
    "enumerated": lambda t, s: vf.sample("c", dist.Bernoulli(probs=t), vf.enum()) * s(A, t) ** 2,
    "lanes": lambda t, s: vf.sample("c", dist.Bernoulli(probs=t), vf.disarm()) * s(A, t) ** 2,
}
STRAIGHT = {
    "mean": lambda t, s: 0.5 * (s(A, t) + s(B, t)) - t,
    "a draw as a factor": lambda t, s: s(A, t) * vf.sample("y", dist.Normal(t, 1.0)) ** 2,
    "independent factors": lambda t, s: s(A, t) * s(B, t),
    "an element": lambda t, s: (jnp.arange(3.0) * s(A, t)).at[1].set(t)[2],
    "a plate": lambda t, s: jax.vmap(lambda k: s(k, t))(jnp.stack([A, B])).sum(),
    "a score": lambda t, s: s(A, t) * vf.sample("c", dist.Bernoulli(probs=t), vf.reinforce()),
    "lanes": lambda t, s: s(A, t) * vf.sample("c", dist.Bernoulli(probs=t), vf.measure_valued()),
}


@pytest.mark.parametrize("use", BENT)
def test_a_nonlinear_use_of_an_estimated_expectation(use):
    inner = vf.expect(noisy, 2)
    with pytest.raises(vf.ProgramError, match=r"nested vf\.expect \(of noisy\).*vf\.vmap"):
        jax.eval_shape(vf.expect(lambda t: BENT[use](t, inner)), KEY, 0.3)


def test_an_expectation_without_noise_is_no_estimate():
    estimate = vf.expect(lambda t: jnp.log(vf.expect(exact)(A, t)))
    assert abs(jax.jit(estimate)(KEY, 0.3) - jnp.log(1.3)) < 1e-12


@pytest.mark.parametrize("use", STRAIGHT)
def test_a_linear_use_of_an_estimated_expectation(use):
    estimate = vf.expect(lambda t: STRAIGHT[use](t, vf.expect(noisy)), 2)
    assert jax.eval_shape(estimate, KEY, 0.3).shape == ()
