"""Options and costs of planar, radial and Sylvester flows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from vflow._core import combine, partition

CONSTRUCTORS = {name: getattr(vf.flows, name) for name in ("planar", "radial", "sylvester")}


def _flops(gradient, num_layers=8, dim=32, batch=64):
    """Flops of one compiled gradient less those of its normal draws.

    Layers are unrolled: XLA counts the body of a loop once.
    """
    flow = vf.flows.planar(jax.random.key(0), dim, num_layers=num_layers)
    first, scan = flow.bijection.layers
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], scan.layers) for i in range(num_layers)]
    unrolled = vf.distributions.Flow(flow.base, vf.bijections.Chain([first, *layers]))
    trained, rest = partition(unrolled)

    def loss(trained):
        draw = lambda key: combine(trained, rest).sample_and_log_prob(key, gradient=gradient)
        x, log_q = jax.vmap(draw)(jax.random.split(jax.random.key(1), batch))
        return jnp.mean(log_q + jnp.sum(x**4, 1))

    def normals():
        draw = lambda key: jax.random.normal(key, (dim,))
        return jax.vmap(draw)(jax.random.split(jax.random.key(1), batch))

    def count(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    return count(jax.grad(loss), trained) - count(normals)


@pytest.mark.optimised
def test_path_gradient_of_a_planar_layer_costs_two_vector_products():
    """Eight against six products of length d a layer: 4/3 without what is around the layers."""
    with jax.enable_x64(False):
        ratio = _flops("path") / _flops("total")
    assert 1.2 < ratio < 1.345


def test_triangular_orders_alternate_and_do_not_depend_on_the_key():
    make = lambda seed: vf.flows.sylvester(
        jax.random.key(seed), 5, rank=5, num_layers=4, variant="triangular"
    )
    orders = [np.asarray(make(seed).bijection.layers[1].layers.basis) for seed in (0, 1)]
    np.testing.assert_array_equal(*orders)
    np.testing.assert_array_equal(orders[0][0], np.arange(5))
    np.testing.assert_array_equal(orders[0][1::2], orders[0][::2, ::-1])
    assert (orders[0][2] != orders[0][0]).any()


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_one_coordinate_base_and_tails(name):
    base = vf.distributions.StudentT(jnp.full(1, 4.0))
    tails = vf.bijections.Affine(jnp.ones(1), 2.0)
    flow = CONSTRUCTORS[name](jax.random.key(0), 1, base=base, tails=tails, num_layers=1)
    expected = base.log_prob(jnp.zeros(1)) - np.log(2)
    np.testing.assert_allclose(flow.log_prob(jnp.ones(1)), expected, rtol=1e-9)


@pytest.mark.optimised
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_compiled_program_does_not_grow_with_layers(name):
    def size(num_layers):
        flow = CONSTRUCTORS[name](jax.random.key(0), 3, num_layers=num_layers)
        return len(
            jax.jit(lambda key: flow.sample(key)).lower(jax.random.key(0)).as_text().splitlines()
        )

    assert size(8) == size(2)


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"base": vf.distributions.Normal(3)}, "base"),
        ({"tails": vf.bijections.Identity((3,))}, "tails"),
    ],
)
def test_bad_arguments_are_named(name, options, match):
    with pytest.raises(ValueError, match=rf"{name}: {match}"):
        CONSTRUCTORS[name](jax.random.key(0), **{"dim": 2, **options})


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("planar", {"condition_dim": 0}, "condition_dim"),
        ("planar", {"condition_dim": 2, "hidden": (0,)}, "hidden"),
        ("sylvester", {"rank": 3}, "rank"),
        ("sylvester", {"rank": 0}, "rank"),
        ("sylvester", {"num_reflections": 0}, "num_reflections"),
        ("sylvester", {"variant": "round"}, "variant"),
    ],
)
def test_bad_options_are_named(name, options, match):
    with pytest.raises(ValueError, match=match):
        CONSTRUCTORS[name](jax.random.key(0), 2, **options)
