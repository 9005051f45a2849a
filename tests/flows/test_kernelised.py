"""Kernelised flows: parameters, where the centres start, bad arguments, one fit to 500 rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf


def _kernels(flow):
    """The stacked kernelised layers."""
    return flow.bijection.layers[0].layers.layers[0]


@pytest.mark.parametrize(("dim", "condition_dim"), [(5, None), (4, 4)])
def test_number_of_parameters(dim, condition_dim):
    layers, n, k, c = 2, 6, dim // 2, condition_dim or 0
    flow = vf.flows.kernelised(
        jax.random.key(0), dim, num_layers=layers, num_centres=n, condition_dim=condition_dim
    )
    count = sum(a.size for a in jax.tree.leaves(vf.params(flow)))
    assert count == layers * (n * (k + c) + 2 * n * (dim - k) + k + c) + 2 * dim


def test_centres_start_among_the_data_as_each_layer_sees_them():
    data = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)) * [1, 10, 100, 1000])
    condition = data + 1e4
    flow = vf.flows.kernelised(
        jax.random.key(1),
        4,
        num_layers=2,
        condition_dim=4,
        data=data,
        condition=condition,
        num_centres=6,
    )
    rows = {tuple(sorted(row)) for row in np.asarray(data)}
    sizes = []
    for centres in np.asarray(_kernels(flow).centres):
        for centre in centres:
            passive, row = centre[:2], centre[2:] - 1e4
            np.testing.assert_allclose(sorted(row), min(rows, key=lambda r: abs(r[0] - min(row))))
            assert all(np.abs(row - value).min() < 1e-6 for value in passive)
        sizes.append(tuple(np.abs(centres[:, :2]).max(0) > 50))
    assert len(set(sizes)) > 1  # layers hold different coordinates fixed, and so do their centres
    assert len({float(a[0, 0]) for a in _kernels(flow).centres}) > 1


def test_without_data_they_start_among_base_draws():
    base = vf.distributions.Normal(2)
    base = vf.distributions.Flow(base, vf.bijections.Affine(jnp.zeros(2), jnp.array([1.0, 50.0])))
    flow = vf.flows.kernelised(jax.random.key(2), 2, base=base, num_centres=30, num_layers=2)
    narrow, wide = np.abs(np.asarray(_kernels(flow).centres)[..., 0])  # layers swap roles
    assert 1 < narrow.max() < 5 and 50 < wide.max() < 250


def test_data_are_pulled_back_through_the_tails():
    tails = vf.bijections.Affine(jnp.full(2, 7.0), 100.0)
    data = jnp.asarray(np.random.default_rng(1).normal(size=(20, 2)))
    flows = [
        vf.flows.kernelised(
            jax.random.key(3), 2, num_layers=2, num_centres=5, data=points, tails=last
        )
        for points, last in ((data, None), (100 * data + 7, tails))
    ]
    np.testing.assert_allclose(_kernels(flows[1]).centres, _kernels(flows[0]).centres, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dim": 1}, "dim = 1 without a condition"),
        ({"num_layers": 0}, "num_layers"),
        ({"condition_dim": -1}, "condition_dim"),
        ({"num_centres": 1}, "num_centres"),
        ({"data": np.zeros((4, 2))}, r"data must have shape \(n, 3\)"),
        ({"data": np.full((4, 3), np.nan)}, "data must be finite"),
        ({"condition": np.zeros((4, 2))}, "data is None"),
        ({"data": np.zeros((4, 3)), "condition": np.zeros((4, 2))}, "come with their condition"),
        (
            {"data": np.zeros((4, 3)), "condition": np.zeros((3, 2)), "condition_dim": 2},
            r"condition must have shape \(4, 2\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        vf.flows.kernelised(jax.random.key(0), **({"dim": 3} | change))
