"""Models and log densities that cannot be a target are refused, with the name and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import vflow as vf
from vflow.targets import preflight


def normal_mean(y=None, n=3):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("obs", dist.Normal(mu, 1.0).expand([n]), obs=y)


def refused(model, *args, match, **kwargs):
    with pytest.raises(vf.ProgramError, match=match):
        vf.target(vf.from_numpyro(model, *args, **kwargs))


def test_data_that_was_forgotten():
    refused(normal_mean, match=r"'obs'.* no data.*'y' is None.*latent=\('obs',\)")

    def same_name(y=None):
        y = None if y is None else jnp.asarray(y)[:2]  # the stand-in would fail here
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0, 1)), 1), obs=y)

    refused(same_name, match="site 'y'.*argument 'y' is None")

    def keywords(**data):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("obs", dist.Normal(mu, 1), obs=data.get("y"))

    refused(keywords, y=None, match="site 'obs'.*argument 'y' is None")


def test_data_that_was_left_out_on_purpose():
    target = vf.target(vf.from_numpyro(normal_mean), latent=("obs",))
    assert [site.name for site in target.sites] == ["mu", "obs"]
    with pytest.raises(vf.ProgramError, match="'typo' is not a latent site"):
        vf.target(vf.from_numpyro(normal_mean), latent=("obs", "typo"))


def test_an_argument_that_is_none_and_no_data_is_fine():
    def model(y, offset=None):
        mu = numpyro.sample("mu", dist.Normal(0.0 if offset is None else offset, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    assert vf.target(vf.from_numpyro(model, 1.0)).dim == 1


def test_discrete_latents():
    def model(y=None):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=0.3)

    refused(model, match=r"latent site 'z'.*discrete.*strategies=\{'z': vf.enum\(\)\}")


def test_nothing_to_infer():
    refused(lambda y: numpyro.sample("y", dist.Normal(0, 1), obs=y), 1.0, match="no latent site")


def test_duplicated_sites():
    def model():
        numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("a", dist.Normal(0, 1))

    refused(model, match="'a' is used twice")


def in_a_plate(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_empty_data():
    refused(in_a_plate, np.zeros(0), match="in_a_plate.* empty")
    refused(normal_mean, np.zeros(0), n=0, match="observed site 'obs' is empty")


def test_shapes_of_data():
    refused(normal_mean, np.zeros(4), match=r"'obs'.*\(4,\) does not fit.*\(3,\)")
    refused(normal_mean, np.zeros((3, 1)), match=r"'obs'.*broadcast to \(3, 3\)")

    def scalar_mean(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0, 1)), 1), obs=y)

    target = vf.target(vf.from_numpyro(scalar_mean, np.zeros(3)))  # legal: the mean is shared
    assert float(target.log_prob(np.zeros(1))) == pytest.approx(-2 * np.log(2 * np.pi))


def test_data_outside_its_support():
    refused(in_a_plate, np.array([1.0, np.nan]), match="'y' has, among 2 values, 1 NaN")

    def counts(y):
        rate = numpyro.sample("rate", dist.Gamma(1.0, 1.0))
        numpyro.sample("y", dist.Poisson(rate), obs=y)

    refused(counts, np.array([1.5, 2.0, -1.0]), match="'y'.* 2 outside its support")


def test_latents_under_a_mask():
    def padded(mask):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.handlers.mask(mask=mask):
            z = numpyro.sample("z", dist.Normal(mu, 1).expand([3]))
            numpyro.sample("y", dist.Normal(z, 1), obs=np.zeros(3))

    def imputed(mask):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1).expand([3]), obs=np.zeros(3), obs_mask=mask)

    mask = np.array([True, False, True])
    refused(padded, mask, match="latent site 'z' are masked")
    refused(imputed, jnp.asarray(mask), match="latent site 'y_unobserved' are masked.*obs_mask")
    assert vf.target(vf.from_numpyro(padded, np.ones(3, bool))).dim == 4


def test_an_improper_prior_without_data():
    def flat(support=constraints.real):
        numpyro.sample("a", dist.ImproperUniform(support, (), ()))

    refused(flat, match="'a' has an improper prior.*neither data nor a factor")
    assert vf.target(vf.from_numpyro(flat, constraints.unit_interval)).dim == 1


def test_what_has_no_fixed_density():
    def param(y):
        numpyro.sample("a", dist.Normal(numpyro.param("loc", 0.0), 1))

    def subsampled(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("n", 3, subsample_size=2) as i:
            numpyro.sample("y", dist.Normal(mu, 1), obs=y[i])

    def random(y):
        numpyro.sample("a", dist.Normal(jax.random.normal(numpyro.prng_key()), 1))

    def delta(y):
        numpyro.sample("a", dist.Delta(1.0))

    def sphere(y):
        numpyro.sample("a", dist.ProjectedNormal(jnp.ones(3)))

    refused(param, np.ones(3), match="'loc' is a numpyro.param")
    refused(subsampled, np.ones(3), match="plate 'n' draws a random subsample")
    refused(random, np.ones(3), match="random key")
    refused(delta, np.ones(3), match="'a' is a Delta")
    refused(sphere, np.ones(3), match="'a'.*sphere.*ProjectedNormalReparam")


def test_models_that_cannot_be_traced_or_fail():
    def branches(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        if mu > 0:
            mu = -mu

    def numpy_on_latents(y):
        np.exp(numpyro.sample("mu", dist.Normal(0, 1)))

    def breaks(y):
        numpyro.sample("mu", dist.Normal(0, 1)) + jnp.ones(3) @ jnp.ones(4)

    refused(branches, 1.0, match="branches .*after site 'mu'.*jnp.where")
    refused(numpy_on_latents, 1.0, match="numpy_on_latents .*after site 'mu'.*jax.numpy")
    refused(breaks, 1.0, match="breaks failed after site 'mu': TypeError")


def test_arguments_that_do_not_fit():
    def model(sigma, y):
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0, 1)), sigma), obs=y)

    refused(model, 1.0, match=r"model\(sigma, y\).*missing.*'y'")
    refused(model, 1.0, 2.0, 3.0, match="too many positional")
    refused(model, 1.0, sd=2.0, match="unexpected keyword argument 'sd'")
    with pytest.raises(TypeError, match="function with NumPyro sites, got float"):
        vf.from_numpyro(3.0)
    with pytest.raises(TypeError, match="strategies must be a dict"):
        vf.from_numpyro(model, strategies=[1])


@pytest.mark.parametrize(
    ("log_density", "match"),
    [
        (lambda x: x[:1] ** 2, r"real scalar, got shape \(1,\)"),
        (lambda x: 1j * x.sum(), "real scalar.*complex"),
        (lambda x: None, "real scalar, got None"),
        (lambda x: np.exp(x).sum(), "jax.numpy instead of NumPy"),
        (lambda x: 1.0 if x[0] > 0 else 0.0, r"jnp.where or jax.lax.cond"),
        (lambda x: x @ jnp.ones(3), "failed: TypeError"),
    ],
)
def test_log_densities_that_are_none(log_density, match):
    with pytest.raises(vf.ProgramError, match=match):
        vf.Target(log_density, 2)


@pytest.mark.parametrize(
    ("dim", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)]
)
def test_dimensions_that_are_none(dim, error):
    with pytest.raises(error, match="dim must be a positive integer"):
        vf.Target(jnp.sum, dim)


def test_arguments_of_target():
    with pytest.raises(TypeError, match="log_density must be a function"):
        vf.Target(3, 1)
    with pytest.raises(TypeError, match=r"vf\.target takes a program"):
        vf.target(jnp.sum)
    with pytest.raises(ValueError, match="sites must be a non-empty dict"):
        vf.target(jnp.sum, sites={})
    with pytest.raises(ValueError, match="'p': a simplex support needs a shape"):
        vf.target(jnp.sum, sites={"p": constraints.simplex})
    with pytest.raises(ValueError, match="'p': shape must be positive"):
        vf.target(jnp.sum, sites={"p": (constraints.real, (0,))})
    with pytest.raises(TypeError, match="'p': shape must be integers"):
        vf.target(jnp.sum, sites={"p": (constraints.real, (1.5,))})
    with pytest.raises(vf.ProgramError, match="'p' has no support"):
        vf.target(jnp.sum, sites={"p": "positive"})
    with pytest.raises(vf.ProgramError, match=r"'p'.*discrete"):
        vf.target(jnp.sum, sites={"p": constraints.boolean})
    with pytest.raises(vf.ProgramError, match="KeyError: 'q'"):
        vf.target(lambda values: values["q"], sites={"p": constraints.real})


def test_points_of_the_wrong_shape():
    target = vf.target(vf.from_numpyro(normal_mean, np.zeros(3)))
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(2,\).*jax.vmap"):
        target.log_prob(np.zeros(2))
    with pytest.raises(ValueError, match="'mu' is missing"):
        target.unconstrain({"obs": 0.0})
    with pytest.raises(ValueError, match=r"'mu' has shape \(\), got \(2,\)"):
        target.unconstrain({"mu": np.zeros(2)})
    with pytest.raises(ValueError, match=r"x must have shape \(1,\) or \(n, 1\)"):
        preflight(target, np.zeros((2, 3)))


def test_preflight_names_the_site_that_is_not_finite():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("good", dist.Normal(a, 1.0), obs=y)
        numpyro.sample("bad", dist.Normal(a, jnp.sqrt(b)), obs=y)

    target = vf.target(vf.from_numpyro(model, 1.0))
    assert preflight(target, np.array([0.0, 1.0]))
    starts = np.array([[0.0, -1.0], [0.0, 2.0]])
    np.testing.assert_array_equal(preflight(target, starts), [False, True])
    with pytest.raises(vf.ProgramError, match="log density of 'bad' is not finite") as error:
        preflight(target, starts[0])
    rows = [line.split() for line in str(error.value).splitlines()]
    assert ["good", "-1.41894", "ok"] in rows
    assert ["bad", "nan", "not", "finite", "for", "a,", "b"] in rows


def test_preflight_sees_gradients_too():
    target = vf.Target(lambda x: -jnp.sum(jnp.abs(x) ** 0.5), 2)
    with pytest.raises(vf.ProgramError, match="gradient of the log density is not finite"):
        preflight(target, np.array([0.0, 1.0]))


def test_preflight_explains_data_outside_a_moving_support():
    def model(y):
        high = numpyro.sample("high", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Uniform(0.0, high), obs=y)

    with pytest.raises(vf.ProgramError, match=r"'y' is not finite(.|\n)*outside its support"):
        preflight(vf.target(vf.from_numpyro(model, 2.0)), np.zeros(1))


def test_preflight_says_when_float64_would_do():
    target = vf.Target(lambda x: -jnp.exp(100.0 + x[0]), 1)  # float32 ends at exp(88)
    assert preflight(target, np.zeros(1))
    with jax.enable_x64(False), pytest.raises(vf.ProgramError, match="dtype='float64'"):
        preflight(target, np.zeros(1))
