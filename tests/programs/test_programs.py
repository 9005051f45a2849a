"""Guides and models of one's own: simulate, score, path gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.programs.power import check, moments

T = jnp.array(0.7)


@vf.program
def loops(p, strategy=None):
    """Sites at the top, in a scan, in a vmap inside it, and in a branch."""
    x = vf.sample("x", dist.Normal(p["m"], 1.0), strategy)

    def step(carry, bias):
        y = vf.sample("y", dist.Normal(carry + bias, p["s"]), strategy)
        z = vf.vmap(lambda: vf.sample("z", dist.Normal(y, p["s"]), strategy), 2)
        return y, z.sum()

    end = vf.scan(step, x, jnp.array([0.1, 0.2, 0.3]))[0]
    branch = lambda scale: lambda: vf.sample("w", dist.Normal(end, scale), strategy)
    vf.cond(x > 0, branch(1.0), branch(2.0))


def by_hand(p, values):
    log = lambda loc, scale, x: dist.Normal(loc, scale).log_prob(x)
    x, y, z, w = (values[k] for k in "xyzw")
    before = jnp.concatenate([x[None], y[:-1]]) + jnp.array([0.1, 0.2, 0.3])
    total = log(p["m"], 1.0, x) + log(before, p["s"], y).sum() + log(y[:, None], p["s"], z).sum()
    return total + log(y[-1], jnp.where(x > 0, 1.0, 2.0), w)


PARAMS = {"m": jnp.array(0.3), "s": jnp.array(0.6)}


def test_values_have_the_loops_as_leading_axes_and_log_q_is_their_density(key):
    def objective(p):
        values, log_q = loops.simulate(p)
        assert {k: v.shape for k, v in values.items()} == {
            "x": (),
            "y": (3,),
            "z": (3, 2),
            "w": (),
        }
        hand, scored = by_hand(p, values), loops.log_prob(values, p)
        return jnp.abs(log_q - hand) + jnp.abs(scored - hand)

    assert jax.jit(vf.expect(objective, 4))(key, PARAMS) < 1e-12


def test_path_gradients_have_the_same_draws_and_values_and_vanish_at_the_optimum(key):
    other = jax.tree.map(jnp.array, PARAMS)

    def objective(p, gradient):
        values, log_q = loops.simulate(p, gradient=gradient)
        return by_hand(other, values) - log_q

    run = {
        gradient: jax.jit(vf.value_and_grad(vf.expect(lambda p, g=gradient: objective(p, g), 4)))
        for gradient in ("total", "path")
    }
    moved = {"m": jnp.array(0.2), "s": jnp.array(0.9)}
    np.testing.assert_allclose(run["total"](key, moved)[0], run["path"](key, moved)[0], rtol=1e-12)
    for leaf in jax.tree.leaves(run["path"](key, PARAMS)[1]):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-10)
    assert all(abs(float(leaf)) > 1e-2 for leaf in jax.tree.leaves(run["total"](key, PARAMS)[1]))


@pytest.mark.parametrize(
    ("strategy", "gradient"),
    [(None, "total"), (None, "path"), (vf.path(), "total"), (vf.reinforce(), "path")],
    ids=repr,
)
def test_a_gaussian_elbo(key, strategy, gradient):
    @vf.program
    def guide(p):
        a = vf.sample("a", dist.Normal(p["m"], p["s"]), strategy)
        vf.sample("b", dist.Normal(a * p["m"], 1.0))

    def elbo(p):
        values, log_q = guide.simulate(p)
        log_p = dist.Normal(1.0, 1.0).log_prob(values["a"])
        return log_p + dist.Normal(values["a"], 1.0).log_prob(values["b"]) - log_q

    def exact(p):
        # KL of a, and E a^2 (1 - m)^2 / 2 for b
        m, s = p["m"], p["s"]
        kl = (s**2 + (m - 1) ** 2 - 1) / 2 - jnp.log(s)
        return -kl - (m**2 + s**2) * (1 - m) ** 2 / 2

    params = {"m": jnp.array(0.4), "s": jnp.array(0.7)}
    truth, slope = jax.value_and_grad(exact)(params)
    check(vf.expect(elbo, gradient=gradient), params, key, value=truth, gradient=slope)


def test_path_at_one_site_keeps_the_dependence_on_earlier_sites(key):
    """Path at every site is path for the program; at the optimum it has no variance."""

    def estimate(strategy, gradient):
        @vf.program
        def guide(m):
            a = vf.sample("a", dist.Normal(m, 1.0), strategy)
            vf.sample("b", dist.Normal(a * m, 1.0), strategy)

        def elbo(m):
            values, log_q = guide.simulate(m)
            a, b = values["a"], values["b"]
            return dist.Normal(1.0, 1.0).log_prob(a) + dist.Normal(a, 1.0).log_prob(b) - log_q

        return vf.expect(elbo, gradient=gradient)

    one = jnp.array(1.0)
    assert moments(estimate(vf.path(), "total"), one, key, 1, batch=100).sd[1] < 1e-12
    assert moments(estimate(None, "path"), one, key, 1, batch=100).sd[1] < 1e-12
    assert moments(estimate(None, "total"), one, key, 1, batch=100).sd[1] > 0.5


@pytest.mark.parametrize(
    ("strategy", "gradient"),
    [
        (vf.enum(), "path"),
        (vf.measure_valued(), "path"),
        (vf.measure_valued(), "total"),
        (vf.reinforce(baseline=-7.0), "path"),
    ],
    ids=repr,
)
def test_discrete_and_continuous_latents(key, strategy, gradient):
    data = jnp.array([0.5, 1.0, -0.3, 0.9])

    @vf.program
    def model():
        z = vf.sample("z", dist.Normal(0.0, 1.0))
        b = vf.sample("b", dist.Bernoulli(0.5))
        return z + b

    @vf.program
    def guide(p):
        b = vf.sample("b", dist.Bernoulli(probs=p["p"]), strategy)
        vf.sample("z", dist.Normal(p["m"] - b, 0.8))

    def elbo(p):
        values, log_q = guide.simulate(p)
        likelihood = dist.Normal(values["z"] + values["b"], 1.0).log_prob(data).sum()
        return model.log_prob(values) + likelihood - log_q

    value, slope = jax.value_and_grad(lambda p: plate_elbo(p["p"], p["m"], data))(PLATE)
    assert abs(slope["p"] + 0.3 + jnp.log(0.7 / 0.3)) < 1e-9
    estimate = vf.expect(elbo, gradient=gradient)
    check(estimate, PLATE, key, value=value, gradient=slope)


PLATE = {"p": jnp.array(0.7), "m": jnp.array(0.2)}


def plate_elbo(p, m, data, s=0.8):
    """The closed form for z ~ N(0,1), b ~ B(1/2), x ~ N(z + b, 1); b ~ B(p), z ~ N(m - b, s)."""
    total = 0.0
    for b, prob in ((0, 1 - p), (1, p)):
        log_2pi = jnp.log(2 * jnp.pi)
        term = -0.5 * ((data - m) ** 2 + s**2).sum() - 2 * log_2pi
        term += -0.5 * ((m - b) ** 2 + s**2) - 0.5 * log_2pi
        term += 0.5 * jnp.log(2 * jnp.pi * jnp.e * s**2) + jnp.log(0.5) - jnp.log(prob)
        total += prob * term
    return total


def test_the_closed_form_is_the_published_number():
    value, slope = jax.value_and_grad(plate_elbo, argnums=(0, 1))(
        0.4, 0.2, jnp.array([0.5, 1.0, -0.3, 0.9])
    )
    np.testing.assert_allclose(value, -5.894033, atol=1e-6)
    np.testing.assert_allclose(slope, (0.105465, 1.5), atol=1e-6)
