"""The report must see a lost mode where ELBO, ESS and the standard error look excellent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf

S = vf.flows.stochastic
LOG_Z, RIGHT = 10.2934797, 0.8443071


def double_well(x):
    return 0.5 * x[0] + 6.0 * x[0] ** 2 - x[0] ** 4 - 0.5 * x[1] ** 2


def right(x):
    return x[0] > 0


def exact_draws(n):
    """By the inverse of the tabulated distribution function."""
    grid = np.linspace(-3.5, 3.5, 70_001)
    mass = np.cumsum(np.exp(0.5 * grid + 6 * grid**2 - grid**4))
    rng = np.random.default_rng(0)
    first = np.interp(rng.uniform(size=n), mass / mass[-1], grid)
    return np.stack([first, rng.standard_normal(n)], axis=1)


@pytest.fixture(scope="module")
def collapsed():
    """On the right well, with an annealing layer behind: what reverse KL training ends in."""
    affine = vf.bijections.Affine(jnp.array([1.75, 0.0]), jnp.array([0.22, 1.0]))
    q = vf.flows.stochastic_flow(
        jax.random.key(0), 2, [affine, S.UnderdampedLangevin(num_steps=2, step_size=0.1)]
    )
    reference = exact_draws(400)
    return vf.diagnostics.weights_report(
        jax.random.key(1), q, double_well, label=right, reference=reference
    )


def test_the_weights_alone_see_nothing(collapsed):
    assert collapsed.ess_fraction > 0.85
    assert float(collapsed.log_evidence) == pytest.approx(LOG_Z + np.log(RIGHT), abs=0.01)
    assert collapsed.log_evidence.standard_error < 0.005
    assert collapsed.labels[True].raw == 1.0


def test_the_report_says_that_a_mode_was_lost(collapsed):
    text = str(collapsed)
    assert "a mode was lost" in text and "upper bound" in text
    assert collapsed.eubo.value - collapsed.elbo.value > 10
    assert collapsed.labels[False].elsewhere.value == pytest.approx(1 - RIGHT, abs=0.06)
    probe = collapsed.probe_log_evidence
    assert abs(probe.value - LOG_Z) < 4.5 * probe.standard_error


@pytest.mark.slow
def test_a_family_with_both_modes_is_not_accused():
    blocks = [S.UnderdampedLangevin(num_steps=4, step_size=0.12)] * 8
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks)
    report = vf.diagnostics.weights_report(jax.random.key(1), q, double_well, label=right)
    assert report.warnings == ()
    assert abs(float(report.log_evidence) - LOG_Z) < 4.5 * report.log_evidence.standard_error
    weighted = report.labels[True].weighted
    assert abs(weighted.value - RIGHT) < 4.5 * weighted.standard_error
    assert weighted.standard_error < 0.01
    assert report.eubo is None


@pytest.mark.slow
def test_the_bounds_bracket_the_evidence():
    flow = vf.distributions.Flow(
        vf.distributions.Normal(1), vf.bijections.Affine(jnp.zeros(1), 1.2 * jnp.ones(1))
    )
    target = lambda x: -0.5 * jnp.sum(x**2)
    y = np.random.default_rng(1).standard_normal((4000, 1))
    report = vf.diagnostics.weights_report(jax.random.key(0), flow, target, reference=y)
    truth = 0.5 * np.log(2 * np.pi)
    above, below = np.log(1.2) + (1.2**-2 - 1) / 2, np.log(1.2) + (1 - 1.2**2) / 2
    for found, wanted in (
        (report.eubo, truth + above),
        (report.elbo, truth + below),
        (report.reverse_log_evidence, truth),
        (report.log_evidence, truth),
    ):
        assert abs(found.value - wanted) < 4.5 * found.standard_error
        assert found.standard_error < 0.01
    with pytest.raises(ValueError, match="reference"):
        vf.diagnostics.weights_report(jax.random.key(0), flow, target, reference=y[:, 0])
