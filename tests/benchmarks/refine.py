"""Posterior.refine on quick fits of real models, beside NUTS on the raw model.

The fit is a mean-field Gaussian of 1000 steps without preconditioner, which leaves the posterior suspect or
worse; errors are the largest over parameters, in posterior standard deviations of the reference.

    python tests/benchmarks/refine.py [name ...]
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpyro

import vflow as vf
from tests.benchmarks._measure import machine, table
from tests.data.posteriors import POSTERIORS, errors

NAMES = (
    "eight_schools_centered", "eight_schools_noncentered", "garch11", "kidscore_interaction", "arK",
    "gp_pois_regr", "hmm_example", "nes2000",
)  # fmt: skip
DRAWS = 8000
HEADER = (
    "model", "fit", "error before", "method", "rounds", "R-hat", "ESS", "error of means", "of sds",
    "wall / CPU s", "NUTS: error of means", "wall / CPU s",
)  # fmt: skip


def spent(began):
    """Wall and CPU seconds since `began`."""
    return f"{time.perf_counter() - began[0]:.0f} / {time.process_time() - began[1]:.0f}"


def now():
    return time.perf_counter(), time.process_time()


def raw_nuts(real):
    """NumPyro's NUTS on the model, four chains of the same number of draws."""
    began = now()
    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(real.model), num_warmup=500, num_samples=DRAWS // 4, num_chains=4,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(3), **real.data)
    return errors(real.reference, mcmc.get_samples())[0], spent(began)


def row(name):
    real = POSTERIORS[name]
    program = vf.from_numpyro(real.model, **real.data)
    target = vf.target(program)
    mean_field = vf.distributions.Flow(
        vf.distributions.Normal(target.dim),
        vf.bijections.Affine(jnp.zeros(target.dim), jnp.ones(target.dim)),
    )
    posterior = vf.fit(
        jax.random.key(0), program, flow=mean_field, precondition=None, num_steps=1000,
        progress=False,
    )  # fmt: skip
    before = errors(real.reference, posterior.sample(jax.random.key(1), DRAWS))[0]
    began = now()
    refined = posterior.refine(jax.random.key(2), num_samples=DRAWS)
    seconds = spent(began)
    mean, sd = errors(real.reference, refined.draws)
    nuts, nuts_seconds = raw_nuts(real)
    return (
        name, posterior.status, f"{before:.3f}", refined.method, str(refined.rounds),
        f"{refined.rhat:.4f}", f"{refined.ess:.0f}", f"{mean:.3f}", f"{sd:.3f}", seconds,
        f"{nuts:.3f}", nuts_seconds,
    )  # fmt: skip


def main():
    jax.config.update("jax_enable_x64", True)
    print(machine())
    rows = []
    for name in sys.argv[1:] or NAMES:
        rows.append(row(name))
        print("|", " | ".join(rows[-1]), "|", flush=True)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
