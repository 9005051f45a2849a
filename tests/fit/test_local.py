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
from tests.faults.killed import numbers
from vflow._core import combine, partition
from vflow.fit._budget import Budget, budget_of
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._local_bound import check_objective, minibatch_bound
from vflow.fit._local_fit import BUDGETS
from vflow.fit._local_init import check_init, locals_of
from vflow.fit._local_run import LocalRun
from vflow.fit._local_start import Start
from vflow.fit._minibatch import draw_rows
from vflow.fit._save import write_state
from vflow.fit._verdict import judge
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
        ({"objective": vf.objectives.iwelbo(4)}, "objective is not possible.* not linear"),
        ({"precondition": None}, "precondition is not possible.* Gaussian of the globals"),
        ({"guide": groups}, "guide is not possible.* family of known form"),
        ({"local": "mean-field"}, "local must be one of"),
        ({"flow": "of 3"}, "flow must be a flow of the 1 coordinates outside plate"),
        ({"num_samples": 0}, "num_samples must be a positive integer"),
        ({"budget": "slow"}, "budget must be one of 'quick', 'default', 'thorough' or seconds"),
        ({"checkpoint": "/"}, "checkpoint must be a file"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_that_do_not_fit_are_named(argument, message):
    if "flow" in argument:
        argument = {"flow": vf.flows.gaussian(jax.random.key(0), 3)}
    with pytest.raises(ValueError, match=message):
        vf.fit(jax.random.key(0), vf.from_numpyro(groups, data(6)), progress=False, **argument)


def tempered(q, p):
    x, log_q = q.simulate()
    return 0.5 * p.log_prob(x) - log_q


def hidden(q, p):
    """Its value alone is not linear: the derivative does not see it."""
    x, log_q = q.simulate()
    log_w = p.log_prob(x) - log_q
    return jax.lax.stop_gradient(jnp.exp(log_w)) * log_w


def penalised(q, p):
    x, log_q = q.simulate()
    return p.log_prob(x) - log_q - jnp.sum(x**2)


def test_objectives_are_linear_on_minibatches_or_refused():
    for objective in (vf.objectives.elbo(), vf.objectives.elbo(gradient="path"), tempered):
        check_objective(objective)
    for objective, why in (
        (vf.objectives.renyi(0.5, 4), "not linear"),
        (vf.objectives.symmetric_kl(4), "not linear"),
        (hidden, "not linear"),
        (penalised, "x is good for nothing else"),
        (vf.objectives.elbo(gradient="auto"), "'auto' needs all rows"),
    ):
        with pytest.raises(ValueError, match=why):
            check_objective(objective)


def test_budgets():
    assert budget_of("quick", BUDGETS) == (500, 32, 1, None)
    assert budget_of("default", BUDGETS) == (2000, 32, 2, None)
    assert budget_of(20, BUDGETS) == (2000, 32, 4, 20.0)


def fitted(rows, flow=None, **settings):
    """A posterior that was never fitted."""
    if flow is None:
        flow = vf.flows.gaussian(jax.random.key(0), rows.num_globals)
        local = Locals(jax.random.key(1), made_up(rows, 0))
        flow = LocalFlow(flow, local, rows.global_index, rows.local_index)
    settings = {"local": "per-datum"} | settings
    return vf.Posterior(flow, rows.whole, judge(np.zeros(100)), np.zeros(0), settings)


def test_what_another_fit_gives_to_start_from(rows):
    y = data(6)
    init = fitted(Rows(vf.from_numpyro(groups, y, batch=3)))
    check_init(init, None, rows)
    assert locals_of(init, rows, "per-datum") is init.flow.local
    assert locals_of(init, rows, "amortised") is None
    changed = Rows(vf.from_numpyro(groups, -y))
    assert locals_of(init, changed, "per-datum") is None
    longer = Rows(vf.from_numpyro(groups, data(8)))
    check_init(init, None, longer)  # the globals are the same
    assert locals_of(init, longer, "per-datum") is None
    whole_flow = vf.flows.gaussian(jax.random.key(0), 7)
    for other, flow, error, why in (
        (init.flow, None, TypeError, "must be a Posterior"),
        (init, whole_flow, ValueError, "pass no flow"),
        (fitted(Rows(vf.from_numpyro(alone, y, y))), None, ValueError, "another model"),
        (fitted(rows, whole_flow), None, ValueError, "all rows at once"),
        (fitted(rows, decentred=["theta"]), None, ValueError, "decentred"),
    ):
        with pytest.raises(error, match=why):
            check_init(other, flow, rows)


def test_a_checkpoint_of_other_minibatches_is_refused(tmp_path):
    path, key, program = tmp_path / "steps", jax.random.key(0), vf.from_numpyro(groups, data(6), 3)
    plan = budget_of("default", BUDGETS)
    run = LocalRun(Rows(program), "per-datum", None, key, None, None, None, plan)
    write_state(
        path, {"identity": run.identity(None, "auto"), "settings": {}}, None, kind="checkpoint"
    )
    for called, options, why in (
        (vf.from_numpyro(groups, data(6), 2), {}, "plate is .* 3. there and .* 2. here"),
        (program, {"local": "amortised"}, "local is 'per-datum' there"),
        (program, {"budget": "quick"}, "num_steps is 2000 there and 500 here"),
    ):
        with pytest.raises(ValueError, match=why):
            vf.fit(key, called, checkpoint=path, progress=False, **options)


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
    ("gradient", "objective"),
    [
        pytest.param("path", vf.objectives.elbo(), id="path"),
        pytest.param("total", vf.objectives.elbo(), id="total", marks=pytest.mark.slow),
        pytest.param("total", tempered, id="tempered", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_minibatches_are_unbiased(rows, gradient, objective):
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

    def gradients(rows, inputs):
        bound = minibatch_bound(rows, 4, objective, gradient)
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


def wide(y, batch=5):
    """Rows whose locals are far from Gaussian: two modes where a row is far from zero."""
    mu = numpyro.sample("mu", dist.Normal(0.0, PRIOR))
    with numpyro.plate("rows", len(y), subsample_size=batch) as i:
        theta = numpyro.sample("theta", dist.Normal(mu, SPREAD))
        numpyro.sample("y", dist.Normal(theta**2, NOISE), obs=y[i])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("local", "kills"),
    [("per-datum", (4, 5)), ("amortised", (3,))],  # of six chunks, two a round
    ids=["per-datum", "amortised"],
)
def test_a_fit_of_several_rounds_goes_on_from_its_checkpoint_bit_for_bit(
    local, kills, tmp_path, monkeypatch
):
    monkeypatch.setitem(BUDGETS, "default", Budget(200, 4, 3))
    program, key = vf.from_numpyro(wide, 4 + data(20)), jax.random.key(0)
    options = {"flow": vf.flows.gaussian(jax.random.key(1), 1), "local": local, "progress": False}
    whole_fit = vf.fit(key, program, **options)
    assert whole_fit.status != "ok"
    assert (whole_fit.settings["rounds"], len(whole_fit.history)) == (3, 600)
    assert sum("tried another round of the same" in n for n in whole_fit.settings["notes"]) == 1
    assert sum("tried twice as many draws" in n for n in whole_fit.settings["notes"]) == 1
    calls = []

    class Killed(Exception):
        pass

    def kill(report):
        calls.append(report.step)
        if len(calls) in kills:
            raise Killed

    for _ in kills:
        with pytest.raises(Killed):
            vf.fit(key, program, checkpoint=tmp_path / "steps", callback=kill, **options)
    again = vf.fit(key, program, checkpoint=tmp_path / "steps", **options)
    np.testing.assert_array_equal(numbers(again), numbers(whole_fit))
    assert again.settings["notes"] == whole_fit.settings["notes"]


@pytest.mark.slow
def test_a_warm_start_begins_where_the_other_fit_ended():
    y = data(60)
    options = {"num_samples": 8, "progress": False}
    first = vf.fit(jax.random.key(0), vf.from_numpyro(groups, y, 10), num_steps=300, **options)
    same = vf.from_numpyro(groups, y, 20)
    again = vf.fit(jax.random.key(1), same, init=first, num_steps=1, **options)
    assert "Started from the globals and locals of another fit." in again.settings["notes"]
    check(again, y, of_locals=0.2)
    assert abs(again.ess_fraction - first.ess_fraction) < 0.02
    more = np.concatenate([y, data(80)[60:]])
    grown = vf.from_numpyro(groups, more, 20)
    grown = vf.fit(jax.random.key(2), grown, init=first, num_steps=300, **options)
    assert "Started from the globals of another fit." in grown.settings["notes"]
    check(grown, more, of_locals=0.2)


@pytest.mark.slow
def test_a_budget_in_seconds_ends_training():
    program = vf.from_numpyro(groups, data(40), 8)
    flow = vf.flows.gaussian(jax.random.key(1), 1)
    posterior = vf.fit(jax.random.key(0), program, flow=flow, budget=0.01, progress=False)
    assert len(posterior.history) == 100
    assert "Training was ended by the clock after 100 of 2000 steps." in posterior.settings["notes"]


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
