"""Kernelised flows: parameters, where the centres start, bad arguments, one fit to 500 rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def _banana6(rng, n):
    """Rows and their mean log density, -6.6165 in the limit."""
    z = rng.normal(size=(n, 6))
    x = z.copy()
    x[:, 1] = 0.5 * z[:, 1] + z[:, 0] ** 2 - 1
    x[:, 3] = z[:, 3] * np.exp(0.5 * z[:, 2])
    x[:, 5] = 0.3 * z[:, 5] + np.sin(2 * z[:, 4])
    log_p = -0.5 * np.sum(z**2 + np.log(2 * np.pi), 1) - np.log(0.5 * 0.3) - 0.5 * z[:, 2]
    return x, log_p.mean()


@pytest.mark.slow
def test_500_rows_of_a_bent_density_are_enough():
    rng = np.random.default_rng(0)
    (train, _), (test, exact) = _banana6(rng, 500), _banana6(rng, 10000)
    assert abs(exact + 6.6165) < 0.08
    flow = vf.flows.kernelised(jax.random.key(0), 6, lengthscale=4.0)
    result = vf.fit_density(jax.random.key(1), flow, train, num_steps=3000)
    found = float(np.mean(jax.jit(jax.vmap(result.flow.log_prob))(jnp.asarray(test))))
    assert -7.1 < found < exact
    # a Gaussian is the twin that must fail
    plain = vf.fit_density(
        jax.random.key(1), vf.flows.gaussian(jax.random.key(0), 6, covariance="full"), train
    )
    assert float(np.mean(jax.jit(jax.vmap(plain.flow.log_prob))(jnp.asarray(test)))) < -8


@pytest.mark.slow
def test_variational_inference_on_the_sinusoid():
    """Energy U2 of Rezende & Mohamed with a soft wall, whose log Z is a closed form."""
    wall = 0.4 * np.sqrt(2 * np.pi)
    log_z = np.log(wall * (8 + wall))

    def log_density(z):
        bend = jnp.sin(2 * jnp.pi * z[0] / 4)
        outside = jnp.maximum(jnp.abs(z[0]) - 4, 0)
        return -0.5 * ((z[1] - bend) / 0.4) ** 2 - 0.5 * (outside / 0.4) ** 2

    flow = vf.flows.kernelised(jax.random.key(0), 2, num_layers=8, num_centres=20, lengthscale=0.75)

    def objective(flow):
        x, log_q = flow.simulate(gradient="path")
        return log_density(x) - log_q

    result = vf.maximize(
        jax.random.key(1),
        vf.expect(objective, num_samples=256),
        flow,
        num_steps=6000,
        optimizer=optax.chain(
            optax.clip_by_global_norm(10.0),
            optax.adam(optax.cosine_decay_schedule(5e-3, 6000, alpha=0.01)),
        ),
    )
    gap = log_z - result.value.value
    assert result.value.standard_error < 2e-3
    assert -4.5 * result.value.standard_error < gap < 0.02
