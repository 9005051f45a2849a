import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy import stats

import vflow as vf
from tests.fit.exact import (
    LOC,
    LOG_EVIDENCE,
    MU_MEAN,
    MU_VAR,
    SD,
    Y,
    exact_fit,
    model,
    normal_flow,
    posterior_of,
    target,
    wrong_fit,
)

N = 20_000


def flat(draws):
    """Unconstrained coordinates of draws, (n, 5)."""
    return np.column_stack([draws["mu"], np.log(draws["tau"]), draws["theta"]])


def z_scores(draws, size):
    """Means and variances against the truth, in standard errors of `size` independent draws."""
    standard = (flat(draws) - LOC) / SD
    return np.concatenate(
        [standard.mean(0) * size**0.5, (np.mean(standard**2, 0) - 1) * (size / 2) ** 0.5]
    )


def test_a_fit_that_is_exact_is_ok_and_gives_the_evidence():
    fit = exact_fit()
    assert (fit.status, fit.reasons) == ("ok", ())
    assert fit.khat < 0.1
    assert fit.ess_fraction > 0.999
    assert abs(fit.elbo.value - LOG_EVIDENCE) < 1e-8
    assert abs(fit.log_evidence.value - LOG_EVIDENCE) < 1e-8
    fit.require_ok()


def test_samples_have_shapes_types_and_moments(key):
    draws = exact_fit().sample(key, N)
    assert {k: v.shape for k, v in draws.items()} == {
        "mu": (N,),
        "tau": (N,),
        "theta": (N, 3),
        "shifted": (N, 3),
    }
    assert all(isinstance(v, jax.Array) and v.dtype == jnp.float64 for v in draws.values())
    assert np.abs(z_scores(draws, N)).max() < 4.5
    np.testing.assert_allclose(draws["shifted"], draws["theta"] + draws["mu"][:, None])


def test_draws_are_a_function_of_the_key(key):
    one, two = jax.random.split(key)
    first, again, other = (exact_fit().sample(k, 5)["mu"] for k in (one, one, two))
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)


def test_resample_corrects_a_wrong_fit_and_sample_does_not(key):
    fit = wrong_fit()
    assert np.abs(z_scores(fit.sample(key, N), N)).max() > 20
    assert np.abs(z_scores(fit.resample(key, N), N)).max() < 4.5


def test_resampled_draws_are_worth_about_as_many_independent_ones(key):
    fit, n = wrong_fit(), 500
    means = [np.mean(flat(fit.resample(k, n)), 0) for k in jax.random.split(key, 100)]
    worth = SD**2 / np.var(means, axis=0, ddof=1)  # chi-square: 14 % standard error
    assert np.all(worth > 0.55 * n), worth


def test_resample_warns_where_khat_is_bad(key):
    narrow = posterior_of(normal_flow(LOC, 0.45 * SD), target())
    assert narrow.status != "ok"
    with pytest.warns(UserWarning, match="k-hat"):
        draws = narrow.resample(key, 1000)
    assert draws["theta"].shape == (1000, 3)


def test_resample_refuses_weights_that_mean_nothing(key):
    nowhere = vf.Target(lambda x: jnp.where(x[0] > 0, jnp.nan, 0.0), 2)
    fit = posterior_of(normal_flow(np.zeros(2), np.ones(2)), nowhere)
    assert fit.status == "failed"
    with pytest.raises(vf.FitError, match="NaN") as caught:
        fit.resample(key, 10)
    assert caught.value.reasons


def test_require_ok_raises_with_reasons_and_remedies():
    fit = posterior_of(normal_flow(LOC, 0.3 * SD), target())
    with pytest.raises(vf.FitError, match=r"(?s)k-hat.*Remedies.*num_steps") as caught:
        fit.require_ok()
    assert caught.value.reasons == fit.reasons != ()


def test_log_prob_is_the_density_of_the_constrained_values(key):
    fit = wrong_fit()
    draws = fit.sample(key, 50)
    loc, sd = LOC + np.array([0.5, 0, 0, 0, 0]) * SD, 1.3 * SD
    expected = (
        stats.norm.logpdf(draws["mu"], loc[0], sd[0])
        + stats.lognorm.logpdf(draws["tau"], sd[1], scale=np.exp(loc[1]))
        + stats.norm.logpdf(draws["theta"], loc[2:], sd[2:]).sum(-1)
    )
    np.testing.assert_allclose(fit.log_prob(draws), expected, rtol=1e-10)
    one = {k: v[3] for k, v in draws.items()}
    assert fit.log_prob(one).shape == ()
    np.testing.assert_allclose(fit.log_prob(one), expected[3], rtol=1e-10)
    x = fit.unconstrain(draws)
    np.testing.assert_allclose(x, flat(draws), rtol=1e-10)
    back = fit.constrain(x)
    assert all(np.allclose(back[k], draws[k], rtol=1e-10) for k in draws)
    assert fit.constrain(x[0])["theta"].shape == (3,)


def test_log_prob_on_an_interval_is_the_logit_normal_and_minus_infinity_outside():
    beta = vf.target(
        lambda s: jnp.log(s["p"]) + jnp.log1p(-s["p"]), sites={"p": constraints.unit_interval}
    )
    fit = posterior_of(normal_flow(np.array([0.2]), np.array([1.5])), beta)
    p = np.array([0.01, 0.5, 0.9, -0.2, 1.3])
    with np.errstate(invalid="ignore"):
        expected = stats.norm.logpdf(np.log(p / (1 - p)), 0.2, 1.5) - np.log(p * (1 - p))
    expected[3:] = -np.inf
    np.testing.assert_allclose(fit.log_prob({"p": p}), expected, rtol=1e-9)


def test_log_prob_names_what_is_wrong():
    fit, good = exact_fit(), {"mu": 0.0, "tau": 1.0, "theta": np.zeros(3)}
    for bad, message in (
        ({"mu": 0.0, "tau": 1.0}, "'theta' is missing"),
        (good | {"theta": np.zeros(4)}, r"'theta' must have shape \(3,\)"),
        (good | {"mu": np.nan}, "'mu' is NaN"),
        (good | {"mu": np.zeros(2)}, "different numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            fit.log_prob(bad)
    assert fit.log_prob(good | {"tau": -1.0}) == -np.inf
    with pytest.raises(ValueError, match=r"x must have shape \(5,\)"):
        fit.constrain(np.zeros(4))


@pytest.mark.parametrize("name", ["sample", "resample"])
def test_counts_and_keys_are_checked(name, key):
    draw = getattr(exact_fit(), name)
    for bad in (0, -1, True):
        with pytest.raises(ValueError, match="n must be a positive integer"):
            draw(key, bad)
    with pytest.raises(TypeError):
        draw(key, 2.5)


def test_predictive_agrees_with_the_closed_form(key):
    draws = exact_fit().predictive(key, model, n=2, num_samples=N, batch_size=6000)
    assert {k: v.shape for k, v in draws.items()} == {"shifted": (N, 3), "y": (N, 2)}
    y, sd = np.asarray(draws["y"]), (MU_VAR + 1) ** 0.5
    assert np.abs((y.mean(0) - MU_MEAN) / sd).max() * N**0.5 < 4.5
    assert np.abs((y - MU_MEAN).var(0) / sd**2 - 1).max() * (N / 2) ** 0.5 < 4.5
    # Both columns share mu: their covariance is its variance. The sd of a product of two
    # correlated normals is below sqrt(2) times the product of their sds.
    covariance = np.mean((y[:, 0] - MU_MEAN) * (y[:, 1] - MU_MEAN))
    assert abs(covariance - MU_VAR) < 4.5 * 2**0.5 * sd**2 / N**0.5


def test_predictive_computes_deterministic_sites_anew_and_keeps_the_posterior_draws(key):
    def other(shift):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.deterministic("shifted", mu + shift)

    far = exact_fit().predictive(key, other, 100.0, num_samples=50)["shifted"]
    near = exact_fit().predictive(key, other, 0.0, num_samples=50, batch_size=7)["shifted"]
    np.testing.assert_allclose(far - near, 100.0, rtol=1e-12)
    assert np.abs(near - MU_MEAN).max() < 6 * MU_VAR**0.5


def test_predictive_can_use_corrected_draws(key):
    options = dict(n=1, num_samples=N, batch_size=N)
    raw = wrong_fit().predictive(key, model, **options)["y"].mean()
    corrected = wrong_fit().predictive(key, model, resample=True, **options)["y"].mean()
    error = (MU_VAR + 1) ** 0.5 * N**-0.5
    assert abs(raw - MU_MEAN) > 10 * error
    assert abs(corrected - MU_MEAN) < 4.5 * error


def test_predictive_refuses_by_name(key):
    def known():
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal()), 1.0), obs=1.0)

    def broken():
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal()), jnp.ones(2))).item()

    with pytest.raises(vf.ProgramError, match="known has no site to predict"):
        exact_fit().predictive(key, known, num_samples=5)
    with pytest.raises(vf.ProgramError, match="model broken failed"):
        exact_fit().predictive(key, broken, num_samples=5)
    with pytest.raises(TypeError):
        exact_fit().predictive(key, Y)
    with pytest.raises(ValueError, match="batch_size"):
        exact_fit().predictive(key, model, batch_size=0)


def test_summary_and_text():
    fit = exact_fit()
    table = fit.summary()
    assert list(table)[:3] == ["mu", "tau", "theta[0]"]
    tau, quantiles = stats.lognorm(0.5, scale=np.exp(0.3)), stats.norm.ppf([0.05, 0.5, 0.95])
    expected = [MU_MEAN, SD[0], *(MU_MEAN + SD[0] * quantiles)]
    np.testing.assert_allclose(table["mu"], expected, atol=5 * SD[0] / 100)
    np.testing.assert_allclose(table["tau"].q95, tau.ppf(0.95), rtol=0.03)
    text = str(fit)
    parts = (
        "status ok",
        "ELBO",
        "log evidence",
        "k-hat",
        "made by hand",
        "theta[2]",
        "num_steps 4",
    )
    assert [part for part in parts if part not in text] == []
    assert repr(fit).startswith("Posterior(status='ok'")
    assert "\n" not in repr(fit)
    assert "reason" not in text
    assert "more: summary()" in table.text(2)
    assert len(table.text(2).splitlines()) == 4


def test_a_failed_fit_can_be_printed():
    fit = posterior_of(normal_flow(np.full(2, np.nan), np.ones(2)), vf.Target(lambda x: -x @ x, 2))
    assert fit.status == "failed"
    assert "NaN" in str(fit)


def test_a_caller_in_float32_may_have_a_fit_in_float64(key):
    with jax.enable_x64(False):
        flow = normal_flow(LOC.astype(np.float32), SD.astype(np.float32))
        fit = posterior_of(flow, target(), dtype="float64")
        draws, better = fit.sample(key, 10), fit.resample(key, 10)
        density, x = fit.log_prob(draws), fit.unconstrain(draws)
        forward = fit.predictive(key, model, n=2, num_samples=10)
        for value in (*draws.values(), *better.values(), *forward.values(), density, x):
            assert value.dtype == jnp.float32
        # float32 rounds the densities of the weights at 1e-6; float64 does not
        assert np.ptp(fit._drawer.weighted(flow, key, 100)[1]) < 1e-6
    assert flow.bijection.loc.dtype == jnp.float32


def test_settings_are_told_on_lines_of_readable_length():
    seconds = {"preparation": 1.23456, "training": 2.0}
    words = {f"option_{i}": "x" * 20 for i in range(8)}
    fit = posterior_of(normal_flow(LOC, SD), target(), seconds=seconds, **words, unused=None)
    head = str(fit).split("\n\n")[0]
    assert "seconds (preparation 1.235, training 2)" in head
    assert "unused" not in head
    assert max(map(len, head.splitlines())) <= 100


def test_log_prob_where_supports_are_simplices_or_inside_a_scan(key):
    def walk():
        def step(level, _):
            level = numpyro.sample("level", dist.LogNormal(jnp.log(level), 0.5))
            return level, None

        numpyro.sample("share", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
        scan(step, 1.0, None, length=3)

    free = vf.target(vf.from_numpyro(walk))
    loc, sd = 0.1 * np.arange(5), np.full(5, 0.7)
    fit = posterior_of(normal_flow(loc, sd), free)
    draws = fit.sample(key, 4)
    x = fit.unconstrain(draws)
    # p(v) |dT/dx| = p(x), so log q(v) = log q(x) - log p(x) + log p(v) for any p
    log_p = jax.vmap(vf.from_numpyro(walk).log_prob)(draws)
    expected = stats.norm.logpdf(x, loc, sd).sum(1) - jax.vmap(free.log_prob)(x) + log_p
    np.testing.assert_allclose(fit.log_prob(draws), expected, rtol=1e-9)
