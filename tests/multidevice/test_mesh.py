"""Fits over the devices of a mesh: what they refuse, and that the number of devices changes nothing."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import vflow as vf
from vflow.fit._mesh import Layout

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TARGET = vf.Target(lambda x: -0.5 * (x**2).sum(), dim=2)


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def fits():
    return json.loads(run(HERE / "fits.py", "1x1", "2x4", "8x1", "1x8"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4", "8x1", "1x8"])
def test_draws_losses_and_verdict_do_not_depend_on_the_number_of_devices(fits, mesh):
    one, many = fits["1x1"], fits[mesh]
    np.testing.assert_allclose(many["history"], one["history"], rtol=1e-5)
    np.testing.assert_allclose(many["draws"], one["draws"], rtol=1e-4, atol=1e-5)
    assert many["status"] == one["status"]
    assert abs(many["khat"] - one["khat"]) < 1e-2
    assert abs(many["log_evidence"] - one["log_evidence"]) < 1e-4
    steps = np.diff(one["history"])  # the comparison means something: the loss does move
    assert np.abs(steps).max() > 1e-2


@pytest.mark.parametrize(
    ("mesh", "num_samples", "error", "message"),
    [
        ("devices", 16, TypeError, "mesh must be a jax.sharding.Mesh, .* got str"),
        (("rows",), 16, ValueError, r"axes \('particle', 'data'\), got \('rows',\)"),
    ],
    ids=["string", "other axis"],
)
def test_a_mesh_of_another_kind_is_refused(mesh, num_samples, error, message):
    if isinstance(mesh, tuple):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), mesh)
    with pytest.raises(error, match=message):
        vf.fit(jax.random.key(0), TARGET, mesh=mesh, num_samples=num_samples, progress=False)


class Wide:
    """Stands for a mesh of more devices than there are here."""

    def __init__(self, **shape):
        self.shape, self.axis_names = shape, tuple(shape)


def test_particles_and_rows_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["vflow.fit._mesh"], "Mesh", Wide)
    with pytest.raises(ValueError, match="8 devices, which do not divide num_samples=12; .*=16"):
        Layout(Wide(particle=8), TARGET, 12)


def test_only_the_arguments_of_a_numpyro_model_can_be_spread_as_data():
    from vflow.fit._mesh import _rows

    with pytest.raises(ValueError, match="axis 'data' of mesh needs a program"):
        _rows(TARGET, 2)

    def model(y, weight):
        import numpyro
        import numpyro.distributions as dist

        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=0.0 if y is None else y)

    rows, few = np.arange(6.0), np.ones(2)
    target = vf.target(vf.from_numpyro(model, rows, few))
    assert list(_rows(target, 3)) == [0]
    with pytest.raises(ValueError, match="4 devices, which do not divide the 6 rows"):
        _rows(target, 4)
