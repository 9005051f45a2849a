"""NumPyro guides and models inside objectives: strategies, plates, scales, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.programs.power import check
from tests.programs.test_programs import PLATE, plate_elbo

DATA = jnp.array([0.5, 1.0, -0.3, 0.9])


def model():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Bernoulli(0.5))
    with numpyro.plate("n", 4):
        numpyro.sample("x", dist.Normal(z + b, 1.0), obs=DATA)


def guide(p, infer=None):
    b = numpyro.sample("b", dist.Bernoulli(probs=p["p"]), infer=infer or {})
    numpyro.sample("z", dist.Normal(p["m"] - b, 0.8))


def elbo(p, strategies=None, infer=None, gradient=None):
    q = vf.from_numpyro(guide, p, infer=infer, strategies=strategies)
    values, log_q = q.simulate(gradient=gradient)
    return vf.from_numpyro(model).log_prob(values) - log_q


@pytest.mark.parametrize(
    ("strategy", "num_samples"),
    [
        (vf.enum(), 1),
        (vf.measure_valued(), 1),
        (vf.reinforce(baseline=-7.0), 1),
        (vf.reinforce(baseline="loo"), 8),
        (vf.disarm(), 1),
    ],
    ids=repr,
)
def test_a_strategy_by_site(key, strategy, num_samples):
    value, slope = jax.value_and_grad(lambda p: plate_elbo(p["p"], p["m"], DATA))(PLATE)
    estimate = vf.expect(lambda p: elbo(p, {"b": strategy}), num_samples)
    check(estimate, PLATE, key, value=value, gradient=slope)


def test_a_strategy_in_the_guide_and_path_gradients(key):
    value, slope = jax.value_and_grad(lambda p: plate_elbo(p["p"], p["m"], DATA))(PLATE)
    estimate = vf.expect(lambda p: elbo(p, infer={"strategy": vf.enum()}, gradient="path"))
    check(estimate, PLATE, key, value=value, gradient=slope)


def test_strategies_are_checked(key):
    with pytest.raises(vf.ProgramError, match=r"'b'.*vf\.enum"):
        vf.expect(elbo)(key, PLATE)
    with pytest.raises(vf.ProgramError, match=r"\['c'\].*\['b', 'z'\]"):
        vf.expect(lambda p: elbo(p, {"b": vf.enum(), "c": vf.enum()}))(key, PLATE)


def test_plates_scales_and_masks(key):
    def scaled(p):
        with numpyro.plate("n", 3), numpyro.handlers.scale(scale=2.0):
            a = numpyro.sample("a", dist.Normal(p, 1.0))
        with numpyro.handlers.mask(mask=jnp.array([True, False, True])), numpyro.plate("m", 3):
            numpyro.sample("b", dist.Normal(a, 1.0), infer={"strategy": vf.reinforce()})
        numpyro.deterministic("c", a + 1)
        numpyro.factor("f", -1.0)

    def objective(p):
        values, log_q = vf.from_numpyro(scaled, p).simulate()
        a, b = values["a"], values["b"]
        log_b = jnp.where(jnp.array([1, 0, 1]), dist.Normal(a, 1.0).log_prob(b), 0.0).sum()
        assert set(values) == {"a", "b"}
        return jnp.abs(log_q - 2 * dist.Normal(p, 1.0).log_prob(a).sum() - log_b)

    assert jax.jit(vf.expect(objective, 3))(key, 0.3) < 1e-12


def test_a_masked_site_keeps_the_score_of_its_draw(key):
    def masked(t):
        with numpyro.handlers.mask(mask=False), numpyro.handlers.scale(scale=3.0):
            numpyro.sample("x", dist.Normal(t, 1.0))

    def objective(t):
        program = vf.from_numpyro(masked, t, strategies={"x": vf.reinforce()})
        return program.simulate()[0]["x"] ** 2

    check(vf.expect(objective), jnp.array(0.7), key, value=1.49, gradient=1.4)


def test_two_programs_never_share_noise(key):
    def one():
        numpyro.sample("x", dist.Normal(0.0, 1.0), sample_shape=(3,))

    seen = []

    def objective():
        program = vf.from_numpyro(one)
        seen.extend(program.simulate()[0]["x"] for _ in range(2))
        seen.append(program.simulate(name="third")[0]["x"])
        return jnp.zeros(())

    vf.expect(objective)(key)
    assert len(np.unique(np.concatenate(seen))) == 9


def test_a_site_inside_a_raw_scan_of_a_guide(key):
    def looped():
        def step(c, _):
            return c + numpyro.sample("s", dist.Normal(0.0, 1.0)), None

        jax.lax.scan(step, 0.0, None, length=3)

    with pytest.raises(vf.ProgramError, match=r"'s'.*vf\.scan"):
        vf.expect(lambda: vf.from_numpyro(looped).simulate()[1])(key)


def test_a_random_subsample_is_unbiased_and_shared_by_guide_and_model(key):
    """Local latents: the ELBO of three data of ten is that of the ten on average."""
    data = jnp.linspace(-1.0, 2.0, 10)

    def big():
        with numpyro.plate("n", 10, subsample_size=3) as i:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def local(p):
        with numpyro.plate("n", 10, subsample_size=3) as i:
            numpyro.sample("z", dist.Normal(p * data[i], 0.7))

    def exact(p):
        # sum over data of -E(z^2)/2 - E(x - z)^2/2 - log 2 pi + entropy
        spread = ((p * data) ** 2 + 0.49) + (data * (1 - p)) ** 2 + 0.49
        entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e * 0.49)
        return (-0.5 * spread - jnp.log(2 * jnp.pi) + entropy).sum()

    def objective(p):
        values, log_q = vf.from_numpyro(local, p).simulate()
        assert values["z"].shape == (3,)
        return vf.from_numpyro(big).log_prob(values) - log_q

    p = jnp.array(0.3)
    check(vf.expect(objective), p, key, value=exact(p), gradient=jax.grad(exact)(p))


def test_a_guide_that_misses_or_adds_a_site_of_the_model(key):
    def partial_guide():
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    def larger_guide():
        numpyro.sample("b", dist.Bernoulli(probs=0.5), infer={"strategy": vf.enum()})
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("extra", dist.Normal(0.0, 1.0))

    for guide, message in ((partial_guide, "'b'"), (larger_guide, "'extra'")):
        with pytest.raises(vf.ProgramError, match=message):
            vf.expect(
                lambda g=guide: vf.objectives.elbo()(vf.from_numpyro(g), vf.from_numpyro(model))
            )(key)
