"""The residual layer: its certified bound, formula and inverse; the Russian-roulette log-det."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vflow_kernels import spectral_bound

import vflow as vf
import vflow.bijections as vb
from vflow._core._mlp import _ACTIVATIONS
from vflow.bijections._residual import _LIPSCHITZ
from vflow.bijections._roulette import roulette_log_det


@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (64, 64), (64, 3)], ids=str)
def test_spectral_bound_is_above_the_norm_and_close(shape):
    rng = np.random.default_rng(0)
    bound_and_slope = jax.jit(jax.value_and_grad(spectral_bound))
    bound = lambda matrix: bound_and_slope(matrix)[0]
    for size in (1e-6, 1.0, 1e6):
        matrix = size * rng.normal(size=shape)
        exact = np.linalg.norm(matrix, 2)
        value = bound(jnp.asarray(matrix))
        assert exact * (1 - 1e-12) <= value <= exact * min(shape) ** (1 / 256) * (1 + 1e-12)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(max(shape), max(shape))))
    assert bound(jnp.asarray(orthogonal)) >= 1 - 1e-12  # all singular values equal: the worst case
    _, gradient = bound_and_slope(jnp.zeros(shape))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS))
def test_the_slopes_of_the_activations_are_bounded(name):
    slope = jax.vmap(jax.grad(_ACTIVATIONS[name]))(jnp.linspace(-10.0, 10.0, 20_001))
    assert jnp.max(jnp.abs(slope)) <= _LIPSCHITZ.get(name, 1.0)


def _layer(scale, *, hidden=(6, 5), **options):
    layer = vb.Residual(jax.random.key(0), 3, hidden=hidden, **options)
    rng = np.random.default_rng(1)
    moved = lambda a: a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(lambda a: moved(a) if eqx.is_inexact_array(a) else a, layer)


def test_formula():
    """x + W3 s(W2 s(W1 x + b1) + b2) + b3, s(z) = z / (1 + e^-z) / 1.1; small weights are left alone."""
    layer = _layer(0.0)
    rng = np.random.default_rng(2)
    weights = [0.2 * rng.normal(size=w.shape) for w in layer.network.weights]
    biases = [rng.normal(size=b.shape) for b in layer.network.biases]
    layer = eqx.tree_at(
        lambda b: (b.network.weights, b.network.biases),
        layer,
        jax.tree.map(jnp.asarray, (tuple(weights), tuple(biases))),
    )
    at = np.array([0.5, -1.0, 2.0])
    h = at
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        h = h @ w + b
        h = h / (1 + np.exp(-h)) / 1.1
    y, _ = eqx.filter_jit(vb.Residual.forward_and_log_det)(layer, jnp.asarray(at))
    np.testing.assert_allclose(y, at + h @ weights[-1] + biases[-1], rtol=1e-12)


@pytest.mark.parametrize("lipschitz", [0.5, 0.97])
def test_the_bound_holds_for_any_weights(lipschitz):
    layer = _layer(30.0, lipschitz=lipschitz)
    points = jax.random.normal(jax.random.key(3), (200, 3))
    contraction = lambda x: layer.forward_and_log_det(x)[0] - x
    jacobians = jax.jit(jax.vmap(jax.jacfwd(contraction)))(points)
    assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() <= lipschitz
    run = jax.jit(jax.vmap(lambda y: layer.inverse_and_log_det(y)))
    back, log_det = run(1e3 * points)
    again, minus = jax.jit(jax.vmap(lambda x: layer.forward_and_log_det(x)))(back)
    np.testing.assert_allclose(again, 1e3 * points, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(log_det, -minus, rtol=1e-10, atol=1e-10)


NUM_ESTIMATES = 20_000
POINT = jnp.array([0.2, -0.5, 0.3])
MATRIX = jnp.array([[-0.7, 0.2, 0.0], [0.1, -0.6, 0.2], [-0.2, 0.0, 0.4]])
LIPSCHITZ = 0.85


@pytest.fixture(scope="module")
def estimates():
    """Estimates for g(x) = M tanh(x) and their gradients, the truth, and the first two terms."""
    assert np.linalg.norm(MATRIX, 2) < LIPSCHITZ
    map_of = lambda matrix: lambda x: matrix @ jnp.tanh(x)

    def estimate(matrix, x, key):
        frozen = map_of(jax.lax.stop_gradient(matrix))
        return roulette_log_det(key, map_of(matrix), frozen, x, LIPSCHITZ)

    def exact(matrix, x):
        return jnp.linalg.slogdet(jnp.eye(3) + jax.jacfwd(map_of(matrix))(x))[1]

    def short(matrix, x):
        jacobian = jax.jacfwd(map_of(matrix))(x)
        return jnp.trace(jacobian) - jnp.trace(jacobian @ jacobian) / 2

    @jax.jit
    def run(matrix, x, keys):
        draws = jax.vmap(jax.value_and_grad(estimate, (0, 1)), (None, None, 0))(matrix, x, keys)
        return draws, *(jax.value_and_grad(f, (0, 1))(matrix, x) for f in (exact, short))

    out = run(MATRIX, POINT, jax.random.split(jax.random.key(5), NUM_ESTIMATES))
    return [(value, *slopes) for value, slopes in out]


@pytest.mark.parametrize("what", [0, 1, 2], ids=["value", "weights", "point"])
def test_roulette_is_unbiased(estimates, what):
    """Within 4.5 standard errors, themselves small; the series cut after two terms is far off."""
    draws, exact, short = (np.asarray(parts[what]) for parts in estimates)
    error = draws.std(axis=0) / NUM_ESTIMATES**0.5
    assert error.max() < 0.02 * np.abs(exact).max()
    assert (np.abs(draws.mean(axis=0) - exact) < 4.5 * error).all()
    assert (np.abs(short - exact) > 9 * error).any()


@pytest.fixture(scope="module")
def roulette():
    return _layer(1.0, hidden=(4,), lipschitz=0.8, log_det="roulette")


def test_only_objectives_linear_in_log_q_are_estimated(roulette):
    """The estimate is a while loop in the program; the exact log-det has none."""
    layers = vb.Chain([vb.Freeze(vb.Affine(jnp.zeros(3))), vb.Scan.stack([roulette])])
    flow = vf.distributions.Flow(vf.distributions.Normal(3), layers)

    def log_weight(q):
        x, log_q = q.simulate()
        return jnp.where(jnp.isfinite(log_q), -jnp.sum(x**4) - log_q, -jnp.inf)

    def compared(q):
        log_q = q.simulate()[1]
        return log_q + jnp.where(log_q > 0, 1.0, 2.0)

    def estimated(function, *args):
        return "while[" in str(jax.make_jaxpr(function)(jax.random.key(0), *args))

    mean = lambda q: jnp.mean(vf.vmap(lambda: log_weight(q), 3))
    bound = lambda q: jax.nn.logsumexp(vf.vmap(lambda: log_weight(q), 3))
    stopped = lambda q: jnp.exp(jax.lax.stop_gradient(q.simulate()[1]))
    weighted = lambda q: jnp.multiply(*map(jnp.sum, q.simulate()))
    for objective in (mean, weighted):
        assert estimated(vf.expect(objective), flow)
    for objective in (bound, stopped, compared):
        assert not estimated(vf.expect(objective), flow)
    assert not estimated(lambda key, q: q.sample_and_log_prob(key), flow)
    assert not estimated(lambda key, q: vf.sample_and_log_prob(key, q, 3), flow)


def test_roulette_refuses_what_would_be_biased_or_dense(roulette):
    flow = vf.distributions.Flow(vf.distributions.Normal(3), roulette)
    assert "roulette" in flow.path_refusal()
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.make_jaxpr(
            jax.hessian(lambda x: roulette.forward_and_estimate(jax.random.key(0), x)[1])
        )(POINT)

    @jax.jit
    def both(layer, key):
        return layer.forward_and_log_det(POINT), layer.forward_and_estimate(key, POINT)

    (y, exact), (again, estimate) = both(roulette, jax.random.key(0))
    np.testing.assert_allclose(again, y, rtol=1e-12)
    assert estimate != exact


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "Residual: dim"),
        ({"lipschitz": 1.0}, "Residual: lipschitz"),
        ({"condition_dim": 0}, "Residual: condition_dim"),
        ({"log_det": "guess"}, "Residual: log_det"),
        ({"activation": "swoosh"}, "activation must be"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        vb.Residual(jax.random.key(0), **{"dim": 2, **options})
