"""A guide of one's own in vf.fit: the same verdict, draws and files as a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import stats

import vflow as vf
from tests.fit.exact import LOC, LOG_EVIDENCE, SD, Y, model

RUN = {"num_steps": 800, "num_samples": 16, "progress": False}


def guide(params):
    numpyro.sample("tau", dist.LogNormal(params["loc"][1], jnp.exp(params["log_sd"][1])))
    numpyro.sample("mu", dist.Normal(params["loc"][0], jnp.exp(params["log_sd"][0])))
    with numpyro.plate("school", 3):
        numpyro.sample("theta", dist.Normal(params["loc"][2:], jnp.exp(params["log_sd"][2:])))


def start():
    return {"loc": jnp.zeros(5), "log_sd": jnp.zeros(5)}


def program():
    return vf.from_numpyro(model, y=Y)


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    """One fit of the family that holds the posterior; it was interrupted and resumed."""
    path = tmp_path_factory.mktemp("guide") / "checkpoint"
    call = {"guide": vf.from_numpyro(guide), "params": start(), "checkpoint": path, **RUN}

    class Killed(BaseException):
        pass

    def kill(progress):
        if progress.step == 300:
            raise Killed

    with pytest.raises(Killed):
        vf.fit(jax.random.key(0), program(), callback=kill, **call)
    seen = []
    fitted = vf.fit(jax.random.key(0), program(), callback=lambda p: seen.append(p.step), **call)
    assert seen[0] == 400
    with pytest.raises(ValueError, match="flow is"):
        vf.fit(
            jax.random.key(0),
            program(),
            **(call | {"params": {"loc": jnp.zeros(5)}, "guide": mu_only}),
        )
    return fitted


def mu_only(params):
    return vf.from_numpyro(guide, {"loc": params["loc"], "log_sd": jnp.zeros(5)})


def test_the_verdict_and_the_parameters_against_the_closed_form(posterior):
    assert posterior.status == "ok" and posterior.khat < 0.5 and posterior.ess_fraction > 0.95
    assert abs(posterior.log_evidence.value - LOG_EVIDENCE) < 0.01
    assert posterior.elbo.value <= LOG_EVIDENCE + 4.5 * posterior.elbo.standard_error
    fitted = posterior.flow.params
    np.testing.assert_allclose(fitted["loc"], LOC, atol=0.05)
    np.testing.assert_allclose(np.exp(fitted["log_sd"]), SD, rtol=0.05)
    assert posterior.settings["gradient"] == "path"
    assert "the guide guide" in str(posterior)


def test_draws_densities_and_corrected_draws(posterior, key):
    draws = posterior.sample(key, 8000)
    assert {k: v.shape for k, v in draws.items()} == {
        "mu": (8000,),
        "tau": (8000,),
        "theta": (8000, 3),
        "shifted": (8000, 3),
    }
    params = posterior.flow.params
    sd = np.exp(params["log_sd"])
    assert abs(draws["mu"].mean() - params["loc"][0]) < 4.5 * sd[0] / 8000**0.5
    assert abs(np.log(draws["tau"]).mean() - params["loc"][1]) < 4.5 * sd[1] / 8000**0.5
    few = {k: v[:5] for k, v in draws.items()}
    expected = (
        stats.norm.logpdf(few["mu"], params["loc"][0], sd[0])
        + stats.lognorm.logpdf(few["tau"], sd[1], scale=np.exp(params["loc"][1]))
        + stats.norm.logpdf(few["theta"], params["loc"][2:], sd[2:]).sum(axis=1)
    )
    np.testing.assert_allclose(posterior.log_prob(few), expected, rtol=1e-10)
    better = posterior.resample(key, 2000)
    assert abs(better["mu"].mean() - LOC[0]) < 4.5 * SD[0] / 2000**0.5
    x, log_q = vf.sample_and_log_prob(key, posterior.flow, 4)
    np.testing.assert_allclose(jax.vmap(posterior.flow.log_prob)(x), log_q, rtol=1e-10)


def test_predictive_export_and_a_file(posterior, key, tmp_path):
    assert posterior.predictive(key, model, num_samples=10)["y"].shape == (10, 4)
    assert posterior.to_arviz(key, 50)["posterior"]["theta"].shape == (1, 50, 3)
    posterior.save(tmp_path / "guide.vflow")
    with pytest.raises(ValueError, match="guide=..., params="):
        vf.load(tmp_path / "guide.vflow", program())
    again = vf.load(
        tmp_path / "guide.vflow", program(), guide=vf.from_numpyro(guide), params=start()
    )
    assert again.verdict == posterior.verdict
    np.testing.assert_array_equal(again.sample(key, 7)["tau"], posterior.sample(key, 7)["tau"])


def test_a_family_that_is_too_small_is_not_called_ok():
    def rigid(params):
        numpyro.sample("x", dist.Normal(params, 0.3).expand([6]).to_event(1))

    target = vf.Target(lambda x: dist.Normal(1.0, 1.0).log_prob(x).sum(), dim=6)
    poor = vf.fit(
        jax.random.key(1),
        target,
        guide=vf.from_numpyro(rigid),
        params=0.0,
        **RUN | {"num_steps": 300},
    )
    assert poor.status != "ok"
    assert abs(poor.flow.params - 1.0) < 0.2


def test_a_marginal_guide_has_weights_and_no_density_at_a_point(key):
    """x ~ N(0, 1.25) as N(u, 0.5) with u ~ N(m, 1): exact at m = 0, with an estimated density."""

    @vf.program
    def hierarchical(params):
        u = vf.sample("u", dist.Normal(params, 1.0))
        vf.sample("x", dist.Normal(u, 0.5).expand([1]).to_event(1))

    target = vf.Target(lambda x: dist.Normal(0.0, 1.25**0.5).log_prob(x).sum(), dim=1)
    fitted = vf.fit(
        jax.random.key(2),
        target,
        guide=lambda params: vf.marginal(hierarchical(params), ("x",), vf.importance(20)),
        params=jnp.array(0.5),
        **RUN | {"num_steps": 300},
    )
    assert fitted.settings["gradient"] == "total"
    evidence = fitted.log_evidence  # E[p / q_hat] = Z exactly
    assert abs(evidence.value) < 4.5 * evidence.standard_error < 0.1
    assert fitted.sample(key, 5)["x"].shape == (5, 1)
    with pytest.raises(vf.ProgramError, match=r"only estimated.*no log_prob"):
        fitted.log_prob({"x": jnp.zeros(1)})


def site(name, distribution):
    return lambda params: numpyro.sample(name, distribution)


POSITIVE = vf.target(lambda v: -v["s"], sites={"s": constraints.positive})
PAIR = vf.Target(lambda x: -jnp.sum(x**2), dim=2)
VECTOR = dist.Normal(jnp.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("target", "call", "error", "match"),
    [
        (POSITIVE, {"guide": site("z", dist.LogNormal())}, vf.ProgramError, "misses site 's'"),
        (POSITIVE, {"guide": site("s", dist.Normal())}, vf.ProgramError, "'s'.*wider"),
        (PAIR, {"guide": site("x", dist.Normal())}, vf.ProgramError, r"'x' has shape \(\)"),
        (PAIR, {"guide": site("x", VECTOR), "params": None}, ValueError, "needs params="),
        (PAIR, {"guide": site("x", VECTOR), "params": {"n": 3}}, ValueError, "trainable"),
        (PAIR, {"guide": 3}, TypeError, "from_numpyro"),
        (PAIR, {"params": 1.0}, ValueError, "guide="),
        (
            PAIR,
            {"guide": site("x", VECTOR), "precondition": vf.bijections.Identity((2,))},
            ValueError,
            "precondition",
        ),
        (
            PAIR,
            {"guide": site("x", VECTOR), "flow": vf.flows.gaussian(jax.random.key(0), 2)},
            ValueError,
            "two families",
        ),
    ],
    ids=range(9),
)
def test_what_does_not_fit_is_named(target, call, error, match):
    call = {"params": 1.0} | call
    if callable(call.get("guide")):
        call["guide"] = vf.from_numpyro(call["guide"])
    with pytest.raises(error, match=match):
        vf.fit(jax.random.key(0), target, **call)


def test_more_that_does_not_fit_is_named():
    def more(params):
        numpyro.sample("x", VECTOR)
        numpyro.sample("u", dist.Normal(params, 1.0))

    def scaled(params):
        with numpyro.handlers.scale(scale=2.0):
            numpyro.sample("x", VECTOR)

    def discrete(params):
        numpyro.sample(
            "x", dist.Bernoulli(probs=params * jnp.ones(2)), infer={"strategy": vf.reinforce()}
        )

    def with_param(params):
        numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), jnp.ones(2)).to_event(1))

    for function, match in (
        (more, "'u'.*vf.marginal"),
        (scaled, "'x' is scaled"),
        (discrete, "'x' is discrete.*vf.maximize"),
        (with_param, "'m' is a numpyro.param"),
    ):
        with pytest.raises(vf.ProgramError, match=match):
            vf.fit(jax.random.key(0), PAIR, guide=vf.from_numpyro(function), params=0.5)
    with pytest.raises(TypeError, match="returned NoneType"):
        vf.fit(jax.random.key(0), PAIR, guide=lambda params: None, params=0.5)
    guided = vf.from_numpyro(
        lambda params: numpyro.sample("x", VECTOR, infer={"strategy": vf.reinforce()})
    )
    with pytest.raises(ValueError, match=r"path.*\['x'\]"):
        vf.fit(jax.random.key(0), PAIR, guide=guided, params=0.5, gradient="path")
