import builtins

import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.fit.exact import (
    LOG_EVIDENCE,
    MU_MEAN,
    SD,
    Y,
    exact_fit,
    normal_flow,
    posterior_of,
    wrong_fit,
)
from vflow.diagnostics import ess_fraction
from vflow.fit._export import _dims


def test_the_tree_has_plates_as_dimensions_data_weights_and_verdict(key):
    tree = exact_fit().to_arviz(key, n=500)
    assert tree["posterior"].theta.dims == ("chain", "draw", "school")
    assert tree["posterior"].shifted.dims == ("chain", "draw", "school")
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 500, "school": 3}
    np.testing.assert_array_equal(tree["observed_data"].y, Y)
    assert tree["observed_data"].y.dims == ("row",)
    np.testing.assert_allclose(tree["sample_stats"].log_weight, LOG_EVIDENCE, rtol=1e-9)
    assert tree.attrs["status"] == "ok"
    assert tree["posterior"].attrs["khat"] == exact_fit().khat
    assert abs(float(tree["posterior"].mu.mean()) - MU_MEAN) < 4.5 * SD[0] / 500**0.5


def test_weights_belong_to_the_draws(key):
    tree = wrong_fit().to_arviz(key, n=4000)
    log_w = tree["sample_stats"].log_weight.values[0]
    mu = tree["posterior"].mu.values[0]
    weights = np.exp(log_w - log_w.max())
    assert abs(np.average(mu, weights=weights) - MU_MEAN) < 4.5 * SD[0] / (4000 * 0.1) ** 0.5
    assert abs(mu.mean() - MU_MEAN) > 0.4 * SD[0]
    np.testing.assert_allclose(ess_fraction(log_w), wrong_fit().ess_fraction, rtol=0.2)


def test_attributes_are_of_types_that_netcdf_has(key):
    attrs = wrong_fit().to_arviz(key, n=10).attrs
    assert {type(value) for value in attrs.values()} <= {str, float, int}
    assert attrs["inference_library"] == "vflow"


def test_a_bare_density_has_no_data(key):
    fit = posterior_of(normal_flow(np.zeros(2), np.ones(2)), vf.Target(lambda x: -0.5 * x @ x, 2))
    tree = fit.to_arviz(key, n=20)
    assert set(tree.children) == {"posterior", "sample_stats"}
    assert tree["posterior"].x.dims == ("chain", "draw", "x_dim_0")


def test_plate_names_that_clash_are_replaced():
    shapes = {"a": (3,), "b": (3, 3), "c": (4,), "d": (2,)}
    plates = {"a": ("p",), "b": ("p", "p"), "c": ("p",), "d": ("draw",)}
    expected = {"a": ["p"], "b": ["p", "b_dim_1"], "c": ["c_dim_0"], "d": ["d_dim_0"]}
    assert _dims(shapes, plates) == expected


def test_plot_writes_a_figure(tmp_path):
    figure = exact_fit().plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["objective", "mu", "tau"]
    steps, values = figure.axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [0, 2, 3])  # the skipped step is left out
    np.testing.assert_array_equal(values, [-9.0, -7.5, -7.0])


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"vflow-jax\[plots\]"):
        exact_fit().plot()


def test_a_fit_with_infinite_draws_can_be_plotted_and_exported(key):
    fit = posterior_of(
        normal_flow(np.array([0.0, np.nan]), np.ones(2)), vf.Target(lambda x: -jnp.sum(x**2), 2)
    )
    fit.plot()
    assert fit.to_arviz(key, n=3).attrs["status"] == "failed"
