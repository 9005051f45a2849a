"""A stochastic flow through vf.fit: the target is passed, the verdict holds, the file too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf

S = vf.flows.stochastic


def log_density(x):
    """A banana whose coordinates have different scales; log Z = log(2 pi 3)."""
    z = jnp.stack([x[0] / 3.0, x[1] - 0.3 * (x[0] / 3.0) ** 2])
    return -0.5 * jnp.sum(z**2)


@pytest.fixture(scope="module")
def fitted():
    q = vf.flows.stochastic_flow(
        jax.random.key(0), 2, [S.UnderdampedLangevin(num_steps=2, step_size=0.4)] * 2
    )
    target = vf.Target(log_density, dim=2)
    return vf.fit(jax.random.key(1), target, flow=q, num_steps=100, num_samples=32, progress=False)


def test_fit_takes_a_stochastic_flow(fitted):
    assert fitted.status == "ok", fitted.reasons
    assert abs(float(fitted.log_evidence) - np.log(6 * np.pi)) < 4 * fitted.log_evidence[1]
    assert fitted.log_evidence[1] < 0.02
    assert "no path gradient" in "".join(fitted.settings["notes"])
    draws = fitted.resample(jax.random.key(2), 4000)["x"]
    assert abs(float(jnp.std(draws[:, 0])) - 3.0) < 0.15
    with pytest.raises(vf.ProgramError, match="estimate_log_q"):
        fitted.log_prob({"x": jnp.zeros(2)})


def test_a_saved_stochastic_flow_comes_back(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    again = vf.load(tmp_path / "fit", fitted.target)
    key = jax.random.key(3)
    np.testing.assert_array_equal(again.sample(key, 5)["x"], fitted.sample(key, 5)["x"])


@pytest.mark.slow
def test_a_detached_layer_in_the_middle_is_refused_by_fit():
    blocks = [
        S.couplings(num_layers=2),
        S.MALA(num_steps=1, step_size=0.1),
        S.couplings(num_layers=2),
    ]
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks)
    with pytest.raises(vf.ProgramError, match='grad="score"'):
        vf.fit(
            jax.random.key(0), log_density, flow=q, num_steps=1, precondition=None, progress=False
        )
