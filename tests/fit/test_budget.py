"""What a fit may spend, what it tries next, and whether that is kept."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import vflow as vf
from vflow._core import combine, partition
from vflow.fit._budget import Budget, Clock, budget_of
from vflow.fit._ladder import better, grown, next_remedy
from vflow.fit._lbfgs import climb
from vflow.fit._recipe import default_flow
from vflow.fit._verdict import judge
from vflow.fit._warm_start import reweighed

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("value", ["huge", 0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="budget"):
        budget_of(value)


@pytest.mark.parametrize("value", [None, True, (1,)])
def test_a_budget_of_another_type_is_refused(value):
    with pytest.raises(TypeError, match="budget"):
        budget_of(value)


def test_budgets_grow_and_seconds_have_a_clock():
    quick, default, thorough = map(budget_of, ("quick", "default", "thorough"))
    assert quick.num_steps < default.num_steps < thorough.num_steps
    assert quick.rounds == 1 < default.rounds < thorough.rounds
    assert quick.seconds is default.seconds is thorough.seconds is None
    assert budget_of(3).seconds == 3.0
    assert not Clock(None).over() and Clock(0.0).over()
    assert Clock(100.0).allows(50.0) and not Clock(100.0).allows(101.0)


def banana(x):
    return -0.5 * x[0] ** 2 - 0.5 * (x[1] - x[0] ** 2) ** 2 / 0.04


def test_seconds_end_training_after_a_chunk():
    flow = vf.flows.gaussian(jax.random.key(0), 2)
    options = {"flow": flow, "precondition": None, "num_samples": 8, "progress": False}
    target = vf.Target(banana, dim=2)
    posterior = vf.fit(jax.random.key(1), target, budget=1e-3, **options)
    assert len(posterior.history) == 100 and posterior.settings["rounds"] == 1
    assert any("clock after 100 of 2000 steps" in note for note in posterior.settings["notes"])


def verdict(log_w, **options):
    return judge(np.asarray(log_w), **options)


GOOD = verdict(0.3 * RNG.standard_normal(4096))
POOR = verdict(2.0 * RNG.standard_normal(4096))
HEAVY = verdict(0.9 * RNG.standard_exponential(4096))
SLIVER = verdict(np.log1p(1e-4 * np.expm1(1.2 * RNG.standard_exponential(4096))))


def test_remedies_answer_the_verdict():
    assert GOOD.status == "ok" and POOR.ess_fraction < 0.1 and HEAVY.khat > 0.7
    ask = {"ours": True, "bent": False, "heavy": lambda: [2.0, None]}
    assert next_remedy(HEAVY, ["first"], **ask) == {"name": "tails", "df": [2.0, None]}
    light = ask | {"heavy": lambda: None}
    assert next_remedy(HEAVY, ["first"], **light) == {"name": "particles"}
    assert SLIVER.khat > 0.7 and SLIVER.ess_fraction > 0.9
    assert next_remedy(SLIVER, ["first"], **light) == {"name": "weights"}
    assert next_remedy(SLIVER, ["first", "weights"], **light) == {"name": "particles"}
    assert next_remedy(SLIVER, ["first"], **light | {"ours": False}) == {"name": "particles"}
    tried = ["first"]
    while (remedy := next_remedy(POOR, tried, **light)) is not None:
        tried.append(remedy["name"])
    assert tried == ["first", "particles", "spline", "particles"]
    own = light | {"ours": False}
    assert next_remedy(POOR, ["first", "particles"], **own) == {"name": "particles"}
    assert next_remedy(POOR, ["first", "particles", "particles"], **own) is None
    missing = verdict(0.3 * RNG.standard_normal(4096), cover=vf.Estimate(2.0, 0.01))
    assert next_remedy(missing, ["first"], **light) == {"name": "cover"}
    assert next_remedy(missing, ["first"], **own) == {"name": "particles"}


def test_a_round_is_kept_only_if_the_verdict_improves():
    assert better(GOOD, POOR) and not better(POOR, GOOD)
    worse = GOOD._replace(ess_fraction=GOOD.ess_fraction - 0.1)
    assert better(GOOD, worse) and not better(worse, GOOD)
    # Mass that was missed counts more than the evenness of the weights.
    richer = worse._replace(log_evidence=vf.Estimate(GOOD.log_evidence.value + 0.5, 0.01))
    assert better(richer, GOOD) and not better(GOOD, richer)
    unsure = worse._replace(log_evidence=vf.Estimate(GOOD.log_evidence.value + 0.5, 0.4))
    assert not better(unsure, GOOD)


class Mode:
    def __init__(self, elbo, loc):
        self.origin, self.elbo = "start 3", elbo
        self.loc, self.tril = np.full(2, loc), 0.5 * np.eye(2)


def test_a_mode_that_another_start_found_must_get_its_share():
    draws, log_w = RNG.standard_normal((4096, 2)), 0.1 * RNG.standard_normal(4096)

    def heard(elbo, loc):
        return judge(log_w, draws=draws, modes=[Mode(elbo, loc)])

    assert heard(-1.0, 8.0).status == "suspect"
    assert "start 3 leads to another mode" in heard(-1.0, 8.0).reasons[0]
    assert heard(-6.0, 8.0).status == "ok"  # a quarter of a per cent
    assert heard(-1.0, 0.5).status == "ok"  # the fit draws there
    names = [w.name for w in heard(-1.0, 8.0).witnesses if w.agrees is False]
    assert names == ["modes of other starts"]


def test_halves_that_disagree_and_a_wide_gap_are_told():
    log_w = np.where(np.arange(4096) % 2, 0.0, -0.5)
    assert any("two halves" in reason for reason in judge(log_w).reasons)
    wide = judge(3.0 * RNG.standard_normal(4096))
    assert any("nats apart" in reason for reason in wide.reasons)
    assert any(w.name == "evidence and bound" and w.agrees is False for w in wide.witnesses)


def rosenbrock(x):
    value = -np.sum(100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2, axis=1)
    grad = np.zeros_like(x)
    bend = x[:, 1:] - x[:, :-1] ** 2
    grad[:, :-1] += 400 * x[:, :-1] * bend + 2 * (1 - x[:, :-1])
    grad[:, 1:] -= 200 * bend
    return value, grad


def test_starts_climb_side_by_side_as_each_alone():
    starts = RNG.uniform(-2, 2, (6, 3))
    modes = climb(rosenbrock, starts, 300)
    assert np.abs(rosenbrock(modes)[1]).max() < 1e-3
    alone = np.concatenate([climb(rosenbrock, start[None], 300) for start in starts])
    assert np.allclose(modes, alone, atol=1e-6)


def test_an_ill_scaled_quadratic_and_a_cliff_are_climbed():
    scale = np.logspace(-3, 3, 12)
    peak = RNG.standard_normal(12)

    def quadratic(x):
        white = (x - peak) / scale
        return -0.5 * (white**2).sum(axis=1), -white / scale

    found = climb(quadratic, RNG.standard_normal((3, 12)), 400)
    assert np.abs((found - peak) / scale).max() < 0.1

    def cliff(x):  # log x - x, NaN where x is not positive
        with np.errstate(invalid="ignore", divide="ignore"):
            return (np.log(x) - x).sum(axis=1), 1 / x - 1

    assert np.allclose(climb(cliff, np.array([[1e-3, 40.0], [3.0, 0.5]])), 1.0, atol=1e-4)


def test_a_gaussian_target_is_not_trained_and_a_bent_one_is():
    gaussian = vf.Target(lambda x: -0.5 * jnp.sum((x / 3.0) ** 2), dim=2)
    posterior = vf.fit(jax.random.key(0), gaussian, progress=False)
    assert posterior.status == "ok" and len(posterior.history) == 0
    assert abs(posterior.log_evidence.value - np.log(2 * np.pi * 9.0)) < 1e-3
    assert any("nothing to train" in note for note in posterior.settings["notes"])


def test_a_round_that_breaks_down_leaves_the_best_flow_before_it():
    target = vf.Target(lambda x: banana(10 * x), dim=2)

    def nan(flow, remedy, key):
        params, static = partition(flow)
        return combine(jax.tree.map(lambda leaf: leaf * jnp.nan, params), static)

    options = {"precondition": None, "progress": False}
    with (
        mock.patch("vflow.fit._fit.budget_of", return_value=Budget(20, 8, 2)),
        mock.patch("vflow.fit._run.next_remedy", return_value={"name": "tails"}),
        mock.patch("vflow.fit._run.grown", nan),
    ):
        posterior = vf.fit(jax.random.key(0), target, **options)
    assert posterior.status != "ok" and np.isfinite(posterior.elbo.value)
    assert posterior.settings["tried"] == ["first"] and len(posterior.history) == 20
    (note,) = (note for note in posterior.settings["notes"] if "Round 2" in note)
    assert "power tails, and broke down: value or gradient" in note and "site" not in note


@pytest.mark.slow
def test_growing_a_flow_changes_little():
    flow = default_flow(jax.random.key(0), 3)
    keys = jax.random.split(jax.random.key(1), 256)
    before = jax.vmap(flow.sample)(keys)
    bent = grown(flow, {"name": "spline"}, jax.random.key(2))
    assert jnp.allclose(jax.vmap(bent.sample)(keys), before, atol=1e-9)
    heavy = grown(flow, {"name": "tails", "df": [2.0, None, 3.0]}, jax.random.key(2))
    x = jax.vmap(heavy.sample)(keys)
    assert jnp.allclose(x[:, 1], before[:, 1])
    inside = jnp.abs(before[:, 0]) < 1
    assert jnp.abs(x - before)[inside, 0].max() < 0.1


@pytest.mark.slow
def test_power_tails_are_answered_by_a_layer_that_has_them():
    def cauchy(x):
        return -jnp.sum(jnp.log1p(x**2)) - 6 * jnp.log(jnp.pi)

    # With two coordinates, 2000 steps without the layer have a k-hat between 0.6 and 0.95.
    posterior = vf.fit(jax.random.key(0), vf.Target(cauchy, dim=6), progress=False)
    assert posterior.status == "ok", str(posterior)
    assert abs(posterior.log_evidence.value) < 0.01
    assert "tails" in posterior.settings["tried"]


@pytest.mark.slow
def test_an_escalated_fit_resumes_to_the_same_posterior(tmp_path):
    target = vf.Target(lambda x: banana(x[:2]) - 0.5 * jnp.abs(x[2]), dim=3)
    small = Budget(200, 8, 3)
    run = {"precondition": None, "progress": False}
    with mock.patch("vflow.fit._fit.budget_of", return_value=small):
        whole = vf.fit(jax.random.key(3), target, **run)
        assert whole.settings["rounds"] == 3
        calls = []

        def stop(progress):
            calls.append(progress.step)
            if len(calls) == 3:  # in the middle of the second round; the third has no steps
                raise RuntimeError("killed")

        path = tmp_path / "fit.vflow"
        with pytest.raises(RuntimeError, match="killed"):
            vf.fit(jax.random.key(3), target, checkpoint=path, callback=stop, **run)
        again = vf.fit(jax.random.key(3), target, checkpoint=path, **run)
    assert np.array_equal(whole.history, again.history)
    assert whole.verdict == again.verdict
    assert whole.settings["notes"] == again.settings["notes"]


@pytest.mark.slow
def test_a_sliver_of_the_mass_is_seen_by_likelihood_on_weighted_draws():
    """A percent in an exponential tail: the reverse divergence hardly feels it, the weights do."""

    def log_density(x):
        bulk = jax.scipy.stats.norm.logpdf(x).sum()
        tail = jax.scipy.stats.expon.logpdf(-1 - x[0], scale=3.0)
        return jnp.logaddexp(
            np.log(0.99) + bulk, np.log(0.01) + tail + jax.scipy.stats.norm.logpdf(x[1])
        )

    target = vf.Target(log_density, dim=2)
    start = default_flow(jax.random.key(0), 2)  # draws from the standard normal

    def share(flow):
        draws = jax.jit(jax.vmap(flow.sample))(jax.random.split(jax.random.key(1), 65536))
        return float((draws[:, 0] < -4.0).mean())

    truth = 0.99 * norm.cdf(-4.0) + 0.01 * np.exp(-3.0 / 3.0)
    assert share(start) < 0.05 * truth
    assert 0.3 * truth < share(reweighed(start, target, jax.random.key(2))) < 1.2 * truth


def test_a_heavy_tail_of_nearly_equal_weights_is_no_failure():
    """A nearly perfect fit: k-hat sees the shape of excesses that hold no mass."""
    excess = np.random.default_rng(1).pareto(1 / 1.5, 16384)
    small, large = (judge(np.log1p(scale * excess)) for scale in (1e-8, 1e-2))
    assert small.khat > 1 and large.khat > 1
    assert small.ess_fraction > 0.9999 and large.ess_fraction < 0.5
    assert small.status == "suspect" and large.status == "failed"
