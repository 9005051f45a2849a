"""Models with a subsampled plate: minibatches, locals given globals, and the verdict on all rows."""

import copy
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf
from vflow._core import combine, partition
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._local_draws import minibatch_bound
from vflow.fit._local_start import Start
from vflow.fit._mesh import Layout
from vflow.fit._minibatch import draw_rows
from vflow.targets._rows import Rows, subsampled, whole

SPREAD, NOISE, PRIOR = 1.5, 1.0, 2.0


def groups(y, batch=2):
    mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR))
    with numpyro.plate("rows", len(y), subsample_size=batch) as i:
        theta = numpyro.sample("theta", dist.Normal(mu, SPREAD))
        numpyro.sample("y", dist.Normal(theta, NOISE), obs=y[i])


def alone(x, y, batch=2):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y), subsample_size=batch) as i:
        numpyro.sample("y", dist.Normal(slope * x[i], scale), obs=y[i])


def truth(y):
    """Mean and variance of mu; means, variances of theta; covariance with mu; log evidence."""
    n, total = len(y), SPREAD**2 + NOISE**2
    variance = 1 / (1 / PRIOR**2 + n / total)
    mean = variance * y.sum() / total
    weight = SPREAD**2 / total
    theta = weight * y + (1 - weight) * mean
    theta_variance = weight * NOISE**2 + (1 - weight) ** 2 * variance
    covariance = (1 - weight) * variance
    log_det = (n - 1) * math.log(total) + math.log(total + n * PRIOR**2)
    square = (y**2).sum() / total - y.sum() ** 2 * PRIOR**2 / (total * (total + n * PRIOR**2))
    log_z = -0.5 * (n * math.log(2 * math.pi) + log_det + square)
    return mean, variance, theta, theta_variance, covariance, log_z


def data(n):
    rng = np.random.default_rng(0)
    return 0.7 + math.hypot(SPREAD, NOISE) * rng.standard_normal(n)


@pytest.fixture(scope="module")
def rows():
    return Rows(vf.from_numpyro(groups, data(6)))


def test_a_model_is_taken_apart_without_loss(rows):
    assert subsampled(vf.from_numpyro(groups, data(6))) == {"rows": (6, 2)}
    assert (rows.size, rows.batch, rows.num_globals, rows.num_locals) == (6, 2, 1, 1)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(7))
    mu, theta, y = float(x[rows.global_index][0]), x[rows.local_index][:, 0], data(6)
    normal = lambda v, m, s: -0.5 * ((v - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
    each = normal(theta, mu, SPREAD) + normal(y, theta, NOISE)
    g = jnp.array([mu])
    np.testing.assert_allclose(rows.global_log_prob(g), normal(mu, 0.0, PRIOR), rtol=1e-12)
    ours = [rows.row_log_prob(g, theta[i : i + 1], jnp.asarray(i), rows.data) for i in range(6)]
    np.testing.assert_allclose(ours, each, rtol=1e-12)
    everything = normal(mu, 0.0, PRIOR) + each.sum()
    np.testing.assert_allclose(rows.whole.log_prob(x), everything, rtol=1e-12)


@pytest.mark.slow
def test_an_odd_layout_of_the_plate_is_found():
    def model(y):  # rows are the first of two batch axes, with an event axis after them
        numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("rows", len(y), subsample_size=2, dim=-2) as i:
            with numpyro.plate("columns", 3, dim=-1):
                loc = numpyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                numpyro.sample("y", dist.Normal(loc.sum(-1), 1.0), obs=y[i])

    rows = Rows(vf.from_numpyro(model, np.zeros((4, 3))))
    assert rows.local_index.shape == (4, 6)
    target = rows.whole
    moved = target.constrain(jnp.zeros(target.dim).at[rows.local_index[2]].set(1.0))["loc"]
    np.testing.assert_array_equal(moved[2], 1.0)
    np.testing.assert_array_equal(np.delete(moved, 2, axis=0), 0.0)


def leaking(y):
    with numpyro.plate("rows", len(y), subsample_size=2) as i:
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y[i])
    numpyro.factor("sum", -(theta.sum() ** 2))


def twice(y):
    for name in ("a", "b"):
        with numpyro.plate(name, len(y), subsample_size=2) as i:
            numpyro.sample(f"y_{name}", dist.Normal(0.0, 1.0), obs=y[i])
    numpyro.sample("mu", dist.Normal(0.0, 1.0))


def test_rows_that_hang_together_and_several_plates_are_refused():
    with pytest.raises(vf.ProgramError, match="rows of plate 'rows' are not independent"):
        Rows(vf.from_numpyro(leaking, data(4)))
    with pytest.raises(vf.ProgramError, match=r"subsamples plates \['a', 'b'\]"):
        Rows(vf.from_numpyro(twice, data(4)))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"objective": vf.objectives.elbo()}, "objective is not possible"),
        ({"checkpoint": "x"}, "checkpoint is not possible"),
        ({"precondition": None}, "precondition is not possible"),
        ({"local": "mean-field"}, "local must be one of"),
        ({"flow": "of 3"}, "flow must be a flow of the 1 coordinates outside plate"),
        ({"num_samples": 0}, "num_samples must be a positive integer"),
    ],
    ids=["objective", "checkpoint", "precondition", "local", "flow", "num_samples"],
)
def test_arguments_that_do_not_fit_are_named(argument, message):
    if "flow" in argument:
        argument = {"flow": vf.flows.gaussian(jax.random.key(0), 3)}
    with pytest.raises(ValueError, match=message):
        vf.fit(jax.random.key(0), vf.from_numpyro(groups, data(6)), progress=False, **argument)


def made_up(rows, seed):
    """A start with arbitrary numbers in it: the bound is unbiased whatever they are."""
    rng = np.random.default_rng(seed)
    n, own, shared = rows.size, rows.num_locals, rows.num_globals
    scale = np.exp(0.3 * rng.standard_normal((n, own)))
    return Start(
        rng.standard_normal(shared),
        np.eye(shared),
        rng.standard_normal((n, own)),
        0.3 * rng.standard_normal((n, own, shared)),
        scale[:, :, None] * np.eye(own),
        0.3 * rng.standard_normal(n),
        0.3 * rng.standard_normal((n, shared)),
    )


def inputs_of(rows, start):
    value, gradient = jnp.asarray(start.value), jnp.asarray(start.gradient)
    totals = {"total_value": value.sum(), "total_gradient": gradient.sum(0)}
    mean = jnp.asarray(start.mean)
    return {"data": rows.data, "value": value, "gradient": gradient, "mean": mean} | totals


@pytest.mark.parametrize(
    "gradient", ["path", pytest.param("total", marks=pytest.mark.slow)], ids=str
)
def test_gradients_of_minibatches_are_unbiased(rows, gradient):
    start = made_up(rows, 2)
    shared = vf.flows.gaussian(jax.random.key(0), rows.num_globals)
    far = jnp.full(rows.num_globals, 4.0)  # from the optimum: a slope above the noise
    shared = eqx.tree_at(lambda flow: flow.bijection.loc, shared, far)
    local = Locals(jax.random.key(1), start)
    flow = LocalFlow(shared, local, rows.global_index, rows.local_index)
    trainable, static = partition(flow)
    everything = copy.copy(rows)
    everything.batch = rows.size
    inputs = inputs_of(rows, start)
    layout = Layout(None, rows.whole, 1)

    def gradients(rows, inputs):
        bound = minibatch_bound(rows, 4, gradient, layout)
        estimate = lambda key, t: bound(key, combine(t, static), inputs)
        grad = jax.grad(estimate, argnums=1)

        def one(key):  # of the shared location, and of all rows' locations
            g = grad(key, trainable)
            return jnp.concatenate([g.shared.bijection.loc, g.local.table[0][:, 0]])

        keys = jax.random.split(jax.random.key(3), 40_000)
        return np.asarray(jax.jit(jax.vmap(one))(keys))

    small = gradients(rows, inputs)
    full = gradients(everything, inputs).mean(axis=0)
    mean, error = small.mean(axis=0), 1.5 * small.std(axis=0) / math.sqrt(len(small))
    size = np.abs(full).max()
    assert (error < 0.02 * size).all()
    assert (np.abs(mean - full) < 4.5 * error).all()
    biased = inputs | {"total_gradient": 0 * inputs["total_gradient"]}
    twin = gradients(rows, biased).mean(axis=0)
    assert np.abs(twin - full).max() > 10 * error.max()


def test_rows_are_drawn_without_replacement_each_as_often_as_any_other():
    keys = jax.random.split(jax.random.key(0), 40_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw_rows(key, 40, 4)))(keys))
    ordered = np.sort(drawn, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    share = np.bincount(drawn.reshape(-1), minlength=40) / len(keys)
    error = math.sqrt(0.1 * 0.9 / len(keys))
    assert error < 0.02 * 0.1
    assert (np.abs(share - 0.1) < 4.5 * error).all()
    both = ((drawn == 0).any(1) & (drawn == 1).any(1)).mean()
    expected = 4 * 3 / (40 * 39)
    assert abs(both - expected) < 4.5 * math.sqrt(expected / len(keys))


def check(posterior, y, *, of_locals):
    mean, variance, theta, theta_variance, covariance, log_z = truth(y)
    draws = posterior.sample(jax.random.key(5), 20_000)
    mu, own = np.asarray(draws["mu"]), np.asarray(draws["theta"])
    sd, own_sd = math.sqrt(variance), math.sqrt(theta_variance)
    assert abs(mu.mean() - mean) < 0.1 * sd
    assert abs(math.log(mu.std() / sd)) < 0.1
    assert np.abs(own.mean(axis=0) - theta).max() < of_locals * own_sd
    assert np.abs(np.log(own.std(axis=0) / own_sd)).max() < of_locals
    found = np.mean((mu - mean)[:, None] * (own - theta), axis=0).mean()
    assert abs(found / covariance - 1) < 0.25
    assert posterior.status == "ok"
    assert abs(posterior.log_evidence.value - log_z) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("local", ["per-datum", "amortised"])
def test_hierarchical_normal_against_the_closed_form(local, tmp_path):
    y = data(300)
    program = vf.from_numpyro(groups, y, batch=30)
    posterior = vf.fit(
        jax.random.key(0), program, local=local, num_steps=500, num_samples=16, progress=False
    )
    check(posterior, y, of_locals=0.1 if local == "per-datum" else 0.2)
    assert any("64 of 300 rows" in note for note in posterior.settings["notes"])
    posterior.save(tmp_path / "fit")
    again = vf.load(tmp_path / "fit", program)
    draws = [np.asarray(p.sample(jax.random.key(9), 5)["theta"]) for p in (posterior, again)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.slow
def test_many_rows_without_locals_against_all_of_them_at_once():
    rng = np.random.default_rng(4)
    x = rng.standard_normal(20_000)
    y = 0.5 * x + 0.8 * rng.standard_normal(20_000)
    posterior = vf.fit(
        jax.random.key(0),
        vf.from_numpyro(alone, x, y, batch=100),
        num_steps=500,
        num_samples=16,
        progress=False,
    )
    assert posterior.status == "ok"
    draws = posterior.sample(jax.random.key(1), 20_000)
    variance = 0.8**2 / (x**2).sum()
    least_squares = (x * y).sum() / (x**2).sum()
    slope = np.asarray(draws["slope"])
    assert abs(slope.mean() - least_squares) < 0.1 * math.sqrt(variance)
    assert abs(math.log(slope.std() / math.sqrt(variance))) < 0.05
    scale = np.asarray(draws["scale"])
    assert abs(math.log(scale.std() / (0.8 / math.sqrt(2 * len(x))))) < 0.05


def test_the_whole_program_has_no_random_plate(rows):
    program = whole(vf.from_numpyro(groups, data(6)))
    assert subsampled(program) == {}
    values = {"mu": jnp.asarray(0.3), "theta": jnp.linspace(-1.0, 1.0, 6)}
    x = rows.whole.unconstrain(values)
    np.testing.assert_allclose(program.log_prob(values), rows.whole.log_prob(x), rtol=1e-12)
