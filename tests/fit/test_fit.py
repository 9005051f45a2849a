"""vf.fit from end to end on models with closed-form posteriors, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import vflow as vf

Y = np.array([1.2, 0.3, 2.1, 1.7])


def conjugate(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def truth(y):
    """Posterior mean, sd, and log evidence of `conjugate`."""
    variance = 1 / (len(y) + 0.25)
    covariance = np.eye(len(y)) + 4.0
    log_z = -0.5 * (
        y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    return variance * y.sum(), variance**0.5, log_z


def correlated(x):
    """Normalised, two coordinates, correlation 0.9 and far from unit scale."""
    a, b = x[0] / 100.0, x[1] - 0.009 * x[0]
    return -0.5 * (a**2 + b**2 / 0.19) - jnp.log(2 * jnp.pi * 100.0 * 0.19**0.5)


CORRELATED = vf.Target(correlated, dim=2)


@pytest.fixture(scope="module")
def posterior():
    """One fit shared by the tests that only look at it: one coordinate, NumPyro, defaults."""
    program = vf.from_numpyro(conjugate, Y)
    return vf.fit(jax.random.key(0), program, num_samples=32, progress=False)


def test_one_latent_coordinate_against_the_conjugate_posterior(posterior):
    mean, sd, log_z = truth(Y)
    assert posterior.status == "ok" and posterior.reasons == ()
    assert posterior.khat < 0.7 and posterior.ess_fraction > 0.95
    draws = np.asarray(posterior.sample(jax.random.key(1), 20_000)["mu"])
    assert abs(draws.mean() - mean) < 4.5 * sd / 20_000**0.5 + 0.02 * sd
    assert abs(np.log(draws.std() / sd)) < 0.03
    evidence = posterior.log_evidence
    assert abs(evidence.value - log_z) < 4.5 * evidence.standard_error + 1e-6
    assert evidence.standard_error < 0.01
    assert posterior.elbo.value <= log_z + 4.5 * posterior.elbo.standard_error
    assert posterior.settings["gradient"] == "path"
    assert "mu" in str(posterior) and "ok" in str(posterior)


def test_the_same_key_gives_the_same_posterior_and_another_key_another():
    fits = [
        vf.fit(jax.random.key(seed), CORRELATED, num_steps=20, num_samples=8, progress=False)
        for seed in (3, 3, 4)
    ]
    x = [np.asarray(vf.sample_and_log_prob(jax.random.key(0), f.flow, 5)[0]) for f in fits]
    np.testing.assert_array_equal(x[0], x[1])
    assert np.abs(x[0] - x[2]).max() > 1e-6


def test_the_preconditioner_makes_scale_and_correlation_harmless():
    run = {"num_steps": 100, "num_samples": 16, "progress": False}
    good = vf.fit(jax.random.key(5), CORRELATED, **run)
    assert good.status == "ok" and abs(good.log_evidence.value) < 0.02
    bad = vf.fit(jax.random.key(5), CORRELATED, precondition=None, **run)
    assert bad.status != "ok" and bad.reasons


def test_a_checkpoint_resumes_to_the_same_posterior(tmp_path):
    run = {"num_steps": 250, "num_samples": 8, "progress": False}
    target = vf.Target(lambda x: jnp.sum(0.5 * x - jnp.exp(x)), dim=2)
    undisturbed = vf.fit(jax.random.key(6), target, checkpoint=tmp_path / "a", **run)

    class Killed(BaseException):
        pass

    def kill(progress):
        if progress.step == 200:
            raise Killed

    with pytest.raises(Killed):
        vf.fit(jax.random.key(6), target, checkpoint=tmp_path / "b", callback=kill, **run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    seen = []
    resumed = vf.fit(
        jax.random.key(6),
        target,
        checkpoint=tmp_path / "b",
        callback=lambda p: seen.append(p.step),
        **run,
    )
    assert seen == [250]
    for mine, theirs in zip(
        jax.tree.leaves(resumed.flow), jax.tree.leaves(undisturbed.flow), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(resumed.history, undisturbed.history)
    assert resumed.verdict == undisturbed.verdict
    with pytest.raises(ValueError, match="num_steps is 250 there and 300 here"):
        vf.fit(jax.random.key(6), target, checkpoint=tmp_path / "b", **(run | {"num_steps": 300}))


def test_ctrl_c_returns_the_best_so_far():
    def press(progress):
        raise KeyboardInterrupt

    options = {"num_steps": 2000, "num_samples": 8, "progress": False}
    result = vf.fit(jax.random.key(7), CORRELATED, callback=press, **options)
    assert len(result.history) == 100
    assert any("interrupted after 100 of 2000" in note for note in result.settings["notes"])


def test_a_learning_rate_of_a_million_does_not_pass_for_a_fit():
    def run():
        result = vf.fit(
            jax.random.key(8),
            CORRELATED,
            optimizer=optax.adam(1e6),
            num_steps=200,
            num_samples=8,
            progress=False,
        )
        result.require_ok()

    with pytest.raises(vf.FitError):
        run()


def test_an_objective_of_ones_own_has_path_gradients_unless_it_clips():
    def scaled(q, p):
        x, log_q = q.simulate()
        return 0.5 * (p.log_prob(x) - log_q)

    run = {"num_steps": 100, "num_samples": 16, "progress": False}
    result = vf.fit(jax.random.key(9), CORRELATED, objective=scaled, **run)
    assert result.settings["gradient"] == "path" and result.ess_fraction > 0.99

    def clipped(q, p):
        x, log_q = q.simulate()
        return jnp.minimum(p.log_prob(x) - log_q, 10.0)

    result = vf.fit(jax.random.key(9), CORRELATED, objective=clipped, **run)
    assert result.settings["gradient"] == "total" and result.ess_fraction > 0.99
    assert any("clipped" in note for note in result.settings["notes"])
    with pytest.raises(ValueError, match="path.*clipped"):
        vf.fit(jax.random.key(9), CORRELATED, objective=clipped, gradient="path", **run)


def test_a_family_of_ones_own_and_a_bare_density():
    flow = vf.flows.gaussian(jax.random.key(0), 2, covariance="full")
    result = vf.fit(
        jax.random.key(10), correlated, flow=flow, num_steps=20, num_samples=8, progress=False
    )
    assert result.status == "ok" and result.target.dim == 2


def test_a_fit_in_float32_says_when_it_needs_float64():
    def jittery(x):  # in float32 1e8 + x^2 is 1e8
        return -0.5 * jnp.sum((x + 1e8) ** 2 - 1e16 - 2e8 * x)

    run = {"num_steps": 20, "num_samples": 8, "progress": False}
    with jax.enable_x64(False):
        rough = vf.fit(jax.random.key(11), vf.Target(jittery, dim=2), **run)
        assert rough.settings["dtype"] == "float64"
        assert "float64" in rough.settings["notes"][0]
        leaves = [x for x in jax.tree.leaves(rough.flow) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
        assert rough.status == "ok"
        smooth = vf.fit(jax.random.key(11), vf.Target(lambda x: -0.5 * jnp.sum(x**2), 2), **run)
        assert smooth.settings["dtype"] == "float32" and smooth.settings["notes"] == []


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_samples": -1}, ValueError, "num_samples"),
        ({"num_samples": 1.5}, TypeError, "num_samples"),
        ({"gradient": "stl"}, ValueError, "gradient"),
        ({"dtype": "float16"}, ValueError, "dtype"),
        ({"dtype": "float32"}, ValueError, "x64"),
        ({"optimizer": 1e-3}, TypeError, "optimizer"),
        ({"objective": "elbo"}, TypeError, "objective"),
        ({"callback": 3}, TypeError, "callback"),
        ({"precondition": "laplace"}, ValueError, "precondition"),
        ({"precondition": vf.bijections.Identity((3,))}, ValueError, "precondition"),
        ({"flow": "coupling"}, TypeError, "flow"),
        ({"flow": vf.distributions.Normal(3)}, ValueError, "flow"),
        ({"init": vf.distributions.Normal(2)}, TypeError, "init must be a Posterior"),
        ({"checkpoint": "/nowhere/at/all"}, ValueError, "checkpoint"),
        ({"program_or_target": correlated}, TypeError, "dimension"),
        ({"program_or_target": vf.distributions.Normal(2)}, TypeError, "flow="),
        ({"program_or_target": 3}, TypeError, "from_numpyro"),
        ({"key": 0}, TypeError, "key"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {"key": jax.random.key(0), "program_or_target": CORRELATED} | change
    with pytest.raises(error, match=match):
        vf.fit(**arguments, progress=False)


def test_a_conditional_flow_is_refused():
    flow = vf.flows.coupling(jax.random.key(0), 2, condition_dim=1)
    with pytest.raises(ValueError, match="condition"):
        vf.fit(jax.random.key(0), CORRELATED, flow=flow)
