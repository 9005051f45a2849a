"""Dependent rows against a dense multivariate normal, and batches against all rows."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow as vf
from tests.flows.registry import perturb

N, P, LAMBDA = 6, 2, 0.3


def _similarity():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(N, 3))
    g = a @ a.T
    scale = np.sqrt(np.diag(g))
    return g / scale[:, None] / scale


@pytest.fixture(scope="module")
def rows():
    key = jax.random.key(0)
    row = perturb(vf.flows.coupling(key, P, num_layers=2, hidden=(4,)), key)
    return vf.distributions.RowCorrelated(row, _similarity(), LAMBDA)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(N, P)))


def test_density_is_that_of_one_large_normal(rows, x):
    """In u = T^-1(x) all entries are one normal vector with covariance kron(I_p, C)."""
    u, log_det = jax.vmap(rows.flow.bijection.inverse_and_log_det)(x)
    c = LAMBDA * np.eye(N) + (1 - LAMBDA) * _similarity()
    dense = scipy.stats.multivariate_normal(cov=np.kron(np.eye(P), c))
    truth = dense.logpdf(np.asarray(u).T.reshape(-1)) + float(jnp.sum(log_det))
    np.testing.assert_allclose(rows.log_prob(x), truth, rtol=1e-12)


def test_the_mean_over_all_batches_is_the_whole(rows, x):
    """Values and gradients, of the flow and of lambda."""
    batches = jnp.array(list(itertools.combinations(range(N), 3)))
    whole = eqx.filter_jit(eqx.filter_value_and_grad(lambda q: q.log_prob(x)))(rows)
    mean = eqx.filter_jit(
        eqx.filter_value_and_grad(
            lambda q: jnp.mean(jax.vmap(lambda i: q.log_prob_batch(x[i], i))(batches))
        )
    )(rows)
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    biased = jnp.mean(jax.vmap(lambda i: rows.log_prob_batch(x[i], jnp.arange(3)))(batches))
    assert abs(biased - whole[0]) > 0.1  # the wrong rows of C^-1 would be seen


def test_one_row_alone_is_a_draw_of_the_flow(rows):
    x = jax.vmap(rows.sample)(jax.random.split(jax.random.key(3), 4000))[:, 4]
    u = jax.vmap(lambda x: rows.flow.bijection.inverse_and_log_det(x)[0])(x)
    for column in np.asarray(u).T:
        assert scipy.stats.kstest(column, "norm").pvalue > 1e-3
        assert scipy.stats.kstest(1.2 * column, "norm").pvalue < 1e-3


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.array([[1.0, 0.5], [0.1, 1.0]]), "symmetric"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "symmetric"),
        (2 * np.eye(2), "diagonal"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
    ],
    ids=["shape", "asymmetric", "nan", "diagonal", "indefinite"],
)
def test_a_similarity_of_another_kind_is_refused(rows, similarity, message):
    with pytest.raises(ValueError, match=message):
        vf.distributions.RowCorrelated(rows.flow, similarity)


def test_bad_arguments_are_named(rows, x):
    with pytest.raises(ValueError, match="mixing"):
        vf.distributions.RowCorrelated(rows.flow, np.eye(2), 1.0)
    heavy = vf.flows.coupling(
        jax.random.key(0), 1, base=vf.distributions.StudentT(jnp.array([3.0]))
    )
    with pytest.raises(TypeError, match="standard Normal base"):
        vf.distributions.RowCorrelated(heavy, np.eye(2))
    with pytest.raises(ValueError, match=r"x has shape \(5, 2\)"):
        rows.log_prob(x[:5])
    with pytest.raises(ValueError, match="at least two rows"):
        rows.log_prob_batch(x[:1], jnp.array([0]))
    with pytest.raises(ValueError, match="batch_size"):
        vf.objectives.dependent_likelihood(x, 1)
    with pytest.raises(TypeError, match="forward_kl"):
        vf.objectives.dependent_likelihood(x)(jax.random.key(0), rows.flow)


@pytest.mark.slow
def test_knowing_the_dependence_gives_the_better_density():
    """The sine of the paper: blocks of rows share their noise; entropy 1.838 nats.

    Fitted as if the rows were independent, the flow takes the accidents of a few large blocks
    for the law.
    """
    rng = np.random.default_rng(0)
    sizes = []
    while sum(sizes) < 600:
        sizes.append(min(int(np.ceil(rng.pareto(0.5) + 1)), 120))
    labels = np.repeat(np.arange(len(sizes)), sizes)[:600]
    similarity = (labels[:, None] == labels[None, :]).astype(float)

    def draw(correlation, n=600):
        u = rng.normal(size=(n, 2))
        if correlation is not None:
            shared = rng.normal(size=(labels.max() + 1, 2))[labels]
            u = np.sqrt(1 - correlation) * u + np.sqrt(correlation) * shared
        return jnp.asarray(np.stack([u[:, 0], np.sin(5 * u[:, 0]) + u[:, 1] / np.e], 1))

    train, test = draw(0.9), draw(None, 20_000)
    row = vf.flows.coupling(jax.random.key(0), 2, num_layers=6, hidden=(32,))
    options = {"num_steps": 2000}
    loss = vf.objectives.dependent_likelihood(train)
    aware = vf.maximize(
        jax.random.key(1), loss, vf.distributions.RowCorrelated(row, similarity), **options
    ).params
    blind = vf.maximize(
        jax.random.key(1), vf.objectives.forward_kl(None, train), row, **options
    ).params
    nll_aware, nll_blind = (
        -float(jax.vmap(flow.log_prob)(test).mean()) for flow in (aware.flow, blind)
    )
    assert 1.838 - 0.05 < nll_aware < nll_blind, (nll_aware, nll_blind)
