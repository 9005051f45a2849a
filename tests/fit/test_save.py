import inspect
import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf
from tests.fit.exact import (
    LOC,
    SD,
    Y,
    exact_fit,
    model,
    normal_flow,
    posterior_of,
    target,
    wrong_fit,
)
from vflow.fit import _save
from vflow.fit._codec import classes, decode, encode

B = vf.bijections
KEY = jax.random.key(0)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "fit.vflow"
    wrong_fit().save(path)
    return path


def assert_same(fit, again, key):
    for name in ("sample", "resample"):
        draws, other = (getattr(p, name)(key, 20) for p in (fit, again))
        assert list(draws) == list(other)
        assert all(np.array_equal(draws[k], other[k]) for k in draws)


def test_a_loaded_posterior_is_the_saved_one_to_the_last_bit(saved, key):
    assert os.listdir(saved.parent) == ["fit.vflow"]
    again = vf.load(saved, vf.from_numpyro(model, y=Y))
    assert_same(wrong_fit(), again, key)
    assert again.verdict == wrong_fit().verdict
    assert again.settings == wrong_fit().settings
    np.testing.assert_array_equal(again.history, wrong_fit().history)
    assert str(again) == str(wrong_fit())


def test_a_failed_fit_with_infinite_and_nan_numbers_can_be_saved(tmp_path):
    nowhere = vf.Target(lambda x: jnp.where(x[0] > 0, jnp.nan, -jnp.inf), 1)
    fit = posterior_of(normal_flow(np.zeros(1), np.ones(1)), nowhere)
    assert fit.status == "failed"
    fit.save(tmp_path / "f")
    again = vf.load(tmp_path / "f", nowhere)
    assert repr(again.verdict) == repr(fit.verdict)  # nan is not equal to itself


def test_float32_caller_keeps_float32_and_draws(tmp_path, key):
    with jax.enable_x64(False):
        fit = posterior_of(normal_flow(LOC.astype("float32"), SD.astype("float32")), target())
        fit.save(tmp_path / "f")
        again = vf.load(tmp_path / "f", target())
        assert again.flow.bijection.loc.dtype == jnp.float32
        assert_same(fit, again, key)
    promoted = vf.load(tmp_path / "f", target())  # the same file in a session of float64
    assert promoted.flow.bijection.loc.dtype == jnp.float64
    np.testing.assert_array_equal(promoted.flow.bijection.loc, LOC.astype("float32"))


FLOWS = {
    "low rank": lambda: vf.flows.gaussian(KEY, 4, covariance="low_rank", rank=2),
    "full": lambda: vf.flows.gaussian(KEY, 4, covariance="full"),
    "coupling": lambda: vf.flows.coupling(KEY, 4, num_layers=4, hidden=(8,), condition_dim=2),
    "mixed": lambda: vf.distributions.Flow(
        vf.distributions.StudentT(jnp.array([3.0, jnp.inf, 5.0]), trainable=True),
        B.Chain(
            [
                B.Freeze(B.LULinear(3, key=KEY)),
                B.Invert(B.Elementwise(KEY, 3, transformer=B.SinhArcsinhTransformer(3.0))),
                B.Permute(np.array([2, 0, 1])),
                B.Identity((3,)),
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_structure_survives_json(name, tmp_path):
    flow = FLOWS[name]()
    flow = jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, flow)
    code = json.loads(json.dumps(encode(flow)))
    _save.write_state(tmp_path / "f", {"code": code}, flow, kind="test")
    header, leaves = _save.read_file(tmp_path / "f", "test")
    again = _save.restore(tmp_path / "f", leaves, decode(header["code"]))
    assert bool(eqx.tree_equal(flow, again, typematch=True))


def test_every_public_module_has_a_name_in_files():
    known = set(classes().values())
    public = [
        thing
        for package in (vf.bijections, vf.distributions)
        for thing in (getattr(package, name) for name in package.__all__)
        if inspect.isclass(thing) and issubclass(thing, eqx.Module)
    ]
    assert len(public) > 10
    assert [thing for thing in public if thing not in known] == []
    ours = [cls for cls in known if cls.__module__.startswith("vflow.")]
    assert len(ours) == len(known) == len(classes())


def test_files_name_no_other_class():
    for name in ("os.system", "fit.Posterior", "bijections.Nonsense", "builtins.eval"):
        with pytest.raises(ValueError, match="unknown class"):
            decode({"module": name, "fields": {}})


class Doubling(B.AbstractBijection):
    """A module of the user's own."""

    loc: jax.Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        return 2 * x + self.loc, jnp.full((), x.size * jnp.log(2.0))

    def inverse_and_log_det(self, y, condition=None):
        return (y - self.loc) / 2, jnp.full((), -y.size * jnp.log(2.0))


def test_a_flow_of_the_users_own_needs_a_template(tmp_path, key):
    def flow(loc):
        return vf.distributions.Flow(vf.distributions.Normal(5), Doubling(jnp.full(5, loc), (5,)))

    fit = posterior_of(flow(0.3), target())
    fit.save(tmp_path / "f")
    with pytest.raises(ValueError, match=r"flow\.bijection is a .*Doubling.*flow="):
        vf.load(tmp_path / "f", target())
    assert_same(fit, vf.load(tmp_path / "f", target(), flow=flow(0.0)), key)
    with pytest.raises(ValueError, match="does not fit"):
        vf.load(tmp_path / "f", target(), flow=normal_flow(np.zeros(5), np.ones(5)))


def header_of(path):
    lines = path.read_bytes().split(b"\n", 2)
    return lines[0].split(b" "), json.loads(lines[1]), lines[2]


def test_damage_is_named(saved):
    whole, given = saved.read_bytes(), target()
    flipped = bytearray(whole)
    flipped[-10] ^= 1
    newer = whole.replace(b"vflow posterior 1 ", b"vflow posterior 2 ", 1)
    for content, message in (
        (whole[:-1], "incomplete"),
        (whole[:100], "incomplete|beginning is lost"),
        (whole + b"x", "incomplete"),
        (bytes(flipped), "damaged"),
        (newer, "format 2.*update vflow"),
        (b"", "not written by vflow"),
        (b"PK\x03\x04" + bytes(500), "not written by vflow"),
        (b'{"a": 1}\n', "not written by vflow"),
        (whole.replace(b"vflow posterior", b"vflow checkpoint", 1), "holds a checkpoint"),
    ):
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            vf.load(saved, given)
        assert str(saved) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        vf.load(saved.parent / "nowhere", given)


def test_another_model_or_other_data_is_refused(saved):
    def renamed(y):
        model(y=y)

    other = vf.Target(lambda x: -jnp.sum(x**2), 5)
    with pytest.raises(ValueError, match=r"another model.*mu.*theta.*x \(5,\)"):
        vf.load(saved, other)
    with pytest.raises(ValueError, match=r"other data.*'y'"):
        vf.load(saved, vf.from_numpyro(model, y=Y + 1.0))
    with pytest.raises(ValueError, match=r"other data.*'y'"):
        vf.load(saved, vf.from_numpyro(model, n=3, y=Y[:3]))
    assert vf.load(saved, vf.from_numpyro(renamed, Y)).status == wrong_fit().status


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(saved, monkeypatch, step):
    before = saved.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_save.os, step, full)
        with pytest.raises(OSError, match="No space"):
            exact_fit().save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    exact_fit().save(saved)
    assert saved.read_bytes() != before


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        _save.write_state(tmp_path / "f", {"a": object()}, (), kind="test")
    assert os.listdir(tmp_path) == []


def test_state_of_any_tree_comes_back_as_it_was(tmp_path):
    def tree(key, one):
        return {
            "key": jax.random.split(jax.random.key(key), 2),
            "half": jnp.full(3, one, jnp.bfloat16),
            "counts": (jnp.full(4, one, jnp.int32), np.full(2, one), int(one), float(one), None),
            "flag": jnp.array([True, one > 0]),
            "name": "static",
        }

    path, old = tmp_path / "s", tree(3, 1)
    _save.write_state(path, {"step": np.int64(3), "x": jnp.ones(2)}, old, kind="checkpoint")
    header, again = _save.read_state(path, tree(0, 0), kind="checkpoint")
    assert header == {"step": 3, "x": [1.0, 1.0]}
    np.testing.assert_array_equal(*(jax.random.key_data(t.pop("key")) for t in (old, again)))
    assert bool(eqx.tree_equal(old, again, typematch=True))
    assert again["half"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"does not fit.*flag"):
        _save.read_state(path, tree(0, 0) | {"flag": jnp.zeros(3, bool)}, kind="checkpoint")
    fewer = {k: v for k, v in tree(0, 0).items() if k != "key"}
    with pytest.raises(ValueError, match="more arrays"):
        _save.read_state(path, fewer, kind="checkpoint")


def funnel(y=None):
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("group", 3):
        theta = numpyro.sample("theta", dist.Normal(0.0, tau))
        numpyro.sample("y", dist.Normal(theta, 3.0), obs=y)


FUNNEL = vf.from_numpyro(funnel, y=np.array([0.5, -1.0, 2.0]))


def test_a_decentred_fit_comes_back_from_file(tmp_path):
    """Draws and densities are those of the fit that was saved; weights do not depend on coordinates."""
    fit = vf.fit(KEY, FUNNEL, num_steps=2, num_samples=8, progress=False)
    assert fit.settings["decentred"] == ["theta"]
    fit.save(tmp_path / "fit")
    back = vf.load(tmp_path / "fit", FUNNEL)
    values = fit.sample(jax.random.key(1), 3)
    jax.tree.map(np.testing.assert_array_equal, values, back.sample(jax.random.key(1), 3))
    np.testing.assert_array_equal(fit.log_prob(values), back.log_prob(values))
    plain = vf.target(FUNNEL)

    @jax.jit
    def log_joint(values):
        x = plain.unconstrain(values)
        jacobian = sum(v for k, v in plain.terms(x).items() if k.startswith("jacobian"))
        return plain.log_prob(x) - jacobian

    on = vf.fit(KEY, FUNNEL, init=back, num_steps=1, num_samples=4096, progress=False)
    assert on.settings["decentred"] == ["theta"] and on.settings["preconditioner"] == "none"
    assert abs(on.history[0] - fit.elbo.value) < 5 * fit.elbo.standard_error * (16384 / 4096) ** 0.5
    for change, message in (
        ({"program_or_target": target()}, "fit of another model"),
        ({"flow": fit.flow}, "pass no flow"),
        ({"precondition": None}, "pass no flow"),
    ):
        with pytest.raises(ValueError, match=message):
            vf.fit(KEY, **({"program_or_target": FUNNEL, "init": back} | change))
    z = back.unconstrain(values)
    log_w = jax.vmap(back.target.log_prob)(z) - jax.vmap(back.flow.log_prob)(z)
    np.testing.assert_allclose(jax.vmap(log_joint)(values) - fit.log_prob(values), log_w, rtol=1e-8)


@pytest.mark.slow
def test_a_decentred_fit_goes_on_from_its_checkpoint(tmp_path):
    options = {"num_steps": 200, "num_samples": 8, "progress": False}
    whole = vf.fit(KEY, FUNNEL, **options)
    options["checkpoint"] = tmp_path / "steps"
    vf.fit(KEY, FUNNEL, **options, callback=lambda report: report.step >= 100)
    rest = vf.fit(KEY, FUNNEL, **options)
    assert rest.settings["decentred"] == ["theta"]
    np.testing.assert_array_equal(whole.history, rest.history)
    draws = (fit.sample(jax.random.key(1), 3) for fit in (whole, rest))
    jax.tree.map(np.testing.assert_array_equal, *draws)


def test_a_missing_folder_is_named(tmp_path):
    for write in (exact_fit().save, exact_fit().report):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
            write(tmp_path / "missing" / "file")
