"""The stratified estimator of a mixture against closed forms and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vflow as vf
from tests.programs.power import check, moments

LOCS, SCALES, LOGITS = jnp.array([-1.0, 1.5]), jnp.array([0.7, 1.2]), jnp.array([0.3, -0.4])
PARAMS = {"loc": LOCS, "logits": LOGITS, "scale": SCALES}
GRID = jnp.linspace(-14.0, 14.0, 801)
KINDS = pytest.mark.parametrize("gradient", ["total", "path"])


def _mixture(params):
    normal = vf.distributions.Normal(1)
    parts = [
        vf.distributions.Flow(
            normal, vf.bijections.TriangularAffine.from_loc_tril(m[None], s[None, None])
        )
        for m, s in zip(params["loc"], params["scale"], strict=True)
    ]
    return vf.distributions.Mixture(parts, jax.nn.softmax(params["logits"]))


def _log_q(params, x):
    parts = jax.scipy.stats.norm.logpdf(x, params["loc"], params["scale"])
    return jax.nn.logsumexp(jax.nn.log_softmax(params["logits"]) + parts)


def _log_p(x):
    return -0.25 * x**2 + jnp.sin(x)


def _quadrature(function, params):
    """The integral of q(x) function(params, x) with its gradient."""

    def integral(params):
        density = jnp.exp(jax.vmap(lambda x: _log_q(params, x))(GRID))
        values = jax.vmap(lambda x: function(params, x))(GRID)
        return jnp.sum(density * values) * (GRID[1] - GRID[0])

    return jax.value_and_grad(integral)(params)


def _elbo(gradient):
    def objective(params):
        x, log_q = _mixture(params).simulate(gradient=gradient)
        return _log_p(x[0]) - log_q

    return vf.expect(objective)


def test_density_is_the_weighted_sum():
    w = np.asarray(jax.nn.softmax(LOGITS))
    truth = np.log(w @ scipy.stats.norm.pdf(0.4, LOCS, SCALES))
    np.testing.assert_allclose(_mixture(PARAMS).log_prob(jnp.array([0.4])), truth, rtol=1e-12)


@KINDS
def test_elbo_and_its_gradient_are_unbiased(gradient, key):
    value, slope = _quadrature(lambda p, x: _log_p(x) - _log_q(p, x), PARAMS)
    check(_elbo(gradient), PARAMS, key, value=value, gradient=slope)


def test_a_drawn_component_with_reparameterised_draws_is_biased(key):
    """The twin: what a sampler that picks the component and ignores the weights would give."""
    _, slope = _quadrature(lambda p, x: _log_p(x) - _log_q(p, x), PARAMS)

    def twin(key, params):
        k_key, x_key = jax.random.split(key)
        k = jax.random.categorical(k_key, params["logits"])
        x = params["loc"][k] + params["scale"][k] * jax.random.normal(x_key)
        return _log_p(x) - _log_q(params, x)

    state = moments(twin, PARAMS, key, 200_000)
    truth = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(slope)])
    assert np.abs((state.mean[1:] - truth) / state.se[1:]).max() > 20


def test_importance_weighted_bound_is_unbiased(key):
    """Two particles: the component is drawn, its derivative is a measure-valued one."""
    weights = lambda p: jax.vmap(lambda x: _log_p(x) - _log_q(p, x))(GRID)

    def exact(params):
        mass = jnp.exp(jax.vmap(lambda x: _log_q(params, x))(GRID)) * (GRID[1] - GRID[0])
        w = weights(params)
        pairs = jnp.logaddexp(w[:, None], w[None, :]) - jnp.log(2.0)
        return mass @ pairs @ mass

    value, slope = jax.jit(jax.value_and_grad(exact))(PARAMS)
    objective = vf.objectives.iwelbo(2)
    estimate = vf.expect(
        lambda params: objective(_mixture(params), lambda x: _log_p(x[0])), num_samples=4
    )
    check(estimate, PARAMS, key, value=value, gradient=slope, rel=0.02)


def test_path_gradient_vanishes_where_the_mixture_is_its_target(key):
    target = _mixture(PARAMS)

    def objective(gradient):
        def run(params):
            x, log_q = _mixture(params).simulate(gradient=gradient)
            return target.log_prob(x) - log_q

        return jax.jit(jax.value_and_grad(vf.expect(run), argnums=1))

    (value, path), (same, total) = (objective(way)(key, PARAMS) for way in ("path", "total"))
    np.testing.assert_array_equal(value, same)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(path)) < 1e-12
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(total)) > 0.1


def test_differentiating_a_draw_is_refused():
    with pytest.raises(vf.ProgramError, match="simulate"):
        jax.grad(lambda p: _mixture(p).sample(jax.random.key(0))[0])(PARAMS)


def test_bad_arguments_are_named():
    parts = [vf.flows.gaussian(jax.random.key(0), dim) for dim in (2, 3)]
    with pytest.raises(ValueError, match="empty"):
        vf.distributions.Mixture([])
    with pytest.raises(ValueError, match="one structure"):
        vf.distributions.Mixture(parts)
    with pytest.raises(ValueError, match="one entry for each"):
        vf.distributions.Mixture(parts[:1], [0.5, 0.5])
    with pytest.raises(ValueError, match="weights must be positive"):
        vf.distributions.Mixture(parts[:1], [-1.0])


def test_components_start_apart_and_move_through_a_layer_together():
    make = lambda key: vf.flows.coupling(key, 2, num_layers=2, hidden=(3,))
    q = vf.flows.mixture(jax.random.key(0), make, 3, spread=2.0)
    layer = vf.bijections.TriangularAffine.from_loc_tril(
        jnp.ones(2), jnp.diag(jnp.array([2.0, 3.0]))
    )
    x = jnp.array([0.3, -0.8])
    y, log_det = layer.forward_and_log_det(x)
    np.testing.assert_allclose(q.through(layer).log_prob(y), q.log_prob(x) - log_det, rtol=1e-12)
    parts = jax.vmap(lambda part: part.log_prob(x))(q.components)
    assert np.ptp(parts) > 0.1


@pytest.mark.slow
def test_fit_covers_separated_modes_that_one_flow_bridges():
    """Four modes eight standard deviations apart, unequal weights."""
    corners = 4.0 * jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])

    def log_p(x):
        parts = -0.5 * jnp.sum((x - corners) ** 2, axis=1) - jnp.log(2 * jnp.pi)
        return jax.nn.logsumexp(jnp.log(weights) + parts)

    make = lambda key: vf.flows.coupling(key, 2, num_layers=2, hidden=(8,))
    flow = vf.flows.mixture(jax.random.key(0), make, 8, spread=1.5)
    target = vf.Target(log_p, 2)
    posterior = vf.fit(jax.random.key(1), target, flow=flow, num_steps=3000)
    assert posterior.status == "ok", posterior.status
    assert float(posterior.elbo) > -0.02
    (x,) = posterior.sample(jax.random.key(2), 20_000).values()
    share = np.mean((x[:, 0] < 0) & (x[:, 1] < 0))
    assert abs(share - 0.1) < 0.02
