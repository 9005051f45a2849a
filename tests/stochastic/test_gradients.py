"""Gradients of stochastic flows against exact ones, on a grid and by quadrature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf

S = vf.flows.stochastic
START = jnp.array([0.3, -0.2, np.log(0.25)])  # location, log scale, log step


def log_p(x):
    return 0.5 * x[0] + 6.0 * x[0] ** 2 - x[0] ** 4


@jax.jit
def exact(theta, num_steps):
    """Minus E[log w]: the density is carried through the chain on a grid."""
    m, s, log_step = theta
    grid = jnp.linspace(-4.5, 4.5, 601)
    h, step = grid[1] - grid[0], jnp.exp(log_step)
    normal = lambda x, m, sd: jnp.exp(-0.5 * ((x - m) / sd) ** 2) / (sd * jnp.sqrt(2 * jnp.pi))
    base = -0.5 * grid**2 - 0.5 * jnp.log(2 * jnp.pi)
    target = jax.vmap(log_p)(grid[:, None])
    middle = 0.5 * base + 0.5 * target
    move = normal(grid[None, :], grid[:, None], step) * h
    move = move * jnp.exp(jnp.minimum(0.0, middle[None, :] - middle[:, None]))
    stay = 1.0 - move.sum(axis=1)
    p = normal(grid, m, jnp.exp(s))
    q = jax.lax.scan(lambda q, go: (jnp.where(go, q @ move + q * stay, q), None), p,
                     jnp.arange(20) < num_steps)[0]  # fmt: skip
    entropy = 0.5 + 0.5 * jnp.log(2 * jnp.pi)
    return -(entropy + s + h * jnp.sum(q * (target - middle)) + h * jnp.sum(p * middle))


def objective(num_steps, grad):
    affine = vf.bijections.Affine(jnp.zeros(1), jnp.ones(1))
    block = S.Metropolis(num_steps=num_steps, step_size=0.25, grad=grad)
    q = vf.flows.stochastic_flow(
        jax.random.key(0), 1, [affine, block], temperatures=[0.5], train_temperatures=False
    )
    where = lambda q: (
        q.segments[0].layers[0].bijection.loc,
        q.segments[0].layers[0].bijection.log_scale,
        q.segments[1].layers[0].log_step,
    )

    def loss(theta):
        return -vf.objectives.elbo()(
            eqx.tree_at(where, q, (theta[:1], theta[1:2], theta[2])), log_p
        )

    return loss


def gradients(num_steps, grad, num_keys, num_samples):
    estimate = vf.expect(objective(num_steps, grad), num_samples)

    @jax.jit
    def batch(key):
        keys = jax.random.split(key, num_keys)
        return jax.vmap(jax.grad(estimate, argnums=1), (0, None))(keys, START)

    values = np.asarray(batch(jax.random.key(5)))
    return values.mean(axis=0), values.std(axis=0) / np.sqrt(num_keys)


# steps: the note's exact gradient, its straight-through one, samples and keys of the score function
ROWS = {
    5: ([-1.538, -2.750, -1.255], [-1.509, -2.791, -0.937], 512, 1500),
    20: ([-1.188, -1.924, -1.497], [-1.227, -2.418, -1.070], 1024, 1500),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", ROWS)
def test_gradients_through_accept_and_reject(num_steps):
    """The score function is unbiased; straight-through is not, which keeps the check honest."""
    published, wrong, samples, keys = ROWS[num_steps]
    truth = np.asarray(jax.grad(exact)(START, num_steps))
    np.testing.assert_allclose(truth, published, atol=0.003)
    mean, error = gradients(num_steps, "score", keys, samples)
    assert np.all(np.abs(mean - truth) < 4.5 * error)
    assert np.all(error < 0.04 * np.abs(truth))
    mean, error = gradients(num_steps, "straight_through", 500, 256)
    assert abs(mean[2] - truth[2]) > 40 * error[2]
    np.testing.assert_allclose(mean, wrong, atol=0.05)
    assert mean[2] == pytest.approx(wrong[2], abs=0.01)
    if num_steps == 20:  # by now the scale of the flow before is wrong as well
        assert abs(mean[1] - truth[1]) > 15 * error[1]


def test_a_single_decision_is_summed_over():
    """Both outcomes by their probabilities: unbiased, with no more variance than the proposals."""
    truth = np.asarray(jax.grad(exact)(START, 1))
    mean, error = gradients(1, "score", 1000, 256)
    assert np.all(np.abs(mean - truth) < 4.5 * error)
    assert np.all(error < 0.01 * np.abs(truth) + 0.004)
    biased, its_error = gradients(1, "straight_through", 1000, 256)
    assert abs(biased[2] - truth[2]) > 20 * its_error[2]


def by_quadrature(layer_of, size, theta):
    """E[log w] of one layer after N(0, 1), all noise integrated by Gauss-Hermite."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(size)
    masses = masses / masses.sum()
    layer, count = layer_of(theta)
    path = S._transition.Tempered(
        lambda x: -0.5 * jnp.sum(x**2) - 0.5 * jnp.log(2 * jnp.pi), log_p, 0.0, theta[0]
    )

    def log_w(x, noise):
        y, dS, _ = layer.forward_along(noise[:, None], x[None], path)
        return log_p(y) + dS - path.base(x[None])

    points = jnp.asarray(np.stack(np.meshgrid(*[nodes] * (count + 1)), -1).reshape(-1, count + 1))
    weights = np.prod(np.stack(np.meshgrid(*[masses] * (count + 1)), -1), axis=-1).ravel()
    return weights @ jax.vmap(lambda p: log_w(p[0], p[1:]))(points)


@pytest.mark.parametrize("kind", ["langevin", pytest.param("underdamped", marks=pytest.mark.slow)])
def test_gradients_along_the_draw(kind):
    """Temperature, step size and friction of an unadjusted layer, second derivatives included."""
    if kind == "langevin":
        block, leaves = S.Langevin(num_steps=1, step_size=0.03), lambda t: (t.log_step,)
        size, count, theta = 60, 1, jnp.array([0.4, np.log(0.03)])
    else:
        block = S.UnderdampedLangevin(num_steps=1, step_size=0.15)
        leaves, size, count = (lambda t: (t.log_step, t.log_friction)), 40, 2
        theta = jnp.array([0.4, np.log(0.15), np.log(2.0)])
    layer_of = lambda theta: (eqx.tree_at(leaves, block, tuple(theta[1:])), count)
    truth = np.asarray(jax.grad(lambda theta: by_quadrature(layer_of, size, theta))(theta))
    q = vf.flows.stochastic_flow(jax.random.key(0), 1, [block], temperatures=[0.5])

    def objective(theta):
        where = lambda q: (q.logits, *leaves(q.segments[0].layers[0]))
        logit = jnp.log(theta[:1] / (1 - theta[:1]))
        changed = eqx.tree_at(where, q, (logit, *theta[1:]))
        return vf.objectives.elbo()(changed, log_p)

    # one draw of the friction's gradient is noise around zero: the layer has one step only
    estimate = jax.grad(vf.expect(objective, 500), argnums=1)
    values = jax.jit(jax.vmap(estimate, (0, None)))(
        jax.random.split(jax.random.key(6), 3000), theta
    )
    mean, error = np.mean(values, axis=0), np.std(values, axis=0) / np.sqrt(len(values))
    assert np.all(np.abs(mean - truth) <= 4.5 * error + 1e-9)
    assert np.all(error[:2] < 0.02 * np.abs(truth[:2]))


def flow_of(*blocks, **options):
    return vf.flows.stochastic_flow(jax.random.key(0), 1, list(blocks), **options)


AFFINE = vf.bijections.Affine(jnp.zeros(1), jnp.ones(1))
HMC = S.HMC(num_steps=2, num_leapfrog=2, step_size=0.1)


def slope(q, objective=None, **options):
    objective = vf.objectives.elbo(**options) if objective is None else objective
    estimate = vf.expect(lambda q: objective(q, log_p), 4)
    return vf.value_and_grad(estimate)(jax.random.key(0), q)


def test_a_detached_layer_before_the_end_refuses_a_biased_derivative():
    with pytest.raises(vf.ProgramError, match="craft"):
        slope(flow_of(AFFINE, HMC, AFFINE))
    q = flow_of(AFFINE, HMC, AFFINE)  # its value is as good as any
    value = vf.expect(lambda q: vf.objectives.elbo()(q, log_p), 4)(jax.random.key(0), q)
    assert bool(jnp.isfinite(value))
    # nothing trainable before it: nothing is cut
    grad = slope(flow_of(HMC, AFFINE, temperatures=[0.5], train_temperatures=False))[1]
    assert bool(grad.segments[-1].layers[0].bijection.loc[0] != 0)
    # but the model's own parameters are reached through its steps
    q = flow_of(HMC, AFFINE, temperatures=[0.5], train_temperatures=False)
    scaled = vf.expect(lambda a: vf.objectives.elbo()(q, lambda x: a * log_p(x)))
    with pytest.raises(vf.ProgramError, match="model's own parameters"):
        jax.grad(scaled, argnums=1)(jax.random.key(0), 1.0)


def test_a_detached_layer_at_the_end_cancels():
    _, grad = slope(flow_of(AFFINE, HMC, HMC, temperatures=[1.0, 1.0]))
    assert grad.segments[1].layers[0].log_step.sum() == 0
    q = flow_of(AFFINE, HMC)

    def by_hand(affine, key):
        x = q.trajectory(key, log_p).positions[0]
        y, log_det = affine.forward_and_log_det(x)
        return log_p(y) + log_det - q.base.log_prob(x)

    def through(affine, key):
        moved = eqx.tree_at(lambda q: q.segments[0].layers[0].bijection, q, affine)
        x, log_q = moved.sample_and_log_prob(key, log_density=log_p)
        return log_p(x) - log_q

    for key in jax.random.split(jax.random.key(3), 3):
        want, got = (eqx.filter_value_and_grad(f)(AFFINE, key) for f in (by_hand, through))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-9)
        np.testing.assert_allclose(got[1].loc, want[1].loc, rtol=1e-9)
        np.testing.assert_allclose(got[1].log_scale, want[1].log_scale, rtol=1e-9)


def test_what_is_undefined_raises_and_names_the_remedy():
    q = flow_of(AFFINE, S.Langevin(num_steps=1, step_size=0.1))
    for objective in (
        vf.objectives.elbo(gradient="path"),
        vf.objectives.iwelbo(2, gradient="path"),
    ):
        with pytest.raises(vf.ProgramError, match="gradient='total'"):
            slope(q, objective)
    with pytest.raises(vf.ProgramError, match="total"):
        q.sample_and_log_prob(jax.random.key(0), gradient="path", log_density=log_p)
    with pytest.raises(vf.ProgramError, match="log_density"):
        vf.expect(lambda: q.simulate()[1])(jax.random.key(0))
    with pytest.raises(vf.ProgramError, match="estimate_log_q"):
        vf.expect(lambda q: vf.objectives.wake_q(2)(q, log_p))(jax.random.key(0), q)
    score = flow_of(AFFINE, S.MALA(num_steps=2, step_size=0.1, grad="score"))
    with pytest.raises(vf.ProgramError, match="simulate"):
        eqx.filter_grad(lambda q: q.sample_and_log_prob(jax.random.key(0), log_density=log_p)[1])(
            score
        )
    flow = vf.flows.gaussian(jax.random.key(0), 1)

    def mixed(flow):
        x, log_q = flow.simulate(gradient="path")
        y, log_r = q.simulate(gradient="total", log_density=log_p)
        return jnp.logaddexp(log_p(x) - log_q, log_p(y) - log_r)

    with pytest.raises(vf.ProgramError, match="throughout"):
        vf.expect(mixed)(jax.random.key(0), flow)


class Flip(S.AbstractTransition):
    """A layer of a user's own, with a discrete choice: x or -x, for a symmetric density."""

    reparameterised = False
    tempered = False

    def forward(self, key, x, log_density):
        return jnp.where(jax.random.bernoulli(key), x, -x), jnp.zeros(())

    def reverse(self, key, y, log_density):
        return self.forward(key, y, log_density)


def test_a_layer_of_ones_own_is_refused_where_its_derivative_would_be_biased():
    q = flow_of(AFFINE, Flip())
    x, log_q = q.sample_and_log_prob(jax.random.key(0), log_density=log_p)
    np.testing.assert_allclose(log_q, q.base.log_prob(x), rtol=1e-12)
    with pytest.raises(vf.ProgramError, match="Flip"):
        slope(q)


@pytest.mark.slow
def test_importance_weighted_bounds_take_a_stochastic_flow():
    """Score-function layers among particles: finite gradients for every trainable leaf."""
    q = flow_of(AFFINE, S.MALA(num_steps=1, step_size=0.1, grad="score"),
                S.Langevin(num_steps=1, step_size=0.05))  # fmt: skip
    value, grad = slope(q, vf.objectives.iwelbo(3))
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(vf.params(grad)) if leaf.size)
