import builtins
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.fit.exact import (
    LOC,
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
from vflow.fit._svg import ticks


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


class _Page(HTMLParser):
    """Texts, links and unclosed tags of a page."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_report_is_one_page_that_needs_nothing_else(tmp_path):
    exact_fit().report(tmp_path / "fit.html")
    page = _Page((tmp_path / "fit.html").read_text())
    assert page.open == [] and page.links == []
    text = " ".join(page.texts)
    assert "url(" not in text and "@import" not in text and "nan" not in text.lower().split()
    for words in ("ok", "made by hand", "1 steps were skipped", "k-hat", f"jax {jax.__version__}"):
        assert words in text
    assert {"mu", "tau", "theta[2]", "shifted[0]"} <= set(page.texts)
    # history, weights, eight marginals, twelve pairs of the first four coordinates
    assert page.tags.count("figure") == 2 + 8 + 12


def test_report_of_a_bad_fit_says_so(tmp_path):
    fit = posterior_of(normal_flow(LOC + SD, 0.3 * SD), exact_fit().target)
    fit.report(tmp_path / "fit.html")
    text = " ".join(_Page((tmp_path / "fit.html").read_text()).texts)
    assert fit.status != "ok" and fit.status in text
    assert all(reason in text for reason in fit.reasons)
    broken = posterior_of(
        normal_flow(np.array([0.0, np.nan]), np.ones(2)), vf.Target(lambda x: -jnp.sum(x**2), 2)
    )
    broken.report(tmp_path / "broken.html")
    text = " ".join(_Page((tmp_path / "broken.html").read_text()).texts)
    assert "failed" in text and "The weights are not usable" in text
    assert (
        "nan" not in (tmp_path / "broken.html").read_text().split("Marginals")[1].split("Sites")[0]
    )


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0, 4) == [0.0, 0.5, 1.0]
    assert ticks(-31.2, -28.9, 4) == [-31.0, -30.0, -29.0]
    for low, high in ((1e-9, 2e-9), (-1e6, 3e7), (99.99, 100.01)):
        found = ticks(low, high, 4)
        assert 2 <= len(found) <= 5 and low <= found[0] and found[-1] <= high * (1 + 1e-12)
