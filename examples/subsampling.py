"""Ten thousand clinics, each with an effect of its own, fitted on minibatches of two hundred.

python examples/subsampling.py
"""

import argparse
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import vflow as vf


def clinics(y, batch):
    """Effects of clinics around a common mean; counts of recovered patients of each."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    with numpyro.plate("clinic", len(y), subsample_size=batch) as i:
        effect = numpyro.sample("effect", dist.Normal(mean, spread))
        numpyro.sample("y", dist.Poisson(jax.numpy.exp(effect)), obs=y[i])


def main():
    """Simulate, fit, compare with the truth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--clinics", type=int)
    args = parser.parse_args()
    size = args.clinics or (10_000 if args.steps >= 100 else 200)

    rng = np.random.default_rng(0)
    effects = 1.0 + 0.5 * rng.standard_normal(size)
    y = rng.poisson(np.exp(effects))

    began = time.perf_counter()
    posterior = vf.fit(
        jax.random.key(0),
        vf.from_numpyro(clinics, y, size // 50),
        num_steps=args.steps,
        num_samples=16,
        progress=False,
    )
    draws = posterior.sample(jax.random.key(1), 1000)
    print(f"{size} clinics in {time.perf_counter() - began:.0f} s: {posterior.status}")
    for reason in posterior.reasons:
        print(" ", reason)
    for name, truth in (("mean", 1.0), ("spread", 0.5)):
        print(f"{name}: {draws[name].mean():.3f} +- {draws[name].std():.3f}, truth {truth}")
    error = np.asarray(draws["effect"]).mean(axis=0) - effects
    inside = np.abs(error) < 2 * np.asarray(draws["effect"]).std(axis=0)
    print(f"effects within two standard deviations of the truth: {100 * inside.mean():.1f} %")


if __name__ == "__main__":
    main()
