"""Stochastic layers: unbiased weights, exact reversal, invariance, whatever the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow as vf

S = vf.flows.stochastic

KINDS = {
    "langevin": lambda: S.Langevin(num_steps=4, step_size=0.03),
    "underdamped": lambda: S.UnderdampedLangevin(num_steps=4, step_size=0.3),
    "controlled": lambda: S.ControlledLangevin(num_steps=4, step_size=0.03, hidden=(8,)),
    "metropolis": lambda: S.Metropolis(num_steps=8, step_size=0.5),
    "mala": lambda: S.MALA(num_steps=3, step_size=0.1),
    "hmc": lambda: S.HMC(num_steps=2, num_leapfrog=3, step_size=0.3),
    "couplings": lambda: S.couplings(num_layers=2, hidden=(8,)),
}
GAUSSIAN_NOISE = ("langevin", "underdamped", "controlled")


def gaussian(x):
    """N((1, -.5), diag(.7^2, 1.2^2)), normalised."""
    z = (x - jnp.array([1.0, -0.5])) / jnp.array([0.7, 1.2])
    return -0.5 * jnp.sum(z**2) - jnp.log(2 * jnp.pi * 0.7 * 1.2)


def double_well(x):
    return 0.5 * x[0] + 6.0 * x[0] ** 2 - x[0] ** 4 - 0.5 * x[1] ** 2


LOG_Z, RIGHT = 10.2934797, 0.8443071  # quadrature: see test_quadrature_of_the_double_well


def awake(q, seed=7):
    """The family with noise on its network weights, which start at zero."""
    leaves, tree = jax.tree.flatten(vf.params(q))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        0.2 * jax.random.normal(k, leaf.shape) * (leaf.ndim > 1)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return vf.apply_updates(q, jax.tree.unflatten(tree, noise))


def family(kind, stages, dim=2, **options):
    q = vf.flows.stochastic_flow(jax.random.key(0), dim, [KINDS[kind]()] * stages, **options)
    return awake(q) if kind in ("controlled", "couplings") else q


def weights(q, log_density, n, seed=1):
    @jax.jit
    def draw(key):
        x, log_q = vf.sample_and_log_prob(key, q, n, log_density=log_density)
        return x, jax.vmap(log_density)(x) - log_q

    return jax.device_get(draw(jax.random.key(seed)))


def check_mean(w, most):
    error = w.std() / np.sqrt(w.size)
    assert abs(w.mean() - 1) < 4.5 * error
    assert error < most


def test_mean_weight_is_the_evidence():
    """E[w] = Z through layers of all kinds, untrained; one that forgets its dS is caught."""
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, [make() for make in KINDS.values()])
    q = awake(q)

    @jax.jit
    def increments(key):
        paths = jax.vmap(lambda key: q.trajectory(key, gaussian))(jax.random.split(key, 60_000))
        return jax.vmap(gaussian)(paths.positions[:, -1]) - paths.log_base, paths.increments

    rest, dS = jax.device_get(increments(jax.random.key(2)))
    check_mean(np.exp(rest + dS.sum(axis=1)), 0.012)
    twin = np.exp(rest + dS[:, 1:].sum(axis=1))
    assert abs(twin.mean() - 1) > 6 * twin.std() / np.sqrt(twin.size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "couplings"])
def test_mean_weight_of_each_kind(kind):
    _, log_w = weights(family(kind, 5), gaussian, 200_000)
    check_mean(np.exp(log_w), 0.006)


def test_quadrature_of_the_double_well():
    grid = np.linspace(-5, 5, 20001)
    density = np.exp(0.5 * grid + 6 * grid**2 - grid**4)
    mass = np.trapezoid(density, grid)
    assert np.log(mass * np.sqrt(2 * np.pi)) == pytest.approx(LOG_Z, abs=1e-6)
    assert np.trapezoid(density[grid > 0], grid[grid > 0]) / mass == pytest.approx(RIGHT, abs=1e-4)


class Bend(vf.bijections.AbstractBijection):
    """(x1, x2) -> (s x1, x2 + 0.1 tanh x1)."""

    log_scale: jax.Array
    shape: tuple = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        y = jnp.stack([x[0] * jnp.exp(self.log_scale), x[1] + 0.1 * jnp.tanh(x[0])])
        return y, self.log_scale

    def inverse_and_log_det(self, y, condition=None):
        x = y[0] * jnp.exp(-self.log_scale)
        return jnp.stack([x, y[1] - 0.1 * jnp.tanh(x)]), -self.log_scale


NOTE = {  # ten stages behind a bijection each: the layers of the note's table
    "langevin": lambda: S.Langevin(num_steps=5, step_size=0.02),
    "underdamped": lambda: S.UnderdampedLangevin(num_steps=5, step_size=0.1),
    "controlled": lambda: S.ControlledLangevin(num_steps=5, step_size=0.02),
    "metropolis": lambda: S.Metropolis(num_steps=20, step_size=0.25),
    "mala": lambda: S.MALA(num_steps=3, step_size=0.03),
    "hmc": lambda: S.HMC(num_steps=3, num_leapfrog=5, step_size=0.15),
}


@pytest.mark.parametrize(
    "kind", ["underdamped", *(pytest.param(k, marks=pytest.mark.slow) for k in NOTE if k[0] != "u")]
)
def test_double_well(kind):
    """Evidence, mass of the wells and their free-energy difference, by weights."""
    blocks = []
    for i in range(10):
        blocks += [Bend(jnp.log(1.1 if i < 4 else 1.02)), NOTE[kind]()]
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks)
    # The cancelling layer at the end is not scanned with the others.
    assert len(q.segments) == (1 if q.layers[-1].reparameterised else 3)
    x, log_w = weights(q, double_well, 200_000 if kind != "underdamped" else 100_000)
    w = np.exp(log_w - LOG_Z)
    error = w.std() / np.sqrt(w.size)
    assert abs(w.mean() - 1) < 4 * error and error < 0.012
    share = w / w.sum()
    right = share @ (x[:, 0] > 0)
    error = np.sqrt(np.sum((share * ((x[:, 0] > 0) - right)) ** 2))
    assert abs(right - RIGHT) < 4 * error and error < 0.003
    free = -np.log(right / (1 - right))
    assert abs(free + 1.6906) < 4 * error / (RIGHT * (1 - RIGHT))
    raw = np.mean(x[:, 0] > 0)
    assert raw < 0.6  # the draws alone are wrong


@pytest.mark.parametrize("kind", GAUSSIAN_NOISE)
def test_the_swapped_path_has_the_opposite_increment(kind):
    layer = family(kind, 1).layers[0]
    key_x, key_eps = jax.random.split(jax.random.key(3))
    x = jax.random.normal(key_x, (2,))
    eps = jax.random.normal(key_eps, (layer.num_steps + (kind == "underdamped"), 2))
    path = S._transition.Tempered(lambda x: -0.5 * jnp.sum(x**2), double_well, 0.2, 0.6)
    y, dS, back = layer.forward_along(eps, x, path)
    again, dS_back, noise = layer.reverse_along(
        back[::-1] if kind != "underdamped" else back, y, path
    )
    np.testing.assert_allclose(again, x, atol=1e-10)
    np.testing.assert_allclose(dS_back, -dS, atol=1e-10)
    np.testing.assert_allclose(noise if kind == "underdamped" else noise[::-1], eps, atol=1e-10)
    assert abs(dS) > 1e-3


def test_increment_of_a_langevin_step_is_the_ratio_of_two_normals():
    eta, x = 0.05, np.array([0.3, -0.2])
    layer = S.Langevin(num_steps=1, step_size=eta)
    y, dS, _ = layer.forward_along(jnp.array([[0.7, -1.1]]), jnp.asarray(x), double_well)
    step = lambda a, b: scipy.stats.norm(
        a + eta * np.asarray(jax.grad(double_well)(jnp.asarray(a))), np.sqrt(2 * eta)
    ).logpdf(b)
    y = np.asarray(y)
    assert float(dS) == pytest.approx(np.sum(step(y, x) - step(x, y)), abs=1e-12)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("metropolis", "mala")), "hmc"]
)
def test_a_reversible_layer_leaves_its_density_invariant(kind):
    """From exact draws: same moments and distribution, and (x, y) exchangeable; blackjax agrees."""
    n, scale = 20_000, jnp.array([0.7, 1.2])
    layer = KINDS[kind]()
    x = jax.random.normal(jax.random.key(0), (n, 2)) * scale[None] + jnp.array([[1.0, -0.5]])
    keys = jax.random.split(jax.random.key(1), n)
    y, dS = jax.jit(jax.vmap(lambda k, x: layer.forward(k, x, gaussian)))(keys, x)
    np.testing.assert_allclose(dS, jax.vmap(gaussian)(x) - jax.vmap(gaussian)(y), atol=1e-10)
    a, b = ((np.asarray(v) - [1.0, -0.5]) / np.asarray(scale) for v in (x, y))
    for value, truth in (
        (b, 0.0),
        (b**2, 1.0),
        (a**3 * b - a * b**3, 0.0),
        (a**2 * b - a * b**2, 0.0),
    ):
        error = value.std(axis=0) / np.sqrt(n)
        assert np.all(np.abs(value.mean(axis=0) - truth) < 4.5 * error)
    assert scipy.stats.kstest(b[:, 0], "norm").pvalue > 1e-4
    theirs = np.asarray(jax.jit(jax.vmap(lambda k, x: reference(kind, layer, k, x)))(keys[::-1], x))
    ours, theirs = (np.sum((np.asarray(v) - np.asarray(x)) ** 2, axis=1) for v in (y, theirs))
    gap = ours.mean() - theirs.mean()
    assert abs(gap) < 4.5 * np.sqrt((ours.var() + theirs.var()) / n)


def reference(kind, layer, key, x):
    """The same chain by blackjax."""
    import blackjax

    step = jnp.exp(layer.log_step)
    if kind == "metropolis":
        kernel = blackjax.additive_step_random_walk(
            gaussian, blackjax.mcmc.random_walk.normal(step * jnp.ones(2))
        )
    elif kind == "mala":
        kernel = blackjax.mala(gaussian, step)
    else:
        kernel = blackjax.hmc(gaussian, step, jnp.ones(2), layer.num_leapfrog)
    state = kernel.init(x)
    for step_key in jax.random.split(key, layer.num_steps):
        state, _ = kernel.step(step_key, state)
    return state.position


@pytest.mark.parametrize(
    "kind", ["underdamped", pytest.param("controlled", marks=pytest.mark.slow)]
)
def test_estimated_density_integrates_to_one_and_matches_the_draws(kind):
    target = lambda x: -0.5 * jnp.sum(((x - 1.0) / 0.8) ** 2)
    q = family(kind, 1, dim=1, temperatures=[0.5])
    grid = jnp.linspace(-4.5, 5.0, 96)

    @jax.jit
    def density(key):
        keys = jax.random.split(key, (grid.size, 2000))
        one = lambda key, y: jnp.exp(q.estimate_log_q(key, y[None], target))
        values = jax.vmap(lambda keys, y: jax.vmap(lambda k: one(k, y))(keys))(keys, grid)
        return values.mean(axis=1), values.std(axis=1) / jnp.sqrt(2000)

    values, errors = jax.device_get(density(jax.random.key(2)))
    width = float(grid[1] - grid[0])
    total, error = values.sum() * width, np.sqrt((errors**2).sum()) * width
    assert abs(total - 1) < 4.5 * error and error < 0.01
    x, _ = weights(q, target, 100_000)
    counts, _ = np.histogram(x[:, 0], np.asarray(grid) - width / 2)
    expected, bulk = values[:-1] * len(x) * width, values[:-1] * len(x) * width > 50
    both = np.sqrt(expected + (errors[:-1] * len(x) * width) ** 2)
    # The histogram averages over a bin, the estimate is at its centre: 1 % for the curvature.
    assert np.max(np.abs(counts - expected)[bulk] / (both + 0.01 * expected)[bulk]) < 4.5


def test_scan_equals_unrolled_and_vmap_equals_loop():
    blocks = [Bend(jnp.log(1.1)), S.Langevin(num_steps=1, step_size=0.02)] * 2
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks)
    assert [(len(s.layers), s.repeats) for s in q.segments] == [(2, 2)]
    layers = tuple(S._segment.Segment((layer,), (False,), 1) for layer in q.layers)
    written_out = S.StochasticFlow(q.base, layers, q.logits, q.temperatures)
    keys = jax.random.split(jax.random.key(1), 3)

    def run(trained, static, key):
        q = eqx.combine(trained, static)
        x, log_q = q.sample_and_log_prob(key, log_density=double_well)
        return jnp.sum(x) + log_q + q.estimate_log_q(key, x, double_well)

    trained, static = eqx.partition(q, eqx.is_inexact_array)
    batch = jax.jit(jax.vmap(lambda key: run(trained, static, key)))(keys)
    slope = jax.jit(lambda key: jax.grad(run)(trained, static, key))(keys[1])
    value = run(trained, static, keys[1])  # without jit
    trained, static = eqx.partition(written_out, eqx.is_inexact_array)
    other, other_slope = jax.jit(lambda k: jax.value_and_grad(run)(trained, static, k))(keys[1])
    np.testing.assert_allclose([batch[1], value], other, rtol=1e-12)
    np.testing.assert_allclose(
        slope.segments[0].layers[1].log_step,
        [s.layers[0].log_step for s in other_slope.segments[1::2]],
        rtol=1e-11,
    )
    np.testing.assert_allclose(slope.logits, other_slope.logits, rtol=1e-11)


def test_behind_a_bijection_the_layers_stay_in_its_coordinates():
    affine = vf.bijections.Affine(jnp.array([1.0, -0.5]), jnp.array([0.7, 1.2]))
    q = family("langevin", 1)
    key = jax.random.key(4)
    x, log_q = q.through(affine).sample_and_log_prob(key, log_density=gaussian)
    pulled = lambda z: -0.5 * jnp.sum(z**2)
    z, log_q_z = q.sample_and_log_prob(key, log_density=pulled)
    moved, log_det = affine.forward_and_log_det(z)
    np.testing.assert_allclose(x, moved, rtol=1e-12)
    np.testing.assert_allclose(log_q, log_q_z - log_det, rtol=1e-12)
    estimate = q.through(affine).estimate_log_q(key, x, gaussian, 3)
    np.testing.assert_allclose(estimate, q.estimate_log_q(key, z, pulled, 3) - log_det, rtol=1e-10)


def test_a_step_that_is_not_finite_counts_with_weight_zero():
    with jax.enable_x64(False):
        block = S.Langevin(num_steps=3, step_size=50.0)
        q = vf.flows.stochastic_flow(jax.random.key(0), 1, [block])
        x, log_q = vf.sample_and_log_prob(
            jax.random.key(1), q, 50, log_density=lambda x: -jnp.sum(x**8)
        )
        assert x.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(x)))
        assert bool(jnp.any(jnp.isposinf(log_q)))
        assert not bool(jnp.any(jnp.isnan(log_q)))


def test_temperatures():
    blocks = [KINDS["metropolis"](), S.couplings(num_layers=2), KINDS["mala"](), KINDS["hmc"]()]
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks)
    np.testing.assert_allclose(q.schedule, [1 / 3, 1 / 3, 2 / 3, 1.0], rtol=1e-12)
    assert vf.params(q).logits is not None
    q = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks, temperatures=[0.0, 0.5, 1.0])
    np.testing.assert_allclose(q.schedule, [0.0, 0.0, 0.5, 1.0])
    fixed = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks, train_temperatures=False)
    assert jax.tree.leaves(vf.params(fixed).logits) == []


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: S.Langevin(num_steps=0, step_size=0.1), ValueError, "num_steps"),
        (lambda: S.HMC(num_steps=1, num_leapfrog=0, step_size=0.1), ValueError, "num_leapfrog"),
        (lambda: S.MALA(num_steps=1, step_size=-1.0), ValueError, "step_size"),
        (lambda: S.Metropolis(num_steps=1, step_size=1.0, grad="none"), ValueError, "grad"),
        (lambda: vf.flows.stochastic_flow(jax.random.key(0), 2, []), ValueError, "blocks"),
        (lambda: vf.flows.stochastic_flow(jax.random.key(0), 2, [3.0]), TypeError, "block 0"),
        (
            lambda: vf.flows.stochastic_flow(
                jax.random.key(0), 2, [KINDS["mala"]()], temperatures=[0.5, 1.0]
            ),
            ValueError,
            "temperatures",
        ),
        (
            lambda: vf.flows.stochastic_flow(
                jax.random.key(0), 2, [vf.bijections.Affine(jnp.zeros(3))]
            ),
            ValueError,
            "block 0",
        ),
        (lambda: family("mala", 1).log_prob(jnp.zeros(2)), vf.ProgramError, "estimate_log_q"),
        (lambda: family("mala", 1).sample(jax.random.key(0)), ValueError, "log_density"),
        (
            lambda: family("mala", 1).estimate_log_q(jax.random.key(0), jnp.zeros(3), gaussian),
            ValueError,
            "event shape",
        ),
    ],
    ids=[
        "steps", "leapfrog", "step_size", "grad", "empty", "block", "temperatures", "bijection",
        "log_prob", "no_target", "shape",
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
