"""Couplings, tails and the Gaussian at the mode: the map, what is trained, and the hardest fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow as vf

DF = np.array([0.5, np.inf, 3.0])
LOC = np.array([1.0, -2.0, 0.5])
TRIL = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-3.0, 0.2, 1.0]])


def _flow(**options):
    options = {"df": DF, "loc": LOC, "tril": TRIL, "num_layers": 2, "hidden": (4,)} | options
    return vf.flows.heavy_tail(jax.random.key(0), 3, **options)


def test_the_start_is_the_formula():
    """Weights start at a half on the identity and a quarter on each side."""
    flow = _flow()

    def power(z, tail):
        return np.expm1(-tail * np.log(2 * scipy.stats.norm.sf(z))) / tail

    z = np.array([-2.5, 0.7, 1.9])
    tail = 1 / DF[[0, 2]]
    heavy = z[[0, 2]]
    inner = z.copy()
    inner[[0, 2]] = 0.5 * heavy + 0.25 * np.sqrt(np.pi / 2) * (
        power(heavy, tail) - power(-heavy, tail)
    )
    x, log_det = jax.jit(lambda z: flow.bijection.forward_and_log_det(z))(jnp.asarray(z))
    np.testing.assert_allclose(x, LOC + TRIL @ inner, rtol=1e-10)
    density = scipy.stats.norm.pdf(heavy)
    slopes = 0.5 + 0.5 * np.sqrt(np.pi / 2) * density * (
        (2 * scipy.stats.norm.sf(heavy)) ** (-tail - 1)
        + (2 * scipy.stats.norm.cdf(heavy)) ** (-tail - 1)
    )
    expected = np.log(slopes).sum() + np.log(np.diag(TRIL)).sum()
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)


def test_the_gaussian_is_kept_and_df_if_not_wanted():
    leaves = len(jax.tree.leaves(vf.params(_flow())))
    assert len(jax.tree.leaves(vf.params(_flow(trainable_df=True)))) == leaves + 1
    bare = _flow(loc=None, tril=None)
    assert len(jax.tree.leaves(vf.params(bare))) == leaves
    assert bare.bijection.layers[-1].layers[0].heavy == (0, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loc": np.zeros(2)}, "heavy_tail: loc has shape"),
        ({"tril": np.eye(2)}, "heavy_tail: tril has shape"),
        ({"tril": -np.eye(3)}, "diagonal"),
        ({"loc": np.array([0.0, np.nan, 0.0])}, "loc must be finite"),
        ({"tril": np.diag([1.0, np.inf, 1.0])}, "tril must be finite"),
        ({"tril": TRIL @ TRIL.T}, "not the covariance"),
        ({"df": np.ones(2)}, "df has shape"),
        ({"df": -1.0}, "df must be"),
        ({"num_layers": 0}, "num_layers"),
    ],
    ids=["loc", "tril", "negative", "nan", "infinite", "full", "df", "df negative", "layers"],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        _flow(**options)


def _target(dim, df):
    """Independent t, the last coordinate normal around the one before; log Z = 0."""

    def log_density(x):
        heavy = jnp.sum(jax.scipy.stats.t.logpdf(x[:-1], df))
        return heavy + jax.scipy.stats.norm.logpdf(x[-1] - x[-2])

    return vf.Target(log_density, dim)


@pytest.mark.slow
def test_half_a_degree_of_freedom_in_fifty_dimensions():
    """By `vf.fit` from the density alone; a Gaussian base has nothing to show there."""
    target = _target(50, 0.5)
    report = vf.diagnostics.tails(target, whiten=True)
    np.testing.assert_allclose(1 / report.df[:49], 2.0, atol=0.1)
    assert report.df[49] == np.inf
    options = {"num_steps": 1000, "precondition": None, "progress": False, "dtype": "float32"}
    key, fit_key = jax.random.key(0), jax.random.key(1)
    with jax.enable_x64(False):
        flows = {
            "heavy": vf.flows.heavy_tail(key, 50, df=report.df, loc=report.loc, tril=report.tril),
            "light": vf.flows.coupling(key, 50, num_layers=4),
        }
        verdicts = {
            name: vf.fit(fit_key, target, flow=flow, **options).verdict
            for name, flow in flows.items()
        }
    assert verdicts["heavy"].ess_fraction >= 0.35
    assert verdicts["heavy"].khat < 0.7
    assert abs(float(verdicts["heavy"].log_evidence.value)) < 0.1
    assert verdicts["light"].ess_fraction < 0.01
