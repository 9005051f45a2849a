"""Objectives of stochastic flows: path bounds, log-variance, forward KL, CRAFT, FAB, and SMC."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vflow as vf

S = vf.flows.stochastic


def gaussian(x):
    """N((1, -.5), diag(.7^2, 1.2^2)), normalised."""
    z = (x - jnp.array([1.0, -0.5])) / jnp.array([0.7, 1.2])
    return -0.5 * jnp.sum(z**2) - jnp.log(2 * jnp.pi * 0.7 * 1.2)


def test_log_variance_differentiates_the_log_ratio_of_path_densities():
    """At a fixed path, against the normal densities of all steps written out."""
    n, layer = 3, S.ControlledLangevin(num_steps=3, step_size=0.1, hidden=())
    layer = layer.build(jax.random.key(0), 2)
    head = jnp.array([[0.3, 0.0], [0.1, -0.2], [0.2, 0.4]])
    layer = eqx.tree_at(lambda layer: layer.network.weights[-1], layer, head)
    eps = jax.random.normal(jax.random.key(1), (n, 2))
    points = [jnp.array([0.4, -0.3])]
    for k in range(n):  # the path itself, step by step
        eta, f = jnp.exp(layer.log_step), layer.network(jnp.append(points[k], k / n))
        drift = jax.grad(gaussian)(points[k]) + f
        points.append(points[k] + eta * drift + jnp.sqrt(2 * eta) * eps[k])

    def written_out(layer):
        eta, total = jnp.exp(layer.log_step), 0.0
        normal = jax.scipy.stats.norm.logpdf
        for k in range(n):
            x, y, sd = points[k], points[k + 1], jnp.sqrt(2 * eta)
            back = y + eta * (jax.grad(gaussian)(y) - layer.network(jnp.append(y, (k + 1) / n)))
            ahead = x + eta * (jax.grad(gaussian)(x) + layer.network(jnp.append(x, k / n)))
            total += jnp.sum(normal(x, back, sd)) - jnp.sum(normal(y, ahead, sd))
        return total

    fixed = lambda layer: layer.forward_along(eps, points[0], gaussian, fixed=True)[1]
    want, got = (eqx.filter_jit(eqx.filter_value_and_grad(f))(layer) for f in (written_out, fixed))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_log_variance_trains_a_controlled_chain():
    """It is what it says, and its ascent raises the evidence bound."""
    layer = S.ControlledLangevin(num_steps=4, step_size=0.15, hidden=(8,))
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, [layer])
    objective = vf.expect(lambda q: vf.objectives.log_variance(64)(q, gaussian))
    key = jax.random.key(2)
    bound = jax.jit(vf.expect(lambda q: vf.objectives.elbo()(q, gaussian), 4000))
    x, log_q = vf.sample_and_log_prob(key, q, 4000, log_density=gaussian)
    spread = -0.5 * jnp.var(jax.vmap(gaussian)(x) - log_q)
    value = jax.jit(vf.expect(lambda q: vf.objectives.log_variance(4000)(q, gaussian)))(key, q)
    assert float(value) == pytest.approx(float(spread), rel=0.15)
    result = vf.maximize(jax.random.key(1), objective, q, 300)
    assert bound(key, result.params) > bound(key, q) + 0.3
    assert result.value.value > 0.5 * float(value)


def test_log_variance_vanishes_where_all_weights_are_equal():
    """A Langevin step from the target itself to the target with a step of size 0: log w constant."""
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, [S.Langevin(num_steps=2, step_size=1e-12)])
    normal = lambda x: -0.5 * jnp.sum(x**2)
    value = vf.expect(lambda q: vf.objectives.log_variance(8)(q, normal))(jax.random.key(0), q)
    assert abs(value) < 1e-9
    affine = vf.bijections.Affine(jnp.zeros(2), jnp.ones(2))
    mixed = vf.flows.stochastic_flow(jax.random.key(0), 2, [affine])
    with pytest.raises(vf.ProgramError, match="Deterministic"):
        vf.expect(lambda q: vf.objectives.log_variance(8)(q, normal))(jax.random.key(0), mixed)


@pytest.mark.slow
def test_forward_kl_along_reversed_paths():
    """A lower bound of the log likelihood, unbiased in its gradient: ascent reaches the data's law."""
    data = np.array([1.0, -0.5]) + np.array([0.7, 1.2]) * np.random.default_rng(0).normal(
        size=(500, 2)
    )
    affine = vf.bijections.Affine(jnp.zeros(2), jnp.ones(2))
    q = vf.flows.stochastic_flow(
        jax.random.key(0), 2, [S.Langevin(num_steps=2, step_size=0.05), affine]
    )
    likelihood = vf.objectives.forward_kl(gaussian, jnp.asarray(data), batch_size=100)
    result = vf.maximize(jax.random.key(1), likelihood, q, 300)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.cov(data.T))[1]
    assert -entropy - 0.1 < float(result.value) < -entropy + 3 * result.value.standard_error
    with pytest.raises(ValueError, match="log_density"):
        vf.objectives.forward_kl(None, jnp.asarray(data))(jax.random.key(0), q)


@pytest.mark.slow
def test_craft_trains_bijections_between_accept_and_reject_layers():
    """Affine maps from stage to stage of a Gaussian path: the exact answer is known."""
    affine = vf.bijections.Affine(jnp.zeros(1), jnp.ones(1))
    kernel = S.Metropolis(num_steps=3, step_size=0.7)
    q = vf.flows.stochastic_flow(jax.random.key(0), 1, [affine, kernel, affine, kernel])
    target = lambda x: -0.5 * jnp.sum(((x - 2.0) / 0.5) ** 2)
    objective = vf.objectives.craft(256)
    estimate = vf.expect(lambda q: objective(q, target))
    result = vf.maximize(
        jax.random.key(1),
        estimate,
        q,
        300,
        optax.adam(optax.cosine_decay_schedule(0.05, 300, 0.01)),
    )
    maps = [layer.bijection for layer in result.params.layers if not layer.tempered]
    # precision 1, 2.5, 4; precision times mean 0, 4, 8
    means, scales = np.array([0.0, 1.6, 2.0]), np.array([1.0, 2.5, 4.0]) ** -0.5
    for layer, k in zip(maps, (0, 1), strict=True):
        scale = scales[k + 1] / scales[k]
        assert float(jnp.exp(layer.log_scale[0])) == pytest.approx(scale, rel=0.03)
        shift = means[k + 1] - scale * means[k]
        assert float(layer.loc[0]) == pytest.approx(shift, abs=0.06)
    # at the optimum the value is log Z, and all weights are equal
    assert float(result.value) == pytest.approx(np.log(0.5 * np.sqrt(2 * np.pi)), abs=0.01)
    x, log_q = vf.sample_and_log_prob(jax.random.key(2), result.params, 2000, log_density=target)
    log_w = jax.vmap(target)(x) - log_q
    assert float(vf.diagnostics.ess_fraction(log_w)) > 0.98
    chain = vf.flows.stochastic_flow(jax.random.key(0), 1, [kernel])
    with pytest.raises(ValueError, match="has none"):
        vf.expect(lambda q: objective(q, target))(jax.random.key(0), chain)


@pytest.mark.slow
def test_fab_covers_both_modes_where_the_reverse_bound_takes_one():
    target = lambda x: jnp.logaddexp(-8 * jnp.sum((x - 1.0) ** 2), -8 * jnp.sum((x + 1.0) ** 2))
    start = vf.distributions.Flow(
        vf.distributions.Normal(1), vf.bijections.Affine(jnp.full(1, 0.5), jnp.full(1, 0.5))
    )
    final = {}
    for name, objective in (
        ("fab", vf.expect(lambda q: vf.objectives.fab(256)(q, target))),
        ("elbo", vf.expect(lambda q: vf.objectives.elbo()(q, target), 256)),
    ):
        final[name] = vf.maximize(
            jax.random.key(0), objective, start, 200, optax.adam(0.03)
        ).params.bijection
    # the Gaussian that minimises the integral of p^2 / q is symmetric and at least as wide as p
    assert abs(float(final["fab"].loc[0])) < 0.15
    assert float(jnp.exp(final["fab"].log_scale[0])) > 1.0
    assert abs(float(final["elbo"].loc[0])) > 0.9
    assert float(jnp.exp(final["elbo"].log_scale[0])) < 0.4


@pytest.mark.slow
def test_fab_with_replay_reaches_the_same_flow_and_keeps_its_weights_right():
    target = lambda x: jnp.logaddexp(-8 * jnp.sum((x - 1.0) ** 2), -8 * jnp.sum((x + 1.0) ** 2))
    start = vf.distributions.Flow(
        vf.distributions.Normal(1), vf.bijections.Affine(jnp.full(1, 0.5), jnp.full(1, 0.5))
    )
    rate = optax.cosine_decay_schedule(0.03, 400, 0.03)
    fab = vf.objectives.fab_replay(start, target, optax.adam(rate), num_particles=128)

    @jax.jit
    def train(key):
        def step(state, key):
            after, value = fab.step(key, state)
            # log w + log q is 2 log p and what the path was: an update must not change it
            kept = state.buffer.log_weights + state.buffer.log_q
            same = jnp.isclose(after.buffer.log_weights + after.buffer.log_q, kept)
            return after, (value, jnp.sum(same))

        return jax.lax.scan(step, fab.init(key), jax.random.split(key, 100))

    state, (values, same) = train(jax.random.key(0))
    assert np.all(np.isfinite(values))
    assert np.all(np.asarray(same) >= 31 * 128)  # all but the points of the new pass
    assert int(state.buffer.cursor) == 104 * 128 % (32 * 128)
    q = fab.flow(state)
    exact = jax.vmap(q.log_prob)(state.buffer.x)
    assert float(jnp.median(jnp.abs(exact - state.buffer.log_q))) < 0.05  # of a flow nearly at rest
    # the Gaussian of the least integral of p^2 / q, by quadrature
    grid = jnp.linspace(-6.0, 6.0, 4001)
    log_p = jax.vmap(lambda x: target(x[None]))(grid)
    divergence = lambda s: jax.nn.logsumexp(2 * log_p + 0.5 * (grid / s) ** 2 + jnp.log(s))
    scales = jnp.linspace(1.02, 1.8, 400)
    best = float(scales[jnp.argmin(jax.vmap(divergence)(scales))])
    assert abs(float(q.bijection.loc[0])) < 0.1
    assert float(jnp.exp(q.bijection.log_scale[0])) == pytest.approx(best, rel=0.05)


def test_fab_with_replay_names_bad_input():
    flow, normal = vf.flows.gaussian(jax.random.key(0), 2), lambda x: -jnp.sum(x**2)
    make = lambda q=flow, **options: vf.objectives.fab_replay(
        q, normal, optax.sgd(0.1), **{"num_particles": 8, **options}
    )
    for options, words in (
        ({"num_particles": 0}, "num_particles"),
        ({"num_updates": 5, "num_batches": 4}, "num_batches"),
        ({"most": 0.5}, "most"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    chain = vf.flows.stochastic_flow(jax.random.key(0), 2, [S.Langevin(num_steps=1, step_size=0.1)])
    with pytest.raises(TypeError, match="craft"):
        make(chain)


@pytest.mark.slow
def test_sequential_monte_carlo_is_unbiased_and_resampling_helps():
    blocks = [
        vf.bijections.Affine(jnp.full(2, 0.1), jnp.full(2, 0.95)),
        S.Metropolis(num_steps=2, step_size=0.4),
    ]
    chain = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks * 3)
    sharp = lambda x: gaussian(jnp.array([1.0, -0.5]) + 3.0 * (x - 1.5)) + 2 * jnp.log(3.0)
    found = {
        threshold: S.sequential_monte_carlo(
            jax.random.key(1), chain, sharp, 500, num_runs=32, threshold=threshold
        )
        for threshold in (0.0, 0.5)
    }
    for result in found.values():
        value, error = result.log_evidence
        assert abs(value) < 4.5 * error
        assert error < 0.05
    assert found[0.0].resampled == 0 and found[0.5].resampled >= 1
    weights = np.exp(found[0.5].log_weights)
    mean = (weights[:, None] * np.asarray(found[0.5].x)).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(mean, [1.5, 1.5], atol=0.04)
    spread = {k: vf.diagnostics.ess_fraction(v.log_weights) for k, v in found.items()}
    assert spread[0.5] > spread[0.0]
    with pytest.raises(ValueError, match="threshold"):
        S.sequential_monte_carlo(jax.random.key(1), chain, sharp, threshold=2.0)
