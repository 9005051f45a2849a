"""The flow: its arguments, its place in a program, unbiasedness of the path gradient."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.flows.registry import perturb
from vflow._core import combine, partition
from vflow.bijections import AbstractBijection, Affine, Elementwise
from vflow.distributions import Flow, Normal


class _Opaque(AbstractBijection):
    """A map without an inverse, on too many coordinates for a dense solve."""

    shape: tuple[int, ...] = (100,)
    condition_shape: None = None

    def forward_and_log_det(self, x, condition=None):
        return x + 0.1 * jnp.tanh(x), jnp.sum(jnp.log1p(0.1 / jnp.cosh(x) ** 2))

    def inverse_and_log_det(self, y, condition=None):
        raise NotImplementedError("no inverse")


def _conditional():
    return Flow(Normal(1), Elementwise(jax.random.key(0), 1, hidden=(3,), condition_dim=2))


def test_path_without_a_score_rule_is_refused():
    flow = Flow(Normal(100), _Opaque())
    key = jax.random.key(0)
    assert np.isfinite(flow.sample_and_log_prob(key)[1])
    with pytest.raises(NotImplementedError, match=r"_Opaque.*gradient='total'"):
        flow.sample_and_log_prob(key, gradient="path")
    assert "_Opaque" in (flow.path_refusal() or "")
    assert _conditional().path_refusal() is None


def test_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="gradient"):
        Flow(Normal(1), Affine(jnp.zeros(1))).sample_and_log_prob(
            jax.random.key(0), gradient="pathwise"
        )


def _affine(dim):
    return Flow(Normal(dim), Affine(jnp.zeros(dim)))


def _other_condition():
    return Flow(_conditional(), Elementwise(jax.random.key(0), 1, condition_dim=3))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Flow(Normal(2), Affine(jnp.zeros(3))), ValueError, "event shape"),
        (_other_condition, ValueError, "bijection one of shape"),
        (lambda: _conditional().log_prob(jnp.zeros(1)), ValueError, "condition is missing"),
        (lambda: _conditional().log_prob(jnp.zeros(1), jnp.zeros(3)), ValueError, "has shape"),
        (lambda: _affine(1).log_prob(jnp.zeros(1), jnp.zeros(2)), ValueError, "unconditional"),
        (lambda: _affine(2).log_prob(jnp.zeros(3)), ValueError, "event shape"),
        (lambda: _affine(2).simulate(), vf.ProgramError, "outside an objective"),
    ],
)
def test_misuse_is_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_nan_is_not_hidden():
    flow = Flow(Normal(2), Affine(jnp.zeros(2), 2.0))
    assert np.isnan(flow.log_prob(jnp.array([jnp.nan, 0.0])))


def test_integers_are_points_too():
    flow = Flow(Normal(2), Affine(jnp.zeros(2), 2.0))
    np.testing.assert_allclose(flow.log_prob(jnp.array([1, 0])), flow.log_prob(jnp.array([1.0, 0])))


def test_base_and_bijection_share_the_condition():
    inner = perturb(_conditional(), jax.random.key(1))
    flow = Flow(inner, Elementwise(jax.random.key(0), 1, hidden=(3,), condition_dim=2))
    assert flow.condition_shape == (2,)
    condition = jnp.array([0.5, -1.0])
    x, log_q = flow.sample_and_log_prob(jax.random.key(0), condition)
    np.testing.assert_allclose(log_q, inner.log_prob(x, condition), rtol=1e-12)


def test_simulate_in_a_program():
    """The frame's key and default gradient; names decide the noise; `log_density` is ignored."""
    flow = Flow(Normal(1), Affine(jnp.ones(1), 2.0))

    def objective(flow):
        a, _ = flow.simulate(name="a", log_density=None)
        b, _ = flow.simulate()
        c, _ = flow.simulate()
        return a[0] + 10 * b[0] + 100 * c[0]

    estimate = vf.expect(objective)
    values = [float(estimate(jax.random.key(s), flow)) for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    same = vf.expect(lambda q: q.simulate()[0][0] - q.simulate()[0][0])
    assert float(same(jax.random.key(0), flow)) != 0.0

    def at_own(gradient):
        # At q = p the path gradient vanishes draw by draw, the total one does not.
        def gap(q):
            x, log_q = q.simulate(gradient=gradient)
            return flow.log_prob(x) - log_q

        grad = vf.value_and_grad(vf.expect(gap))(jax.random.key(3), flow)[1]
        return max(np.abs(leaf).max() for leaf in jax.tree.leaves(grad))

    assert at_own("path") < 1e-12
    assert at_own("total") > 0.1
    assert at_own(None) == at_own("total")


@ft.cache
def _gradient_draws(num_draws=4096):
    """Per draw: the total and the path gradient, and the path one without its score term."""
    flow = perturb(
        vf.flows.coupling(jax.random.key(0), 2, num_layers=2, hidden=(3,)), jax.random.key(1)
    )
    trained, static = partition(flow)

    def log_p(x):
        return -0.25 * jnp.sum(x**4) + x[0] * x[1]

    def gradients(key):
        def loss(trained, gradient, weight):
            x, log_q = combine(trained, static).sample_and_log_prob(key, gradient=gradient)
            return log_p(x) - weight * log_q

        grads = (jax.grad(loss)(trained, *how) for how in (("total", 1), ("path", 1), ("path", 0)))
        return jax.tree.map(lambda *g: jnp.stack([jnp.ravel(a) for a in g]), *grads)

    keys = jax.random.split(jax.random.key(2), num_draws)
    stacked = jax.jit(jax.vmap(gradients))(keys)
    return np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(stacked)], axis=-1)


def _z_scores(difference):
    error = difference.std(0) / np.sqrt(len(difference))
    return np.abs(difference.mean(0))[error > 0] / error[error > 0]


def test_path_gradient_is_unbiased():
    total, path, biased = np.moveaxis(_gradient_draws(), 1, 0)
    z = _z_scores(total - path)
    assert len(z) > 20
    assert z.max() < 4.5
    # Power: without the score term the same test fails.
    assert _z_scores(total - biased).max() > 10
