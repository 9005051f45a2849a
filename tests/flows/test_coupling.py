"""Splits, options and costs of coupling flows; closed forms of the Gaussian families."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from vflow_kernels._filled import materialised

import vflow as vf
from tests.flows.registry import perturb
from vflow._core import combine, partition
from vflow._core._mlp import MLP
from vflow.bijections import Chain
from vflow.flows._splits import splits, swaps


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 8, 11, 30])
def test_every_coordinate_meets_every_other_within_eight_layers(dim):
    orders = splits(dim, 8)
    assert (np.sort(orders, 1) == np.arange(dim)).all()
    seen = np.zeros((dim, dim), bool)
    for layer, order in enumerate(orders):
        seen[np.ix_(order[: dim // 2], order[dim // 2 :])] = True
        if layer % 2:
            moved = np.union1d(order[dim // 2 :], orders[layer - 1][dim // 2 :])
            assert moved.size == dim  # each pair of layers transforms every coordinate
    share = (seen.sum() / (dim * (dim - 1))).item()
    assert share == 1 if dim <= 16 else share > 0.95


def test_swaps_lead_from_order_to_order_and_home():
    orders = splits(7, 5)
    x = np.arange(7)
    for order, permutation in zip(orders, swaps(7, 5), strict=True):
        np.testing.assert_array_equal(x, order)
        x = x[permutation]
    np.testing.assert_array_equal(x, np.arange(7))


def test_base_coordinates_keep_their_places():
    base = vf.distributions.StudentT(jnp.array([jnp.inf, 1.0, jnp.inf, jnp.inf, 1.0]))
    flow = vf.flows.coupling(jax.random.key(0), 5, base=base, num_layers=3, hidden=(4,))
    x = jnp.arange(5.0)
    np.testing.assert_allclose(flow.bijection.forward_and_log_det(x)[0], x)


def test_normalised_layers_see_a_standard_base_and_the_flow_starts_at_the_given_one():
    tails = vf.distributions.StudentT(jnp.array([1.5, 3.0, jnp.inf]))
    shift = vf.bijections.Affine(jnp.array([1e3, 0.0, -1.0]), jnp.array([1.0, 50.0, 1e-3]))
    base = vf.distributions.Flow(tails, shift)
    options = {"base": base, "num_layers": 2, "hidden": (4,), "actnorm": True}
    flow = vf.flows.coupling(jax.random.key(0), 3, **options)

    @jax.jit
    def run(key):
        draw, stop = base.sample(key), flow.bijection.layers[0]
        return draw, stop.forward_and_log_det(draw)[0], flow.bijection.forward_and_log_det(draw)

    draws, seen, (out, log_det) = jax.vmap(run)(jax.random.split(jax.random.key(1), 4000))
    low, middle, high = np.quantile(seen, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(middle, 0, atol=0.15)
    np.testing.assert_allclose((high - low) / 1.349, 1, atol=0.15)
    np.testing.assert_allclose(out, draws, rtol=1e-11)
    np.testing.assert_allclose(log_det, 0, atol=1e-12)


def test_structure_does_not_depend_on_the_key():
    a, b = (vf.flows.coupling(jax.random.key(s), 4, num_layers=2, hidden=(3,)) for s in (0, 1))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    integers = [
        eqx.filter(f, lambda leaf: eqx.is_array(leaf) and leaf.dtype == jnp.int32) for f in (a, b)
    ]
    assert eqx.tree_equal(*integers)
    assert not eqx.tree_equal(a, b)


def test_one_coordinate_can_bend():
    """In one dimension the layers are not affine: the log density is not a parabola."""
    flow = perturb(vf.flows.coupling(jax.random.key(0), 1, num_layers=2), jax.random.key(1))
    third = jax.grad(jax.grad(jax.grad(lambda x: flow.log_prob(x[None]))))
    assert abs(third(jnp.asarray(0.3))) > 1e-2


def _cost(gradient, flow):
    """Flops and matrix products of one compiled gradient."""
    trained, rest = partition(flow)
    keys = jax.random.split(jax.random.key(2), 512)

    def loss(trained):
        flow = combine(trained, rest)
        draw = lambda key: flow.sample_and_log_prob(key, gradient=gradient)
        x, log_q = jax.vmap(draw)(keys)
        return jnp.mean(log_q + jnp.sum(x**4, 1))

    compiled = jax.jit(jax.grad(loss)).lower(trained).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    return np.array([analysis["flops"], compiled.as_text().count(" dot(")])


@pytest.mark.optimised
def test_path_gradient_costs_four_thirds():
    """XLA merges the two tracks, unrolled (where its flop count sees every layer) and scanned."""
    with jax.enable_x64(False):
        flow = vf.flows.coupling(jax.random.key(0), 64, hidden=(128, 128))
        flow = perturb(flow, jax.random.key(1))
        scan, affine = flow.bijection.layers
        arrays, static = eqx.partition(scan.layers, eqx.is_array)
        layers = [
            eqx.combine(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), static) for i in range(8)
        ]
        unrolled = vf.distributions.Flow(flow.base, Chain([*layers, affine]))
        flops, dots = _cost("path", unrolled) / _cost("total", unrolled)
        assert flops < 1.345
        assert dots < 1.345
        _, dots = _cost("path", flow) / _cost("total", flow)
        assert dots < 1.345


def test_gaussian_is_a_gaussian():
    flow = perturb(vf.flows.gaussian(jax.random.key(0), 3, covariance="full"), jax.random.key(1))
    loc, tril = np.asarray(flow.bijection.loc), np.asarray(flow.bijection.tril)
    x = np.array([0.3, -2.0, 1.0])
    expected = scipy.stats.multivariate_normal.logpdf(x, loc, tril @ tril.T)
    np.testing.assert_allclose(flow.log_prob(jnp.asarray(x)), expected, rtol=1e-12)
    diagonal = perturb(vf.flows.gaussian(jax.random.key(0), 3), jax.random.key(1))
    scale = np.exp(diagonal.bijection.log_scale)
    expected = scipy.stats.norm.logpdf(x, diagonal.bijection.loc, scale).sum()
    np.testing.assert_allclose(diagonal.log_prob(jnp.asarray(x)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"hidden": (4, 0)}, "hidden"),
        ({"condition_dim": 0}, "condition_dim"),
        ({"transformer": "wavy"}, "transformer"),
        ({"activation": "swoosh"}, "activation"),
        ({"base": vf.distributions.Normal(3)}, "base"),
        ({"tails": vf.bijections.Identity((3,))}, "tails"),
        ({"mixing": "shake"}, "mixing must be one of 'permute', 'lu', 'householder'"),
        ({"mixing": "lu", "shared_trunk": True}, "shared_trunk has neither"),
        ({"loft": 0.0}, "threshold"),
    ],
)
def test_coupling_names_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        vf.flows.coupling(jax.random.key(0), **{"dim": 2, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "dim"),
        ({"covariance": "round"}, "covariance"),
        ({"rank": 1}, "rank"),
        ({"covariance": "low_rank", "rank": 3}, "rank"),
        ({"covariance": "low_rank", "rank": 0}, "rank"),
    ],
)
def test_gaussian_names_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        vf.flows.gaussian(jax.random.key(0), **{"dim": 2, **options})


def test_a_shared_trunk_grows_slowly():
    """From 2 to 16 layers, under twice the parameters; separate networks grow eightfold."""

    def size(num_layers, shared):
        flow = vf.flows.coupling(
            jax.random.key(0), 4, num_layers=num_layers, hidden=(64, 64), shared_trunk=shared
        )
        return sum(leaf.size for leaf in jax.tree.leaves(vf.params(flow.bijection.layers[0])))

    assert size(16, True) < 2 * size(2, True)
    assert size(16, False) == 8 * size(2, False)
    assert size(16, True) < size(16, False) / 4


@pytest.mark.parametrize("hidden", [(), (5, 7), (64,)], ids=["none", "narrow", "wide"])
def test_parts_of_a_network_are_its_outputs(hidden):
    """One form has the batch last and its biases in a product: the numbers are those of the formula."""
    network = perturb(MLP(jax.random.key(0), 3, 8, hidden, "tanh"), jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (6, 3))
    outputs = x
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        outputs = np.asarray(outputs) @ np.asarray(weight) + np.asarray(bias)
        outputs = np.tanh(outputs) if i < len(hidden) else outputs
    parts = jax.vmap(lambda x: network.rows(x, 2))(x)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), outputs, rtol=1e-13)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (network, x))
    low = jnp.concatenate(jax.vmap(lambda net, x: net.rows(x, 2), (None, 0))(*single), axis=1)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, outputs, rtol=1e-5, atol=1e-6)
    for i in range(2):
        np.testing.assert_allclose(network.rows(x[0], 2)[i], parts[i][0], rtol=1e-13)
    no_input = perturb(MLP(jax.random.key(0), 0, 4, hidden), jax.random.key(1))
    np.testing.assert_allclose(
        jnp.concatenate(no_input.rows(jnp.zeros(0), 2)), no_input(jnp.zeros(0)), rtol=1e-13
    )


@pytest.mark.optimised
def test_narrow_networks_of_a_batch_work_on_long_rows():
    """XLA's elementwise code for rows of fewer than 48 numbers is six times slower (`MLP.rows`)."""
    flow = vf.flows.coupling(jax.random.key(0), 10, hidden=(20, 24))
    draw = jax.jit(lambda key: vf.sample_and_log_prob(key, flow, 250))
    hlo = draw.lower(jax.random.key(0)).compile().as_text()
    for width in (20, 24):
        assert f"[{width},250]" in hlo
        assert f"[250,{width}]" not in hlo


def test_what_relu_keeps_for_its_derivative_has_the_batch_last():
    flow = vf.flows.coupling(jax.random.key(0), 10, hidden=(20, 24), activation="relu")
    trained, static = partition(flow)

    def density(trained):
        flow = combine(trained, static)
        return jnp.sum(vf.sample_and_log_prob(jax.random.key(0), flow, 25)[1])

    text = jax.jit(jax.grad(density)).lower(trained).as_text()
    assert "tensor<20x25xi1>" in text
    assert "tensor<25x20xi1>" not in text


def test_permutations_have_a_gather_for_a_derivative():
    permute = vf.bijections.Permute(jnp.array([2, 0, 3, 1]))
    x, weight = jnp.arange(4.0), jnp.array([0.3, -2.0, 5.0, 0.7])
    forward = lambda x: permute.forward_and_log_det(x)[0]
    inverse = lambda y: permute.inverse_and_log_det(y)[0]
    matrix = np.eye(4)[[2, 0, 3, 1]]
    for run, expected in ((forward, matrix), (inverse, matrix.T)):
        np.testing.assert_array_equal(jax.jacfwd(run)(x), expected)
        np.testing.assert_array_equal(jax.jacrev(run)(x), expected)
        second = jax.hessian(lambda x, run=run: jnp.sum(weight * run(x) ** 2))(x)
        np.testing.assert_allclose(second, 2 * expected.T @ np.diag(weight) @ expected)
        gradient = jax.vmap(jax.grad(lambda x, run=run: jnp.sum(weight * run(x) ** 2)))
        assert "scatter" not in jax.jit(gradient).lower(jnp.ones((3, 4))).as_text()


def test_memory_is_transparent_to_derivatives():
    """`materialised` divides by a one that depends on its argument; no derivative sees that."""
    run = lambda x: jnp.sin(materialised(x))
    x = jnp.array([-3.0, 0.0, 2.0])
    np.testing.assert_allclose(jax.jacfwd(run)(x), np.diag(np.cos(x)), rtol=1e-14)
    np.testing.assert_allclose(jax.hessian(lambda x: run(x)[0])(x)[0, 0], np.sin(3.0), rtol=1e-14)
    primal, tangent = jax.jvp(materialised, (jnp.array([jnp.inf]),), (jnp.ones(1),))
    assert primal[0] == jnp.inf
    assert tangent[0] == 1
