"""A model with a posterior known in closed form, and fits to it, right or wrong on purpose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import vflow as vf
from vflow.fit._draws import Drawer
from vflow.fit._posterior import Posterior
from vflow.fit._verdict import judge

Y = np.array([1.0, 2.5, 0.5, 3.0])


def model(n=4, y=None):
    mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
    numpyro.sample("tau", dist.LogNormal(0.3, 0.5))
    with numpyro.plate("school", 3):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.deterministic("shifted", theta + mu)
    with numpyro.plate("row", n):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


# Conjugate normal mean; tau and theta keep their priors. Unconstrained order: mu, log tau, theta.
MU_VAR = 1 / (1 / 4 + len(Y))
MU_MEAN = MU_VAR * (1.0 / 4 + Y.sum())
LOC = np.array([MU_MEAN, 0.3, 0.0, 0.0, 0.0])
SD = np.array([MU_VAR**0.5, 0.5, 1.0, 1.0, 1.0])
_COV = np.eye(len(Y)) + 4.0
_RESID = Y - 1.0
LOG_EVIDENCE = -0.5 * (
    _RESID @ np.linalg.solve(_COV, _RESID) + np.linalg.slogdet(2 * np.pi * _COV)[1]
)


def target():
    return vf.target(vf.from_numpyro(model, y=Y))


def normal_flow(loc, sd):
    affine = vf.bijections.Affine(jnp.asarray(loc), jnp.asarray(sd))
    return vf.distributions.Flow(vf.distributions.Normal(len(loc)), affine)


def posterior_of(flow, target, dtype="float64", n=4096, **settings):
    _, log_w = Drawer(target, dtype).weighted(flow, jax.random.key(7), n)
    history = np.array([-9.0, np.nan, -7.5, -7.0])
    return Posterior(flow, target, judge(log_w), history, {"dtype": dtype} | settings)


@functools.cache
def exact_fit():
    return posterior_of(normal_flow(LOC, SD), target(), notes=["made by hand"], num_steps=4)


@functools.cache
def wrong_fit():
    """Half a standard deviation off in mu, and too wide throughout."""
    return posterior_of(normal_flow(LOC + np.array([0.5, 0, 0, 0, 0]) * SD, 1.3 * SD), target())
