"""Fit a flow posterior to the eight schools, centred; print the verdict, a table and a plot.

The data are Rubin's (1981); the reference is the mean and sd of 10,000 draws published by
posteriordb (eight_schools_centered).
"""

import argparse
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import vflow as vf

EFFECT = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

REFERENCE = {  # name: (mean, sd)
    "mu": (4.4105, 3.3093),
    "tau": (3.6021, 3.1985),
    "theta[0]": (6.1505, 5.6159),
    "theta[1]": (4.9396, 4.6456),
    "theta[2]": (3.9059, 5.2807),
    "theta[3]": (4.7960, 4.7709),
    "theta[4]": (3.6144, 4.6147),
    "theta[5]": (4.0511, 4.7962),
    "theta[6]": (6.3172, 5.0029),
    "theta[7]": (4.8840, 5.3177),
}


def eight_schools(sigma, y=None):
    """Effects of coaching in eight schools; the spread `tau` makes the posterior a funnel."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def columns(draws):
    """The scalar marginals of draws by site: name -> (n,)."""
    theta = {f"theta[{i}]": draws["theta"][:, i] for i in range(8)}
    return {"mu": draws["mu"], "tau": draws["tau"], **theta}


def main():
    """Fit, print the verdict and a table of means beside the reference, write a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="optimisation steps; the default is fit's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="eight_schools.png", help="where to write the plot")
    args = parser.parse_args()
    options = {} if args.steps is None else {"num_steps": args.steps, "progress": False}

    start = time.perf_counter()
    fit_key, draw_key = jax.random.split(jax.random.key(args.seed))
    model = vf.from_numpyro(eight_schools, STANDARD_ERROR, y=EFFECT)
    posterior = vf.fit(fit_key, model, **options)
    print(posterior)

    print(f"\n{'':10} {'mean':>8} {'reference':>10} {'error/sd':>9} {'sd':>8} {'reference':>10}")
    for name, draws in columns(posterior.resample(draw_key, 20_000)).items():
        mean, sd = float(np.mean(draws)), float(np.std(draws))
        true_mean, true_sd = REFERENCE[name]
        error = (mean - true_mean) / true_sd
        print(f"{name:10} {mean:8.2f} {true_mean:10.2f} {error:9.2f} {sd:8.2f} {true_sd:10.2f}")
    seconds = time.perf_counter() - start
    print(f"\nstatus {posterior.status}, k-hat {posterior.khat:.2f}, {seconds:.0f} s")

    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (the extra `plots` has it)")
    else:
        posterior.plot(args.plot)
        print(f"plot of the marginals: {args.plot}")


if __name__ == "__main__":
    main()
