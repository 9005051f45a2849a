"""Noise, nesting, and what plain JAX an objective may use."""

import dataclasses

import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.programs.power import check, moments

T = jnp.array(0.7)


def draws_of(body, key):
    """What the sites of a program drew: a flat vector, by way of the objective's value."""
    keep = {}

    def objective():
        keep["x"] = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(body())])
        return jnp.zeros(())

    vf.expect(objective)(key)
    return np.asarray(keep["x"])


def normal(name):
    return vf.sample(name, dist.Normal(0.0, 1.0))


def many_sites():
    @vf.program
    def guide():
        normal("x")
        vf.vmap(lambda: normal("y"), 3)

    return [
        normal("x"),
        normal("y"),
        vf.vmap(lambda: [normal("x"), vf.vmap(lambda: normal("x"), 2)], 2),
        vf.vmap(lambda: normal("x"), 2),
        vf.scan(lambda c, _: (c, [normal("x"), normal("y")]), 0.0, length=2),
        vf.scan(lambda c, _: (c, vf.vmap(lambda: normal("x"), 2)), 0.0, length=2)[1],
        vf.cond(True, lambda: normal("x"), lambda: normal("y")),
        guide.simulate()[0],
        guide.simulate()[0],
        guide.simulate(name="again")[0],
    ]


def test_no_two_sites_and_no_two_keys_share_noise():
    a = draws_of(many_sites, jax.random.key(0))
    b = draws_of(many_sites, jax.random.key(1))
    both = np.concatenate([a[a != 0.0], b[b != 0.0]])  # 0 is the carry
    assert len(both) == 2 * 31
    assert len(np.unique(both)) == len(both)


def test_keys_are_never_reused(key, no_key_reuse):
    strategies = [vf.measure_valued(), vf.reinforce(), vf.reparam()]

    def objective(t):
        one = [vf.sample(f"x{i}", dist.Normal(t, 1.0), s) for i, s in enumerate(strategies)]
        return sum(one) + vf.vmap(lambda: vf.sample("b", dist.Gamma(2.0, t)), 2).sum()

    assert jnp.isfinite(jax.jit(jax.grad(vf.expect(objective, 2), argnums=1))(key, T))


def test_the_same_key_gives_the_same_number(key):
    def objective(t):
        return vf.sample("x", dist.Normal(t, 1.0), vf.measure_valued()) ** 2

    estimate = vf.expect(objective, 3)
    assert estimate(key, T) == jax.jit(estimate)(key, T)


def test_lanes_do_not_change_what_is_drawn(key):
    def objective(strategy, t):
        b = vf.sample("b", dist.Bernoulli(probs=t), strategy)
        return vf.sample("x", dist.Normal(b, 1.0)) ** 2 + b

    plain = jax.jit(vf.expect(lambda t: objective(vf.reinforce(), t), 5))(key, T)
    lanes = jax.jit(vf.expect(lambda t: objective(vf.measure_valued(), t), 5))(key, T)
    np.testing.assert_allclose(plain, lanes, rtol=1e-12)


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


@pytest.mark.parametrize("strategy", [vf.reparam(), vf.measure_valued(), vf.reinforce()], ids=repr)
def test_custom_derivatives_and_modules_inside(key, strategy):
    net = eqx.nn.MLP(2, "scalar", 4, 1, key=jax.random.key(5))
    params = {"net": net, "loc": (jnp.array([0.1, 0.2]),)}

    def objective(p):
        def body(_):
            x = vf.sample("x", dist.Normal(p["loc"][0], 1.0).to_event(1), strategy)
            return jax.nn.relu(1 + p["net"](x)) + jnp.logaddexp(x[0], tripled(x[1]))

        return vf.vmap(body, 2, jnp.zeros(2)).mean()

    value, grad = eqx.filter_jit(vf.value_and_grad(vf.expect(objective, 2)))(key, params)
    assert jax.tree.structure(grad) == jax.tree.structure(vf.params(params))
    assert jnp.isfinite(value)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grad))
    assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grad["net"]))


def test_jit_vmap_grad_and_scan_of_an_estimate(key):
    def objective(t):
        b = vf.sample("b", dist.Bernoulli(probs=t), vf.enum())
        return (b + t) ** 2

    estimate = vf.expect(objective)
    exact = lambda t: t * (1 + t) ** 2 + (1 - t) * t**2
    ts = jnp.array([0.2, 0.5, 0.7])
    keys = jax.random.split(key, 3)
    slopes = jax.jit(jax.vmap(jax.grad(estimate, argnums=1)))(keys, ts)
    np.testing.assert_allclose(slopes, jax.vmap(jax.grad(exact))(ts), rtol=1e-12)

    def step(total, one):
        return total + estimate(*one), None

    total = jax.jit(lambda xs: jax.lax.scan(step, jnp.zeros(()), xs)[0])((keys, ts))
    np.testing.assert_allclose(total, exact(ts).sum(), rtol=1e-12)
    np.testing.assert_allclose(
        jax.jit(jax.hessian(estimate, argnums=1))(key, T), jax.hessian(exact)(T), rtol=1e-12
    )


def test_a_probability_of_zero_is_no_nan(key):
    def entropy(logits):
        site = dist.CategoricalLogits(logits, validate_args=False)
        a = vf.sample("a", site, vf.enum())
        return -site.log_prob(a)

    value = jax.jit(vf.expect(entropy))(key, jnp.array([0.0, 0.0, -jnp.inf]))
    np.testing.assert_allclose(value, jnp.log(2.0), rtol=1e-12)


@dataclasses.dataclass(frozen=True, repr=False)
class Antithetic(vf.Strategy):
    """A strategy of a user: both signs of the noise, averaged in the gradient."""

    def draw(self, site):
        x = site.draw()
        mirrored = 2 * site.dist.loc - x
        site.add_control(0.0, site.log_prob(jax.lax.stop_gradient(mirrored)))
        return x


def test_a_strategy_of_ones_own(key):
    estimate = vf.expect(lambda t: vf.sample("x", dist.Normal(t, 1.0), Antithetic()) ** 2)
    check(estimate, T, key, value=1.49, gradient=1.4)
    assert repr(Antithetic()) == "antithetic()"


def test_strategies_print_as_they_are_written():
    shown = [vf.enum(), vf.measure_valued(), vf.reinforce(), vf.reinforce(baseline=-7.0)]
    assert [repr(s) for s in shown] == [
        "enum()",
        "measure_valued()",
        "reinforce()",
        "reinforce(baseline=-7.0)",
    ]


@pytest.mark.parametrize(
    ("make", "strategy"),
    [
        (lambda t: distrax.Bernoulli(probs=t), vf.measure_valued()),
        (lambda t: distrax.Bernoulli(probs=t), vf.reinforce()),
        (lambda t: distrax.Bernoulli(probs=t), vf.enum()),
        (lambda t: distrax.Categorical(probs=jnp.stack([1 - t, t])), vf.measure_valued()),
        (lambda t: distrax.Categorical(probs=jnp.stack([1 - t, t])), vf.enum()),
    ],
)
def test_distrax_choices(key, make, strategy):
    estimate = vf.expect(lambda t: 1.0 + 2.0 * vf.sample("b", make(t), strategy))
    check(estimate, T, key, value=2.4, gradient=2.0, rel=0.02)


def test_distrax_normal_is_reparameterised_by_default(key):
    estimate = vf.expect(lambda t: vf.sample("x", distrax.Normal(t, 1.0)) ** 2)
    state = moments(estimate, T, key, 1)
    assert abs(state.sd[1] - 2.0) < 0.05
    with pytest.raises(vf.ProgramError, match=r"'b'.*vf\.enum"):
        vf.expect(lambda: vf.sample("b", distrax.Bernoulli(probs=0.2)))(key)


def test_a_flow_as_the_distribution_of_a_site(key):
    flow = vf.flows.gaussian(jax.random.key(0), 2)

    @vf.program
    def guide(flow):
        vf.sample("z", flow)

    def objective(flow):
        values, log_q = guide.simulate(flow)
        return log_q - flow.log_prob(values["z"])

    value, grad = jax.jit(vf.value_and_grad(vf.expect(objective)))(key, flow)
    np.testing.assert_allclose(value, 0.0, atol=1e-12)
    assert all(bool(jnp.allclose(g, 0.0, atol=1e-9)) for g in jax.tree.leaves(grad))


def test_shells_around_a_distribution_are_seen_through(key):
    p = jnp.array([0.2, 0.5, 0.7])
    expanded = lambda p: dist.Bernoulli(probs=p).expand((2, 3)).to_event(2)

    def objective(p):
        return 1.0 * vf.sample("b", expanded(p), vf.measure_valued()).sum() ** 2

    # twice the three flips: sum of six, E S^2 = sum p(1-p) + (sum p)^2
    exact = lambda p: 2 * (p * (1 - p)).sum() + (2 * p.sum()) ** 2
    check(vf.expect(objective), p, key, value=exact(p), gradient=jax.grad(exact)(p))


def test_a_mask_does_not_change_the_score_of_a_draw(key):
    def objective(t):
        site = dist.Normal(t, 1.0).mask(mask=False)
        return vf.sample("x", site, vf.reinforce()) ** 2

    check(vf.expect(objective), T, key, value=1.49, gradient=1.4)
