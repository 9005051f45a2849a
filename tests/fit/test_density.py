"""vf.fit_density against closed forms; what it holds out, keeps and refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vflow as vf
from vflow._core import partition

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(60, 2)) @ np.array([[30.0, 0.0], [20.0, 5.0]]) + [100.0, -7.0]


def gaussian(covariance="full", dim=2):
    return vf.flows.gaussian(jax.random.key(1), dim, covariance=covariance)


def mean_log_prob(flow, rows, condition=None):
    return float(np.mean(jax.jit(jax.vmap(flow.log_prob))(jnp.asarray(rows), condition)))


def held_out(key, n, fraction):
    """The rows of the validation part."""
    order = jax.random.permutation(jax.random.split(key, 3)[0], n)
    return np.asarray(order)[: round(fraction * n)]


def moments(weights=None):
    mean = np.average(DATA, axis=0, weights=weights)
    return mean, np.cov(DATA.T, ddof=0, aweights=weights)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_gaussian_ends_at_its_maximum_likelihood(weighted):
    """Full batch, no row held out: the moments of the rows are the closed form."""
    weights = RNG.exponential(size=60) if weighted else None
    result = vf.fit_density(
        KEY, gaussian(), DATA, weights=weights, validation_fraction=0, num_steps=400,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, 400)),
    )  # fmt: skip
    loc, cov = moments(weights)
    _, log_det = np.linalg.slogdet(2 * np.pi * cov)
    np.testing.assert_allclose(result.train_log_prob[-1], -0.5 * (log_det + 2), rtol=1e-6)
    point = jnp.asarray([90.0, -3.0])
    expected = -0.5 * ((point - loc) @ np.linalg.solve(cov, point - loc) + log_det)
    np.testing.assert_allclose(result.flow.log_prob(point), expected, rtol=1e-4)
    assert result.num_params == 8 and result.stopped == "num_steps"
    assert result.best_step == 400 and result.validation_log_prob.shape == (0,)


@pytest.fixture(scope="module")
def overfitted():
    """A flow with far more parameters than rows."""
    data = np.random.default_rng(2).normal(size=(40, 3))
    data[:, 1] += 3 * data[:, 0]
    flow = vf.flows.coupling(jax.random.key(3), 3, num_layers=2, hidden=(20,))
    result = vf.fit_density(
        KEY, flow, data, validation_fraction=0.25, learning_rate=1e-2, patience=100, num_steps=2000
    )
    return data, result


def test_early_stopping_returns_the_best_on_rows_never_trained_on(overfitted):
    data, result = overfitted
    steps, scores = result.validation_steps, result.validation_log_prob
    assert result.stopped == "patience"
    assert steps[0] == 0 and (np.diff(steps) == 25).all()
    assert len(result.train_log_prob) == steps[-1] == result.best_step + 100
    assert scores[steps == result.best_step] == scores.max() > scores[0]
    assert scores[-1] < scores.max() - 0.1
    rows = held_out(KEY, 40, 0.25)
    np.testing.assert_allclose(mean_log_prob(result.flow, data[rows]), scores.max(), rtol=1e-9)
    # training went on to improve on its own rows meanwhile
    assert result.train_log_prob[-1] > result.train_log_prob[result.best_step] + 0.1
    assert f"validation log-likelihood {scores.max():.3f} at step {result.best_step}" in str(result)


def test_the_first_score_is_that_of_the_base_on_standardised_columns(overfitted):
    data, result = overfitted
    rows = held_out(KEY, 40, 0.25)
    train = np.delete(data, rows, axis=0)
    z = (data[rows] - train.mean(0)) / train.std(0)
    terms = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(train.std(0))
    np.testing.assert_allclose(result.validation_log_prob[0], terms.sum(1).mean(), rtol=1e-9)
    z = (train - train.mean(0)) / train.std(0)  # all training rows fit into one batch
    terms = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(train.std(0))
    np.testing.assert_allclose(result.train_log_prob[0], terms.sum(1).mean(), rtol=1e-9)


def test_units_and_integers_do_not_matter():
    """Columns in other units shift the log density by a constant; integers are taken as numbers."""
    options = {"num_steps": 60, "learning_rate": 0.05, "batch_size": 10}
    whole = np.round(DATA).astype(int)
    first = vf.fit_density(KEY, gaussian(), whole, **options)
    moved = vf.fit_density(KEY, gaussian(), [1e-6, 1e6] * whole + 3e6, **options)
    shift = np.log(1e-6) + np.log(1e6)
    np.testing.assert_allclose(moved.train_log_prob, first.train_log_prob - shift, rtol=1e-6)
    np.testing.assert_allclose(
        moved.validation_log_prob, first.validation_log_prob - shift, rtol=1e-6
    )
    assert first.train_log_prob.std() > 0.1  # minibatches differ


def test_without_standardisation_nothing_is_added():
    result = vf.fit_density(KEY, gaussian(), DATA / 50, standardise=False, num_steps=25)
    assert jax.tree.structure(result.flow) == jax.tree.structure(gaussian())


def test_a_conditional_flow_finds_the_conditional_density():
    """x | c ~ N(2 sin c, (c/2)^2), with its entropy in closed form; kernels of the condition alone."""
    rng = np.random.default_rng(4)
    c = rng.uniform(0.5, 2.5, size=(2000, 1))
    x = 2 * np.sin(c) + 0.5 * c * rng.normal(size=c.shape)
    flow = vf.flows.kernelised(
        jax.random.key(5), 1, condition_dim=1, num_layers=1, num_centres=10, lengthscale=1.0
    )
    train, test = slice(0, 1000), slice(1000, 2000)
    result = vf.fit_density(
        KEY, flow, x[train], condition=c[train], learning_rate=1e-2, num_steps=1500
    )
    terms = -0.5 * ((x - 2 * np.sin(c)) / (0.5 * c)) ** 2 - np.log(0.5 * c * np.sqrt(2 * np.pi))
    best = terms[test].mean()
    found = mean_log_prob(result.flow, x[test], jnp.asarray(c[test]))
    plain = -0.5 * np.log(2 * np.pi * np.e * x[test].var())
    assert best - 0.03 < found < best + 0.01
    assert plain < best - 0.2


def test_centres_of_untrained_kernels_are_placed_among_the_rows():
    layer = vf.bijections.KernelisedCoupling(jax.random.key(0), 2, num_centres=5)
    flow = vf.distributions.Flow(vf.distributions.Normal(2), layer)
    data = np.stack([RNG.integers(0, 30, size=40) * 10.0, RNG.normal(size=40)], 1)
    options = {"num_steps": 1, "learning_rate": 1e-9, "validation_fraction": 0}
    placed = vf.fit_density(KEY, flow, data, **options).flow.bijection.layers[0]
    centres = placed.centres * data[:, 0].std() + data[:, 0].mean()
    np.testing.assert_allclose(centres, np.round(centres / 10) * 10, atol=1e-6)
    # but centres of a flow that was trained before stay where they are
    trained = eqx.tree_at(lambda f: f.bijection.shift_coefficients, flow, jnp.full((5, 1), 0.1))
    kept = vf.fit_density(KEY, trained, data, **options).flow.bijection.layers[0]
    np.testing.assert_allclose(kept.centres, layer.centres, atol=1e-7)


def test_a_callback_stops_and_ctrl_c_keeps_the_best():
    reports = []

    def interrupt(report):
        reports.append(report)
        if len(reports) == 3:
            raise KeyboardInterrupt

    options = {"learning_rate": 0.05, "num_steps": 500}
    result = vf.fit_density(KEY, gaussian(), DATA, callback=interrupt, **options)
    assert result.stopped == "interrupted" and len(result.validation_steps) == 4
    assert [report.step for report in reports] == [25, 50, 75]
    rows = held_out(KEY, 60, 0.1)
    expected = result.validation_log_prob.max()
    np.testing.assert_allclose(mean_log_prob(result.flow, DATA[rows]), expected, rtol=1e-9)
    result = vf.fit_density(KEY, gaussian(), DATA, callback=lambda report: True, **options)
    assert result.stopped == "callback" and len(result.train_log_prob) == 25


def test_what_breaks_raises_with_step_and_flow():
    with pytest.raises(vf.FitError, match="stayed non-finite from step") as caught:
        vf.fit_density(KEY, gaussian(), DATA, optimizer=optax.sgd(1e200))
    assert caught.value.last_good.log_prob(jnp.zeros(2)).shape == ()
    nowhere = vf.distributions.Flow(
        vf.distributions.Normal(2), vf.bijections.Affine(jnp.full(2, 1e200))
    )
    with pytest.raises(vf.FitError, match="not finite at 60 of 60 rows, for example row 0"):
        vf.fit_density(KEY, nowhere, DATA)


def _broken():
    data = DATA.copy()
    data[[7, 9], 1] = np.nan
    return data


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"data": _broken()}, ValueError, r"row 7, column 1 \(nan\), 2 of 60 rows"),
        ({"data": DATA * [1, 0] + [0, 5]}, ValueError, r"column 1 of data is constant \(5\)"),
        ({"data": DATA[:2]}, ValueError, "2 rows of data leave 1 for training and 1"),
        ({"data": DATA[:, :1]}, ValueError, r"data has shape \(60, 1\), expected \(n, 2\)"),
        ({"data": DATA[0]}, ValueError, r"data has shape \(2,\)"),
        ({"data": np.full((5, 2), "a")}, TypeError, "data must be an array of numbers"),
        ({"data": DATA + 1j}, TypeError, "data must be an array of numbers: got complex128"),
        ({"condition": np.zeros((60, 1))}, ValueError, "the flow is unconditional"),
        ({"conditional": True}, ValueError, "condition is missing"),
        ({"conditional": True, "condition": np.zeros((59, 1))}, ValueError, "59 rows, data has 60"),
        ({"conditional": True, "condition": np.zeros(60)}, ValueError, r"expected \(n, 1\)"),
        ({"weights": np.ones(59)}, ValueError, "weights must be 60 non-negative"),
        ({"weights": -np.ones(60)}, ValueError, "weights must be 60 non-negative"),
        ({"weights": np.eye(60)[0]}, ValueError, "all weights of the rows for"),
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be in"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_steps": 1.5}, TypeError, "num_steps"),
        ({"patience": 0}, ValueError, "patience"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be a positive number"),
        ({"learning_rate": 1.0, "optimizer": optax.sgd(1.0)}, ValueError, "not both"),
        ({"optimizer": 1e-3}, TypeError, "optimizer"),
        ({"callback": 3}, TypeError, "callback"),
        ({"flow": vf.distributions.Normal(2)}, ValueError, "no trainable leaf"),
        ({"key": 0}, TypeError, "key"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {"key": KEY, "flow": gaussian("diagonal"), "data": DATA} | change
    if arguments.pop("conditional", False):
        arguments["flow"] = vf.flows.kernelised(KEY, 2, condition_dim=1, num_layers=1)
    with pytest.raises(error, match=match):
        vf.fit_density(**arguments)


def test_float32_by_default():
    with jax.enable_x64(False):
        flow = vf.flows.gaussian(jax.random.key(1), 2)
        result = vf.fit_density(KEY, flow, DATA, num_steps=25)
    leaves = jax.tree.leaves(partition(result.flow)[0])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
