"""Small fits; as a script, one to be killed: `python killed.py CHECKPOINT RESULT FIT`."""

import sys

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import vflow as vf


def bent(x):
    """A banana: one coordinate follows the square of the other."""
    return -0.5 * (x[0] ** 2 + (x[1] - 0.5 * x[0] ** 2) ** 2 / 0.1)


TARGET = vf.Target(bent, 2)


def posterior(**options):
    """A fit with a family that compiles quickly."""
    flow = vf.flows.gaussian(jax.random.key(1), 2, covariance="full")
    options = {"num_steps": 3000, "num_samples": 64, "progress": False, "flow": flow} | options
    return vf.fit(jax.random.key(0), TARGET, **options)


def groups(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(y), subsample_size=6) as i:
        theta = numpyro.sample("theta", dist.Normal(mu, 1.5))
        numpyro.sample("y", dist.StudentT(5.0, theta, 1.0), obs=y[i])


def on_minibatches(**options):
    """A fit of rows with locals, a few of them at a time."""
    flow = vf.flows.gaussian(jax.random.key(1), 1)
    options = {"num_steps": 3000, "num_samples": 16, "progress": False, "flow": flow} | options
    y = np.random.default_rng(0).normal(0.7, 1.8, 30)
    return vf.fit(jax.random.key(0), vf.from_numpyro(groups, y), **options)


FITS = {"whole": posterior, "minibatches": on_minibatches}


def numbers(fitted):
    """All that a fit has found, as one vector."""
    leaves = [np.ravel(x) for x in jax.tree.leaves(fitted.flow) if isinstance(x, jax.Array)]
    sites = fitted.sample(jax.random.key(5), 3)
    draws = np.concatenate([np.ravel(sites[name]) for name in sorted(sites)])
    found = [fitted.khat, fitted.ess_fraction, *fitted.log_evidence]
    return np.concatenate([*leaves, fitted.history, draws, found])


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    fitted = FITS[sys.argv[3]](checkpoint=sys.argv[1])
    np.save(sys.argv[2], numbers(fitted))
    sys.stdout.write(str(fitted.settings["notes"]))
