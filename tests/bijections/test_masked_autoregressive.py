"""Masks, order, inverse and cost of the autoregressive layer; another library with equal weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vflow_kernels._fixed_point import _sweep

import vflow.bijections as vb
from tests.flows.registry import perturb
from vflow._core import combine, partition
from vflow.bijections._masked_mlp import hidden_ranks


def _layer(dim, scale=0.5, seed=1, **options):
    layer = vb.MaskedAutoregressive(jax.random.key(0), dim, **options)
    rng = np.random.default_rng(seed)
    moved = lambda a: a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(lambda a: moved(a) if eqx.is_inexact_array(a) else a, layer)


@eqx.filter_jit
def _both(layer, x):
    return layer.forward_and_log_det(x), layer.inverse_and_log_det(x)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("dim", "width"), [(1, 3), (2, 1), (5, 4), (5, 11), (9, 3)])
def test_hidden_ranks_are_spread_evenly(dim, width, conditional):
    ranks = hidden_ranks(dim, width, conditional=conditional)
    possible = np.arange(-1 if conditional or dim == 1 else 0, dim - 1)
    assert set(ranks) <= set(possible)
    counts = (ranks[:, None] == possible).sum(0)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(ranks) >= 0).all()


@pytest.mark.parametrize(
    ("hidden", "condition_dim"), [((), None), ((9, 6), None), ((7,), 2)], ids=str
)
def test_the_jacobian_is_triangular_in_the_order_and_full_below(hidden, condition_dim):
    order = np.array([2, 0, 4, 1, 3])
    layer = _layer(5, hidden=hidden, condition_dim=condition_dim, order=order)
    condition = None if condition_dim is None else jnp.array([0.3, -1.0])
    at = jnp.linspace(-1.0, 1.0, 5)
    forward = lambda x, c: layer.forward_and_log_det(x, c)[0]
    jacobian, by_condition = jax.jit(jax.jacfwd(forward, (0, 1)))(at, condition)
    jacobian = np.asarray(jacobian)[np.ix_(order, order)]
    assert (np.triu(jacobian, 1) == 0).all()
    assert (np.tril(jacobian) != 0).sum() == 15  # every coordinate sees all those before it
    if condition is not None:
        assert (np.asarray(by_condition) != 0).all()  # and all of the condition


def test_an_inverse_is_not_followed_by_a_pass():
    """The solver's steps know the slopes; what XLA sees is one product for each matrix."""
    layer = _layer(5, hidden=(6, 4))
    inverse = jax.jit(lambda y: layer.inverse_and_log_det(y))
    assert inverse.lower(jnp.ones(5)).as_text().count("stablehlo.dot_general") == 3


def test_the_inverse_is_the_masked_autoregressive_flow():
    """u -> x = (u - m(x_<)) exp(-s(x_<)), coordinate by coordinate, in numpy."""
    layer = _layer(4, hidden=(6,), activation="tanh")
    network = layer.conditioner.masked()
    (w1, w2), (b1, b2) = (
        [np.asarray(a) for a in arrays] for arrays in (network.weights, network.biases)
    )
    u, x = np.array([0.5, -1.0, 2.0, 0.1]), np.zeros(4)
    log_det = 0.0
    for i in range(4):
        shift, raw = (np.tanh(x @ w1 + b1) @ w2 + b2).reshape(2, 4)[:, i]
        log_scale = 4 / np.pi * np.arctan(raw / 2)
        x[i] = (u[i] - shift) * np.exp(-log_scale)
        log_det -= log_scale
    out, out_log_det = _both(layer, jnp.asarray(u))[1]
    np.testing.assert_allclose(out, x, rtol=1e-12)
    np.testing.assert_allclose(out_log_det, log_det, rtol=1e-12)


class _SoftplusAffine(vb.AbstractTransformer):
    """The affine transformer of flowjax: y = softplus(raw + softplus^-1(1)) x + shift."""

    num_params: int = eqx.field(static=True, default=2)

    def forward(self, x, params):
        scale = jax.nn.softplus(params[1] + jnp.log(jnp.expm1(1.0)))
        return scale * x + params[0], jnp.log(scale)

    def inverse(self, y, params):
        scale = jax.nn.softplus(params[1] + jnp.log(jnp.expm1(1.0)))
        return (y - params[0]) / scale, -jnp.log(scale)


def test_flowjax_with_the_same_weights():
    flowjax = pytest.importorskip("flowjax.bijections")
    paramax = pytest.importorskip("paramax")
    dim, width = 4, 6
    affine = flowjax.Affine()
    options = {"dim": dim, "nn_width": width, "nn_depth": 2, "nn_activation": jnp.tanh}
    with jax.numpy_rank_promotion("allow"):
        theirs = flowjax.MaskedAutoregressive(jax.random.key(1), transformer=affine, **options)
        theirs = paramax.unwrap(theirs)
    layers = theirs.masked_autoregressive_mlp.layers
    # Their units have ranks 0 1 2 0 1 2, ours 0 0 1 1 2 2; their last layer has coordinates first.
    sort = np.argsort(np.arange(width) % (dim - 1), kind="stable")
    last = np.arange(2 * dim).reshape(dim, 2).T.reshape(-1)
    ours = _layer(dim, hidden=(width, width), activation="tanh", transformer=_SoftplusAffine())
    takes = (slice(None), sort, sort), (sort, sort, last)
    weights = [layer.weight[o][:, i].T for layer, i, o in zip(layers, *takes, strict=True)]
    biases = [layer.bias[o] for layer, o in zip(layers, takes[1], strict=True)]
    ours = eqx.tree_at(
        lambda layer: (layer.conditioner.network.weights, layer.conditioner.network.biases),
        ours,
        (tuple(weights), tuple(biases)),
    )
    x = jnp.array([0.3, -0.7, 1.1, 0.2])
    with jax.numpy_rank_promotion("allow"):
        forward, inverse = theirs.transform_and_log_det(x), theirs.inverse_and_log_det(x)
    for out, expected in zip(jax.tree.leaves(_both(ours, x)), (*forward, *inverse), strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_sweeps_stop_early_and_are_exact_at_the_latest_after_dim():
    """Weakly coupled: a few sweeps; a shift register, where nothing converges before the end: all."""
    dim = 12
    weak = 0.05 * jnp.tril(jnp.ones((dim, dim)), -1)
    start = jnp.ones(dim)
    value, count = _sweep(lambda v: start - weak @ v, start, None)
    exact = np.linalg.solve(np.eye(dim) + weak, start)
    np.testing.assert_allclose(value, exact, rtol=1e-13)
    assert count < dim
    rough, fewer = _sweep(lambda v: start - weak @ v, start, 1e-3)
    assert fewer < count
    np.testing.assert_allclose(rough, exact, rtol=1e-2)
    register = lambda v: jnp.concatenate([jnp.ones(1), 3 * v[:-1]])
    value, count = _sweep(register, jnp.zeros(dim), None)
    np.testing.assert_array_equal(value, 3.0 ** np.arange(dim))
    assert count == dim


def test_second_derivatives_of_the_inverse():
    """Forward over reverse and reverse over reverse of the implicit rule, against differences."""
    layer = _layer(3, hidden=(5,))
    trained, rest = partition(layer)

    def slope(y, step):
        moved = combine(jax.tree.map(lambda a: (1 + step) * a, trained), rest)
        back, log_det = jax.vjp(lambda y: moved.inverse_and_log_det(y), y)[0]
        return jnp.sum(jnp.sin(back)) + log_det

    y = jnp.array([0.3, -1.0, 0.7])
    gradient = jax.jit(lambda y, step: jnp.append(*jax.grad(slope, (0, 1))(y, step)))
    hessian = jax.jit(jax.hessian(lambda z: slope(z[:3], z[3])))(jnp.append(y, 0.0))
    by_reverse = jax.jit(jax.jacrev(lambda z: gradient(z[:3], z[3])))(jnp.append(y, 0.0))
    np.testing.assert_allclose(hessian, by_reverse, rtol=1e-9, atol=1e-9)
    steps = 1e-5 * np.eye(4)
    differences = [(gradient(y + e[:3], e[3]) - gradient(y - e[:3], -e[3])) / 2e-5 for e in steps]
    np.testing.assert_allclose(hessian, np.stack(differences), rtol=1e-6, atol=1e-6)


def test_float32_inverse_at_large_inputs():
    with jax.enable_x64(False):
        layer = _layer(6, hidden=(8,))
        y = jnp.array([1e4, -1e4, 3e3, 0.0, 1e-3, -1e4], jnp.float32)
        x, log_det = _both(layer, y)[1]
        again, minus = _both(layer, x)[0]
        np.testing.assert_allclose(again / 1e4, y / 1e4, atol=1e-5)
        np.testing.assert_allclose(log_det, -minus, rtol=1e-5)
        assert np.isfinite(jax.jit(lambda y: layer.push_score(y, y))(y)[2]).all()


DIM, LAYERS, HIDDEN, BATCH = 16, 4, (128,), 256


def _flops(gradient, stack):
    """Flops of the gradient of -ELBO on a quartic target; a loop's body counts once."""
    trained, rest = partition(stack)

    def objective(trained, z):
        def one(z):
            stack = combine(trained, rest)
            if gradient == "total":
                y, log_det = stack.forward_and_log_det(z)
                return 0.05 * jnp.sum(y**4) - log_det
            y, _, score = stack.forward_with_score(z, -z)
            return 0.05 * jnp.sum(y**4) + jax.lax.stop_gradient(score) @ y

        return jnp.mean(jax.vmap(one)(z))

    lowered = jax.jit(jax.grad(objective)).lower(trained, jnp.ones((BATCH, DIM), jnp.float32))
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.optimised
def test_a_sweep_of_the_score_costs_a_third_of_the_ordinary_gradient():
    """One product with the transposed Jacobian a sweep: X of F + X + W. So k sweeps cost k thirds.

    The flop count sees the body of the loop of sweeps once: the gate is on one sweep.
    """
    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), LAYERS)
        stack = vb.Chain([vb.MaskedAutoregressive(key, DIM, hidden=HIDDEN) for key in keys])
        stack = perturb(stack, jax.random.key(1), 0.1)
        ratio = _flops("path", stack) / _flops("total", stack)
    assert 1.2 < ratio < 1.45


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "MaskedAutoregressive: dim"),
        ({"order": jnp.array([0, 0])}, "MaskedAutoregressive: order must hold each of 0 to 1 once"),
        ({"order": jnp.arange(3)}, "MaskedAutoregressive: order"),
        ({"transformer": "cubic"}, "transformer must be"),
        ({"hidden": (0,)}, "hidden must hold widths"),
        ({"activation": "swoosh"}, "activation must be"),
        ({"condition_dim": 0}, "MaskedAutoregressive: condition_dim"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        vb.MaskedAutoregressive(jax.random.key(0), **{"dim": 2, **options})
