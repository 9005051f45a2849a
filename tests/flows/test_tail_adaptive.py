"""Light marginals stay light and heavy ones keep their index; fits to heavy-tailed targets."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow as vf
from vflow._core import combine, partition
from vflow.diagnostics import _tail_estimators as estimators

DF = jnp.array([2.0, jnp.inf, 4.0, jnp.inf, jnp.inf])
LIGHT, HEAVY = np.array([1, 3, 4]), np.array([0, 2])


def _linear(flow):
    """The flow with its networks at zero and everything else moved: the linear case."""
    trained, static = partition(flow)
    rng = np.random.default_rng(1)
    moved = combine(jax.tree.map(lambda a: a + 0.4 * rng.normal(size=a.shape), trained), static)
    chain = moved.bijection
    still = flow.bijection.layers[1].layers.layers[0]
    layers = chain.layers[1].layers
    layers = type(layers)([still, *layers.layers[1:]])
    scan = vf.bijections.Scan(layers)
    parts = [chain.layers[0], scan, *chain.layers[2:]]
    return vf.distributions.Flow(moved.base, vf.bijections.Chain(parts))


def test_light_marginals_are_normal_and_heavy_ones_have_the_index_of_their_group():
    start = vf.flows.tail_adaptive(
        jax.random.key(0), 5, df=DF, num_layers=2, hidden=(), trainable_df=False
    )
    assert len(jax.tree.leaves(vf.params(start.base))) == 0

    @eqx.filter_jit
    def run(flow, key):
        forward = lambda z: flow.bijection.forward_and_log_det(z)[0]
        x, _ = vf.sample_and_log_prob(key, flow, 200_000)
        return x, forward(jnp.zeros(5)), jax.jacfwd(forward)(jnp.zeros(5))

    x, mean, jacobian = map(np.asarray, run(_linear(start), jax.random.key(2)))
    assert np.abs(np.corrcoef(x[:, LIGHT].T) - np.eye(3)).max() > 0.1  # it does mix
    assert not jacobian[np.ix_(LIGHT, HEAVY)].any()
    for i in LIGHT:
        sd = np.linalg.norm(jacobian[i])
        assert scipy.stats.kstest((x[:, i] - mean[i]) / sd, "norm").pvalue > 1e-3
    # Power: a light coordinate that saw a twentieth of a heavy one is rejected.
    i = LIGHT[0]
    mixed = (x[:, i] - mean[i]) / np.linalg.norm(jacobian[i]) + 0.05 * x[:, 0]
    assert scipy.stats.kstest(mixed / mixed.std(), "norm").pvalue < 1e-3
    for i in HEAVY:
        top = np.sort(np.abs(x[:, i] - np.median(x[:, i])))[::-1]
        assert abs(estimators.hill(top, 1000) - 0.5) < 0.1


def test_df_is_trainable_and_light_has_no_leaf():
    base = vf.flows.tail_adaptive(jax.random.key(0), 5, df=DF, num_layers=2, hidden=()).base
    assert base.raw_df.shape == (2,)
    np.testing.assert_allclose(base.df, DF, rtol=1e-12)
    assert len(jax.tree.leaves(vf.params(base))) == 1


def test_autoregressive_layers_keep_the_order_too():
    flow = vf.flows.tail_adaptive(
        jax.random.key(0), 5, df=DF, conditioner="autoregressive", num_layers=2, hidden=(6,)
    )
    trained, static = partition(flow.bijection)
    rng = np.random.default_rng(0)
    moved = combine(jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape), trained), static)
    forward = lambda x: moved.forward_and_log_det(x)[0]
    x = jnp.array([3.0, 0.2, -1e3, -0.7, 1.1])
    jacobian = np.asarray(jax.jit(jax.jacfwd(forward))(x))
    assert not jacobian[np.ix_(LIGHT, HEAVY)].any()
    assert jacobian[np.ix_(HEAVY, LIGHT)].all() and jacobian[np.ix_(HEAVY, HEAVY)].all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"df": jnp.ones(3)}, ValueError, "df has shape"),
        ({"df": 0.1}, ValueError, "df must"),
        ({"df": 3.0, "num_layers": 0}, ValueError, "num_layers"),
        ({"df": 3.0, "conditioner": "dense"}, ValueError, "conditioner"),
    ],
    ids=["shape", "small", "layers", "conditioner"],
)
def test_bad_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        vf.flows.tail_adaptive(jax.random.key(0), 2, **options)


def test_traced_df_is_refused():
    with pytest.raises(TypeError, match="concrete"):
        jax.jit(lambda df: vf.flows.tail_adaptive(jax.random.key(0), 1, df=df).base.df)(3.0)


def _train(flow, log_density, num_steps):
    def objective(q):
        x, log_q = q.simulate(gradient="path")
        return log_density(x) - log_q

    estimate = vf.expect(objective, num_samples=64)
    return vf.maximize(jax.random.key(1), estimate, flow, num_steps=num_steps).params


@pytest.mark.slow
def test_a_student_t_target_is_reached():
    """The family holds the target: the ELBO comes to zero."""

    def log_density(x):
        t3 = jnp.sum(-2.0 * jnp.log1p(x**2 / 3.0))
        return t3 + 2 * (np.log(2.0) - np.log(np.pi) - 0.5 * np.log(3.0))

    flow = vf.flows.tail_adaptive(jax.random.key(0), 2, df=6.0, num_layers=2, hidden=(16,))
    fitted = _train(flow, log_density, 2000)
    x, log_q = vf.sample_and_log_prob(jax.random.key(2), fitted, 20_000)
    assert np.mean(jax.vmap(log_density)(x) - log_q) > -0.05
