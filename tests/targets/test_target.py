"""Unconstrained log densities, their Jacobians and the maps between the spaces."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density
from scipy import special, stats

import vflow as vf

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def eight_schools(sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.deterministic("shifted", theta - mu)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools_by_hand(x):
    mu, tau, theta = x[0], np.exp(x[1]), x[2:]
    return (
        stats.norm.logpdf(mu, 0, 5)
        + stats.halfcauchy.logpdf(tau, 0, 5)
        + x[1]  # log |d tau / d x|
        + stats.norm.logpdf(theta, mu, tau).sum()
        + stats.norm.logpdf(Y, theta, SIGMA).sum()
    )


@pytest.fixture(scope="module")
def schools():
    return vf.target(vf.from_numpyro(eight_schools, SIGMA, y=Y))


def test_eight_schools_agrees_with_scipy(schools):
    for x in np.random.default_rng(0).normal(size=(5, 10)):
        assert schools.log_prob(x) == pytest.approx(eight_schools_by_hand(x), rel=1e-13)


def test_eight_schools_knows_its_sites(schools):
    assert schools.dim == 10
    assert [(s.name, s.shape, s.slice, s.support) for s in schools.sites] == [
        ("mu", (), slice(0, 1), "real"),
        ("tau", (), slice(1, 2), "positive"),
        ("theta", (8,), slice(2, 10), "real"),
    ]
    assert schools.dims == {
        "mu": (),
        "tau": (),
        "theta": ("school",),
        "shifted": ("school",),
        "y": ("school",),
    }
    assert list(schools.observed) == ["y"]
    np.testing.assert_array_equal(schools.observed["y"], Y)
    assert schools.program is not None


def test_constrain_gives_deterministic_sites_and_unconstrain_inverts(schools):
    x = np.random.default_rng(1).normal(size=(4, 10))
    values = jax.jit(jax.vmap(schools.constrain))(x)
    assert {k: v.shape for k, v in values.items()} == {
        "mu": (4,),
        "tau": (4,),
        "theta": (4, 8),
        "shifted": (4, 8),
    }
    np.testing.assert_allclose(values["tau"], np.exp(x[:, 1]), **CLOSE)
    np.testing.assert_allclose(values["shifted"], x[:, 2:] - x[:, :1], **CLOSE)
    np.testing.assert_allclose(jax.vmap(schools.unconstrain)(values), x, **CLOSE)


def test_terms_add_up_to_the_log_density(schools):
    x = np.linspace(-1, 1, 10)
    terms = schools.terms(x)
    assert set(terms) == {"mu", "tau", "theta", "y", "jacobian of tau"}
    assert sum(terms.values()) == pytest.approx(float(schools.log_prob(x)), rel=1e-14)


@pytest.mark.parametrize("x64", [True, False])
def test_log_prob_and_gradient_have_the_dtype_of_x(x64):
    with jax.enable_x64(x64):
        dtypes = (np.float32, np.float64) if x64 else (np.float32,)
        target = vf.target(vf.from_numpyro(eight_schools, SIGMA, y=Y))  # float64 NumPy data
        value_and_grad = jax.jit(jax.value_and_grad(target.log_prob))
        for dtype in dtypes:
            x = jnp.linspace(-1, 1, 10, dtype=dtype)
            value, grad = value_and_grad(x)
            assert (value.dtype, grad.dtype) == (dtype, dtype)
            tolerance = 1e-13 if dtype == np.float64 else 1e-5
            expected = eight_schools_by_hand(np.asarray(x, float))
            assert value == pytest.approx(expected, rel=tolerance)


def test_float32_data_is_computed_with_in_float64_under_x64():
    def model(scale, y):  # log(scale) rounds to 1e-8 if taken in float32
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        assert isinstance(scale + 0, jax.Array)
        assert not isinstance(scale, jax.core.Tracer)
        numpyro.sample("y", dist.Normal(mu, jnp.exp(jnp.log(scale) / 3)), obs=y)

    with jax.enable_x64(False):
        scale, y = jnp.array([0.1, 0.7]), jnp.array([1.0, 2.0])
        target = vf.target(vf.from_numpyro(model, scale, y))
    value = jax.jit(target.log_prob)(np.array([0.3]))
    wide = np.asarray(scale, np.float64)
    expected = stats.norm.logpdf(0.3) + stats.norm.logpdf([1.0, 2.0], 0.3, wide ** (1 / 3)).sum()
    assert value.dtype == np.float64
    assert value == pytest.approx(expected, rel=1e-14)


def test_a_target_made_in_float32_works_in_float64_and_back():
    """Making it leaves no float32 trace behind: jax 0.10 would reuse its view of closed-over data."""
    scale, y = np.array([0.1, 0.7, 0.3]), np.array([1.0, 2.0, 3.0])
    centre = np.array([0.1])

    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, jnp.sum(scale)))
        numpyro.sample("y", dist.Normal(mu, scale), obs=y)

    with jax.enable_x64(False):
        targets = (
            vf.target(vf.from_numpyro(model)),
            vf.Target(lambda x: -jnp.sum((x - centre) ** 2), 1),
        )
    expected = (
        stats.norm.logpdf(0.3, 0, 1.1) + stats.norm.logpdf(y, 0.3, scale).sum(),
        -(0.2**2),
    )
    for target, value in zip(targets, expected, strict=True):
        x = np.array([0.3])
        found, grad = jax.jit(jax.value_and_grad(target.log_prob))(x)
        assert found == pytest.approx(value, rel=1e-14)
        assert grad.dtype == np.float64
        with jax.enable_x64(False):
            found = jax.jit(target.log_prob)(np.float32(x))
            assert found.dtype == np.float32
            assert found == pytest.approx(value, rel=1e-5)


OFFSETS = np.array([1.0, 2.0, 3.0])  # float64, found as a global


def test_data_closed_over_has_the_float_type_of_each_trace_while_others_live():
    """jax 0.10 would take its float64 view of an array, alive in `wide`, into a float32 trace."""
    rows = np.array([[1.0, 2.0], [3.0, 0.1], [0.3, 0.7]])

    def residual(w, data={"rows": [np.array(rows)]}):  # noqa: B006, B008
        return OFFSETS - jnp.dot(rows, w) - jnp.where(data["rows"][0] > 0, w, 0.0).sum(axis=1)

    def model():
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.factor("fit", -jnp.sum(residual(w) ** 2))

    densities = (
        functools.partial(lambda scale, w: -jnp.sum(residual(w) ** 2 * scale), OFFSETS.copy()),
        jax.jit(lambda w: -jnp.sum((OFFSETS - rows @ w) ** 2)),
    )
    with jax.enable_x64(False):
        targets = [vf.Target(density, 2) for density in densities]
        targets.append(vf.target(vf.from_numpyro(model)))
    x = np.array([0.1, 0.2])
    for target in targets:
        wide = jax.jit(target.log_prob)
        value = wide(x)
        with jax.enable_x64(False):
            narrow = jax.jit(target.log_prob)(np.float32(x))
            assert "f64" not in str(jax.make_jaxpr(target.log_prob)(np.float32(x)))
        assert (value.dtype, narrow.dtype) == (np.float64, np.float32)
        assert float(narrow) == pytest.approx(float(value), rel=1e-6)


def test_numpy_data_may_be_indexed_with_a_full_plate():
    y = np.array([1.0, 2.0, 4.0])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 3) as i:
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    log_prob = jax.jit(vf.target(vf.from_numpyro(model, y)).log_prob)
    expected = stats.norm.logpdf(0.3) + stats.norm.logpdf(y, 0.3).sum()
    assert log_prob(np.array([0.3])) == pytest.approx(expected, rel=1e-14)

    def swapped(index):  # rows that a handler chose stay as they are
        chosen = handlers.substitute(model, data={"rows": index})
        return vf.from_numpyro(chosen, jnp.asarray(y)).log_prob({"mu": 0.3})

    index = np.array([0, 0, 2])
    expected = stats.norm.logpdf(0.3) + stats.norm.logpdf(y[index], 0.3).sum()
    assert jax.jit(swapped)(index) == pytest.approx(expected, rel=1e-14)


def test_log_prob_is_lean_and_independent_of_numpyro_validation(schools):
    x = np.zeros(10)
    lean = str(jax.make_jaxpr(schools.log_prob)(x))
    with numpyro.validation_enabled():
        assert str(jax.make_jaxpr(schools.log_prob)(x)) == lean
    assert "is_finite" not in lean
    assert "select" not in lean
    assert lean.count("\n") < 70


def test_a_support_that_depends_on_another_site():
    def model(y):
        low = numpyro.sample("low", dist.Uniform(0.0, 4.0))
        high = numpyro.sample("high", dist.Uniform(low, 10.0))
        numpyro.sample("y", dist.Normal(high, 1.0), obs=y)

    target = vf.target(vf.from_numpyro(model, 6.0))
    x = np.array([0.3, -0.7])
    p, q = special.expit(x)
    low = 4 * p
    high = low + (10 - low) * q
    log_det = np.log(4 * p * (1 - p)) + np.log((10 - low) * q * (1 - q))
    expected = -np.log(4) - np.log(10 - low) + stats.norm.logpdf(6, high) + log_det
    assert target.log_prob(x) == pytest.approx(expected, rel=1e-13)
    values = target.constrain(x)
    assert float(values["high"]) == pytest.approx(high, rel=1e-13)
    np.testing.assert_allclose(target.unconstrain(values), x, **CLOSE)


def test_data_outside_a_support_that_depends_on_a_latent_is_impossible():
    def model(y):
        high = numpyro.sample("high", dist.HalfNormal(10.0))
        numpyro.sample("y", dist.Uniform(0.0, high), obs=y)

    target = vf.target(vf.from_numpyro(model, 2.0))
    assert target.log_prob(np.array([0.0])) == -np.inf  # high = 1 < 2
    expected = stats.halfnorm.logpdf(np.e, 0, 10) - 1 + 1
    assert target.log_prob(np.array([1.0])) == pytest.approx(expected, rel=1e-13)


def test_scale_mask_and_factor():
    def model(y):
        with handlers.scale(scale=2.0):
            a = numpyro.sample("a", dist.HalfNormal(1.0))
        with handlers.mask(mask=False):  # flat
            numpyro.sample("b", dist.HalfNormal(1.0).expand([2]))
        numpyro.factor("extra", -3.0 * a)
        numpyro.sample("y", dist.Normal(a, 1.0).mask(np.array([True, False])), obs=y)

    target = vf.target(vf.from_numpyro(model, np.array([1.0, np.nan])))
    x = np.array([0.1, 0.2, -0.3])
    a = np.exp(0.1)
    expected = 2 * stats.halfnorm.logpdf(a) - 3 * a
    expected += stats.norm.logpdf(1, a) + x.sum()  # the Jacobian is neither scaled nor masked
    value, grad = jax.jit(jax.value_and_grad(target.log_prob))(x)
    assert value == pytest.approx(expected, rel=1e-13)
    assert np.isfinite(grad).all()


def test_nested_plates_and_computed_data():
    def model(counts):
        with numpyro.plate("row", 2, dim=-2):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            with numpyro.plate("column", 3, dim=-1):
                numpyro.sample("y", dist.Normal(a, 1.0), obs=jnp.log(counts))
                numpyro.sample("residual", dist.Normal(0.0, 1.0), obs=counts - a)

    counts = np.arange(1.0, 7.0).reshape(2, 3)
    target = vf.target(vf.from_numpyro(model, counts))
    assert target.sites[0].shape == (2, 1)
    assert target.dims == {
        "a": ("row", None),
        "y": ("row", "column"),
        "residual": ("row", "column"),
    }
    assert list(target.observed) == ["y"]  # the residual depends on a latent: no data
    np.testing.assert_allclose(target.observed["y"], np.log(counts), rtol=1e-14)


def test_sites_inside_a_numpyro_scan():
    def model(y):
        s = numpyro.sample("s", dist.HalfNormal(1.0))

        def step(previous, y_t):
            z = numpyro.sample("z", dist.LogNormal(previous, s))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return jnp.log(z), None

        scan(step, 0.0, y)

    y = np.array([1.0, 2.0, 3.0])
    target = vf.target(vf.from_numpyro(model, y))
    x = np.array([0.1, 0.2, -0.3, 0.4])
    s, log_z = np.exp(0.1), x[1:]
    expected = stats.halfnorm.logpdf(s) + 0.1
    expected += stats.norm.logpdf(log_z, np.append(0, log_z[:-1]), s).sum()
    expected += stats.norm.logpdf(y, np.exp(log_z)).sum()
    assert target.log_prob(x) == pytest.approx(expected, rel=1e-13)
    assert sum(target.terms(x).values()) == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(target.unconstrain(target.constrain(x)), x, **CLOSE)


def test_densities_inside_another_numpyro_model_keep_their_sites_to_themselves():
    def inner(y):
        s = numpyro.sample("s", dist.HalfNormal(1.0))

        def step(previous, y_t):
            z = numpyro.sample("z", dist.Normal(previous, s))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return z, None

        scan(step, 0.0, y)
        with numpyro.plate("n", 2):
            numpyro.sample("w", dist.Normal(0.0, 1.0))

    program = vf.from_numpyro(inner, np.array([1.0, 2.0]))
    target = vf.target(program)

    def outer(of_target):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        if of_target:
            numpyro.factor("density", target.log_prob(x))
        else:
            numpyro.factor("density", program.log_prob(target.constrain(x)))

    x = np.array([0.1, -0.2, 0.3, 0.5, -0.5])
    log_jacobian = sum(v for k, v in target.terms(x).items() if k.startswith("jacobian"))
    for of_target, density in (
        (True, target.log_prob(x)),
        (False, target.log_prob(x) - log_jacobian),
    ):
        with handlers.seed(rng_seed=0), handlers.scale(scale=1.0):
            total, trace = log_density(outer, (of_target,), {}, {"x": x})
        assert set(trace) == {"x", "density"}
        expected = density + stats.norm.logpdf(x).sum()
        assert total == pytest.approx(float(expected), rel=1e-12)


def test_prior_draws_follow_the_prior_and_are_finite(schools, key, no_key_reuse):
    x = np.asarray(schools.prior_draws(key, 4000))
    assert x.shape == (4000, 10)
    assert np.isfinite(x).all()
    assert stats.kstest(x[:, 0], stats.norm(0, 5).cdf).pvalue > 1e-4
    assert stats.kstest(np.exp(x[:, 1]), stats.halfcauchy(0, 5).cdf).pvalue > 1e-4
    z = (x[:, 2] - x[:, 0]) / np.exp(x[:, 1])
    assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-4


class Zero(dist.Uniform):
    """Draws that have no finite unconstrained value."""

    def sample(self, key, sample_shape=()):
        return jnp.zeros(sample_shape + self.batch_shape)


def test_prior_draws_of_improper_sites_are_standard_normal(key):
    def model(y):
        a = numpyro.sample("a", dist.ImproperUniform(constraints.positive, (), ()))
        b = numpyro.sample("b", dist.ImproperUniform(constraints.interval(0.0, 1 + a), (), (2,)))
        numpyro.sample("edge", Zero(0.0, 1.0))
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y.sum() + 0 * b.sum())

    x = np.asarray(vf.target(vf.from_numpyro(model, np.ones(2))).prior_draws(key, 2000))
    assert x.shape == (2000, 4)
    for column in x.T:
        assert stats.kstest(column, stats.norm.cdf).pvalue > 1e-4


SUPPORTS = {
    "real": (constraints.real, (3,)),
    "positive": (constraints.positive, (2,)),
    "interval": (constraints.interval(-1.0, 3.0), ()),
    "below": (constraints.less_than(2.0), ()),
    "simplex": (constraints.simplex, (3,)),
    "ordered": (constraints.ordered_vector, (3,)),
    "positive_ordered": (constraints.positive_ordered_vector, (3,)),
    "correlation": (constraints.corr_cholesky, (3, 3)),
    "cholesky": (constraints.lower_cholesky, (2, 2)),
    "batch_of_simplices": (constraints.simplex, (2, 3)),
}
FREE = {
    "simplex": lambda v: v[:-1],
    "batch_of_simplices": lambda v: v[:, :-1],
    "correlation": lambda v: v[jnp.tril_indices(3, -1)],
    "cholesky": lambda v: v[jnp.tril_indices(2)],
}


@pytest.fixture(scope="module")
def named():
    target = vf.target(lambda values: -0.5 * jnp.sum(values["real"] ** 2), sites=SUPPORTS)
    maps = {"constrain": jax.jit(target.constrain), "terms": jax.jit(target.terms)}
    return target, maps


def test_named_sites_round_trip_into_their_supports(named):
    target, maps = named
    assert target.dim == 3 + 2 + 1 + 1 + 2 + 3 + 3 + 3 + 3 + 4
    x = np.random.default_rng(2).normal(size=target.dim)
    values = maps["constrain"](x)
    for name, (support, shape) in SUPPORTS.items():
        assert values[name].shape == shape
        assert bool(jnp.all(support(values[name]))), name
    np.testing.assert_allclose(jax.jit(target.unconstrain)(values), x, rtol=1e-9, atol=1e-9)


def test_the_jacobian_of_each_support_is_the_slogdet_of_the_map(named):
    target, maps = named
    x = np.random.default_rng(3).normal(size=target.dim)
    jacobians, terms = jax.jit(jax.jacfwd(target.constrain))(x), maps["terms"](x)
    for site in target.sites:
        jacobian = jacobians[site.name][..., site.slice]
        free = FREE.get(site.name, lambda v: v)(jacobian).reshape(-1, site.stop - site.start)
        expected = np.linalg.slogdet(free)[1]
        assert terms[f"jacobian of {site.name}"] == pytest.approx(expected, abs=1e-10), site.name
        others = np.delete(jacobians[site.name], np.r_[site.slice], axis=-1)
        np.testing.assert_array_equal(others, 0)


def test_a_target_may_be_made_of_traced_data():
    def model(y):
        mu = numpyro.sample("mu", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    @jax.jit
    def log_prob(y, x):
        return vf.target(vf.from_numpyro(model, y)).log_prob(x)

    expected = stats.norm.logpdf(0.2) + stats.norm.logpdf(1.5, np.exp(0.2))
    assert log_prob(1.5, np.array([0.2])) == pytest.approx(expected, rel=1e-13)


def test_handlers_around_the_model_are_honoured():
    def model(y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        with numpyro.plate("n", 3):
            z = numpyro.sample("z", dist.Normal(mu, 2.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    conditioned = handlers.condition(model, data={"y": np.ones(3)})
    moved = handlers.reparam(conditioned, config={"z": LocScaleReparam(0.0)})
    target = vf.target(vf.from_numpyro(moved))
    assert [site.name for site in target.sites] == ["mu", "z_decentered"]
    assert target.dims["z"] == ("n",)
    values = target.constrain(np.array([1.0, 0.5, 0.0, -0.5]))
    np.testing.assert_allclose(values["z"], [2.0, 1.0, 0.0], rtol=1e-14)


def test_named_sites_take_a_bare_constraint_and_jit_boundaries():
    def log_density(values):
        return jnp.log(values["rate"]) - values["rate"]  # Gamma(2, 1)

    target = vf.target(log_density, sites={"rate": constraints.positive})
    x = np.array([0.4])
    expected = stats.gamma.logpdf(np.exp(0.4), 2) + 0.4
    assert jax.jit(target.log_prob)(x) == pytest.approx(expected, rel=1e-13)
    assert eqx.filter_jit(lambda t, x: t(x))(target, x) == pytest.approx(expected, rel=1e-13)
    assert target.observed == {}
    assert target.program is None


def test_a_bare_log_density_has_one_site(key):
    target = vf.Target(lambda x: -jnp.sum(x**4), dim=3)
    x = np.array([1.0, 2.0, 3.0])
    assert float(target(x)) == -98.0
    np.testing.assert_array_equal(target.constrain(x)["x"], x)
    np.testing.assert_array_equal(target.unconstrain({"x": x}), x)
    assert target.prior_draws(key, 5).shape == (5, 3)
    assert vf.target(target) is target


def test_a_numpyro_target_crosses_jit_boundaries_as_data_it_closes_over(schools):
    calls = []

    def model(y):
        calls.append(None)
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0, 1)), 1), obs=y)

    target = vf.target(vf.from_numpyro(model, 1.0))
    log_prob = eqx.filter_jit(lambda target, x: target.log_prob(x))
    before = len(calls)
    log_prob(target, np.zeros(1))
    log_prob(target, np.ones(1))
    assert len(calls) == before + 1  # one trace, not one run per call
    assert jax.tree.leaves(eqx.filter(target, eqx.is_array)) == []
