"""Bad inputs that no other test covers: each is refused by name, or does what docs/reliability.md says."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import vflow as vf
from vflow.fit import _guards
from vflow.fit._posterior import Posterior
from vflow.fit._verdict import judge

KEY = jax.random.key(0)
RUN = {"num_steps": 2, "num_samples": 8, "progress": False}


def bowl(x):
    return -jnp.sum((x - 1.0) ** 2)


BOWL = vf.Target(bowl, 2)


def gaussian(dim=2):
    return vf.flows.gaussian(jax.random.key(1), dim)


def mean_model(y, loc=0.0, scale=1.0):
    mu = numpyro.sample("mu", dist.Normal(loc, 1.0))
    numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def program(y, **arguments):
    return vf.from_numpyro(mean_model, y, **arguments)


@pytest.mark.parametrize(
    ("y", "arguments", "match"),
    [
        ([1.0, 2.0], {"scale": -1.0}, "'y': scale of its Normal has -1, must be positive"),
        ([1.0, 2.0], {"scale": np.array([1.0, 0.0])}, "'y': scale of its Normal has 0"),
        ([1.0, 2.0], {"loc": np.nan}, "'mu': loc of its Normal has 1 NaN"),
        ([1.0, np.inf], {}, "observed site 'y' has, among 2 values, 1 outside"),
        (np.array([1.0, None], object), {}, "'y': its data has dtype object.*mask"),
        (np.array(["1", "2"]), {}, "'y': its data has dtype <U1"),
    ],
    ids=["negative scale", "zero scale", "NaN location", "infinite", "object", "strings"],
)
def test_data_and_parameters(y, arguments, match):
    with pytest.raises(vf.ProgramError, match=match):
        vf.target(program(np.asarray(y), **arguments))


def test_a_scale_that_is_masked_may_be_anything():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.handlers.mask(mask=np.array([True, False])):
            numpyro.sample("y", dist.Normal(mu, np.array([1.0, -1.0])), obs=y)

    assert vf.target(vf.from_numpyro(model, np.zeros(2))).dim == 1


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool", "float32"])
def test_data_of_any_number_type_is_the_same_data(dtype):
    data = np.array([1, 0, 1])
    other, same = (vf.target(program(data.astype(t))) for t in (dtype, "float64"))
    np.testing.assert_allclose(other.log_prob(np.ones(1)), same.log_prob(np.ones(1)), rtol=1e-12)


def test_a_list_is_data_too():
    target, same = (vf.target(program(y)) for y in ([1, 0.5], np.array([1.0, 0.5])))
    np.testing.assert_array_equal(target.log_prob(np.ones(1)), same.log_prob(np.ones(1)))


def test_a_failure_without_words_is_told_by_its_line():
    def model():
        with numpyro.plate("rows", 4), numpyro.plate("columns", 3, dim=-1):
            numpyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(vf.ProgramError, match="model failed.*AssertionError: at 'assert"):
        vf.target(vf.from_numpyro(model))


def test_a_fit_inside_a_transformation():
    for transform in (jax.jit, jax.vmap):
        keys = jax.random.split(KEY, 2)
        with pytest.raises(TypeError, match="outside jax.jit, jax.vmap"):
            transform(lambda key: vf.fit(key, BOWL).elbo.value)(
                keys if transform is jax.vmap else KEY
            )
    with pytest.raises(TypeError, match="outside jax.jit"):
        jax.jit(lambda centre: vf.fit(KEY, vf.Target(lambda x: bowl(x - centre), 2)).khat)(1.0)


def test_a_family_that_is_nan():
    flow = eqx.tree_at(lambda flow: flow.bijection.loc, gaussian(), jnp.array([0.0, jnp.nan]))
    with pytest.raises(ValueError, match=r"flow\.bijection\.loc is NaN before training"):
        vf.fit(KEY, BOWL, flow=flow)


class Fold(vf.bijections.AbstractBijection):
    """y = x^2: two points share an image, which neither log-determinant nor T(T^-1(y)) shows."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        return x**2, jnp.sum(jnp.log(jnp.abs(2 * x)))

    def inverse_and_log_det(self, y, condition=None):
        return jnp.sqrt(y), -jnp.sum(jnp.log(2 * jnp.sqrt(y)))


def test_a_layer_of_the_users_own_that_is_no_bijection():
    flow = vf.distributions.Flow(gaussian(), Fold())
    with pytest.raises(ValueError, match=r"layers of your own \(Fold\), is not undone"):
        vf.fit(KEY, BOWL, flow=flow)
    with pytest.raises(ValueError, match="the inverse does not undo the forward map"):
        vf.diagnostics.check_bijection(Fold(), KEY)


class Listed(vf.bijections.AbstractBijection):
    """The identity, with a list where a tuple should be."""

    names: list[str] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        return x, jnp.zeros_like(x, shape=())

    def inverse_and_log_det(self, y, condition=None):
        return y, jnp.zeros_like(y, shape=())


def test_static_fields_that_cannot_be_hashed():
    flow = vf.distributions.Flow(gaussian(), Listed(["a"]))
    with pytest.raises(TypeError, match="static field 'names' of Listed cannot be hashed"):
        vf.fit(KEY, BOWL, flow=flow)


def test_counts_of_bins_and_knots():
    with pytest.raises(ValueError, match="num_bins must be an integer from 2"):
        vf.flows.coupling(KEY, 2, transformer=vf.bijections.Spline(num_bins=1))


def test_pickling_says_what_to_do_instead():
    fit = Posterior(gaussian(), BOWL, judge(np.linspace(0.0, 0.1, 100)), np.zeros(1), {})
    with pytest.raises(TypeError, match=r"posterior\.save.*vf\.load"):
        pickle.dumps(fit)
    assert copy.deepcopy(fit).status == copy.copy(fit).status == fit.status


@pytest.mark.parametrize(
    ("log_density", "match"),
    [
        (lambda x: jnp.nan * x.sum(), "log density of 'x' is not finite at any of 17 starting"),
        (lambda x: jnp.inf + x.sum(), "log density of 'x' is not finite"),
        (lambda x: bowl(x) + jnp.where(x[0] < 9, 0.0, jnp.sqrt(x[0] - 9)), "the gradient of"),
        (lambda x: jnp.sum(x**2), "grows without bound.*Check its sign"),
    ],
    ids=["NaN", "infinite", "gradient", "growing"],
)
def test_log_densities_that_no_fit_can_use(log_density, match):
    with pytest.raises(vf.FitError, match=match):
        vf.fit(KEY, vf.Target(log_density, 2), flow=gaussian(), **RUN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "log_density",
    [
        lambda x: 0.0 * x.sum(),
        lambda x: x.sum(),
        lambda x: -((x[0] + x[1] - 1.0) ** 2),
        lambda x: jnp.where(x[0] > 0, bowl(x), -jnp.inf),
    ],
    ids=["flat", "slope", "ridge", "wall"],
)
def test_an_improper_posterior_is_not_called_ok(log_density):
    """Nor one that ends at a wall, which a flow on all of R^d cannot follow."""
    target = vf.Target(log_density, 2)
    try:
        status = vf.fit(KEY, target, flow=gaussian(), **RUN | {"num_steps": 200}).status
    except vf.FitError:
        status = "refused"
    assert status != "ok"


def test_a_forked_process_is_refused_rather_than_left_hanging(monkeypatch):
    monkeypatch.setattr(_guards, "_FIRST", [1])
    with pytest.raises(RuntimeError, match="forked.*spawn"):
        vf.fit(KEY, BOWL)
