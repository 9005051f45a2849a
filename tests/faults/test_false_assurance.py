"""The verdict catches fits that are wrong, and leaves alone those that are right."""

import jax
import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import false_assurance as study
from vflow.fit import _precondition
from vflow.fit._verdict import judge

SITES = [study.Site("a", 0, 1), study.Site("b", 1, 3)]


NORMAL = stats.norm()


def verdict(q, p=NORMAL, n=16384, seed=0):
    """On draws of a law q for the third coordinate, where the truth is p; the others are right."""
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal((n, 3))
    draws[:, 2] = q.rvs(n, random_state=rng)
    log_w = p.logpdf(draws[:, 2]) - q.logpdf(draws[:, 2])
    return judge(log_w, draws=draws, sites=SITES)


@pytest.mark.parametrize("scale", [1.4, 2.0, 0.72])
def test_a_wrong_spread_is_seen_in_one_coordinate(scale):
    """Too wide a fit has light weights: k-hat and ESS alone would call it ok."""
    found = verdict(stats.norm(scale=scale))
    assert found.ess_fraction > 0.4 and found.status == "suspect"
    objection = [reason for reason in found.reasons if "plain draws are off" in reason]
    assert len(objection) == 1 and "of 'b'" in objection[0] and "resample" in objection[0]


def test_a_wrong_mean_is_seen_and_a_small_error_is_not():
    assert "plain draws are off" in verdict(stats.norm(0.35, 1.1)).reasons[0]
    for q in (stats.norm(), stats.norm(0.1, 1.1), stats.norm(scale=1.2)):
        assert verdict(q).status == "ok"


def test_moments_that_hang_on_a_few_draws_prove_nothing():
    """The variance of t(2.2) draws is noise, and so are the weighted moments of a few draws."""
    heavy = stats.t(2.2)
    assert [verdict(heavy, heavy, seed=seed).status for seed in range(5)] == ["ok"] * 5
    few = [verdict(stats.norm(scale=1.1), n=300, seed=seed) for seed in range(20)]
    assert not any("plain draws" in " ".join(found.reasons) for found in few)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_wrong_fits_are_not_called_ok_and_right_ones_are(monkeypatch):
    """Eight flows of two coordinates: forty verdicts on right ones, forty on spoilt ones."""
    monkeypatch.setattr(_precondition, "_Density", study.SharedDensity)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        records = study.study(2, list(study.KINDS), seed=2)
    assert len(records) == 80
    told = study.table(records)

    def share(chosen, status):
        return sum((r["status"] == "ok") == (status == "ok") for r in chosen) / len(chosen)

    wrong = [r for r in records if r["way"] != "right" and r["off"]]
    seen = [r for r in wrong if r["way"] in study.BY_WEIGHTS]
    missed = [r for r in wrong if r["way"] == "mode"]
    right = [r for r in records if r["way"] == "right" and not r["off"]]
    assert len(seen) > 20 and len(missed) > 5 and len(right) > 30, told
    assert share(seen, "not ok") >= 0.95, told
    assert share(missed, "not ok") >= 0.75, told
    assert share(right, "ok") >= 0.75, told
