"""A small fit; as a script, one to be killed: `python killed.py CHECKPOINT RESULT`."""

import sys

import jax
import numpy as np

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


def numbers(fitted):
    """All that a fit has found, as one vector."""
    leaves = [np.ravel(x) for x in jax.tree.leaves(fitted.flow) if isinstance(x, jax.Array)]
    draws = np.ravel(fitted.sample(jax.random.key(5), 3)["x"])
    found = [fitted.khat, fitted.ess_fraction, *fitted.log_evidence]
    return np.concatenate([*leaves, fitted.history, draws, found])


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    fitted = posterior(checkpoint=sys.argv[1])
    np.save(sys.argv[2], numbers(fitted))
    sys.stdout.write(str(fitted.settings["notes"]))
