"""Fits to targets whose marginals have Student-t tails, by where the flow's tails come from.

The target in d dimensions: d - 1 independent t_nu coordinates, and the last one normal around the
one before, with unit variance. Its marginals all have the tail index nu, and log Z = 0.
"""

import argparse
import functools as ft
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from vflow_kernels import student_t_log_density

import vflow as vf
from tests.benchmarks._measure import machine, table

DRAWS = 16_384
METHODS = ("Gaussian base", "Student-t base", "tail-adaptive", "HeavyTail", "SmoothHeavyTail")


def target(nu: float, dim: int) -> vf.Target:
    def log_density(x):
        heavy = jnp.sum(student_t_log_density(x[:-1], jnp.full_like(x[:-1], nu)))
        return heavy - 0.5 * (x[-1] - x[-2]) ** 2 - 0.5 * jnp.log(2 * jnp.pi)

    return vf.Target(log_density, dim)


def flow(method: str, key, dim: int, df):
    """A flow that knows df where it can; all but the Gaussian base train it further."""
    small = {"num_layers": 4, "hidden": (32, 32)}
    last = {"HeavyTail": vf.bijections.HeavyTail, "SmoothHeavyTail": vf.bijections.SmoothHeavyTail}
    if method in last:
        return vf.flows.coupling(key, dim, tails=last[method](dim, df=df), **small)
    if method == "tail-adaptive":
        return vf.flows.tail_adaptive(key, dim, df=df, **small)
    base = vf.distributions.StudentT(df, trainable=True) if method != "Gaussian base" else None
    return vf.flows.coupling(key, dim, base=base, **small)


@ft.partial(jax.jit, static_argnames=("static_target", "steps", "tree"))
def _train(leaves, key, tree, static_target, steps):
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adam(optax.cosine_decay_schedule(5e-3, steps, alpha=0.01)),
    )
    params, static = vf._core.partition(jax.tree.unflatten(tree, leaves))

    def loss(params, key):
        def one(key):
            x, log_q = vf._core.combine(params, static).sample_and_log_prob(key, gradient="path")
            return log_q - static_target.log_prob(x)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, 128)))

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, key)
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        change, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), None

    (params, _), _ = jax.lax.scan(
        step, (params, optimizer.init(params)), jax.random.split(key, steps)
    )
    return vf._core.combine(params, static)


def fit(method: str, nu: float, dim: int, steps: int, seed: int = 0):
    """k-hat, ESS fraction, ELBO, CPU seconds, and the trained flow."""
    p = target(nu, dim)
    # The index does not depend on the dimension, and tails() is cheaper in few.
    df = jnp.full((dim,), float(vf.diagnostics.tails(target(nu, 2)).df[0]))
    keys = jax.random.split(jax.random.key(seed), 4)
    leaves, tree = jax.tree.flatten(flow(method, keys[0], dim, df))
    start = time.process_time()
    q = _train(leaves, keys[1], tree, p, steps)
    jax.block_until_ready(jax.tree.leaves(q))
    seconds = time.process_time() - start
    x, log_q = jax.jit(lambda key: vf.sample_and_log_prob(key, q, DRAWS))(keys[2])
    log_w = np.asarray(jax.vmap(p.log_prob)(x) - log_q, np.float64)
    return {
        "khat": vf.diagnostics.khat(log_w),
        "ess": float(vf.diagnostics.ess_fraction(jnp.asarray(log_w))),
        "elbo": float(np.mean(log_w)),
        "seconds": seconds,
        "flow": q,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--nus", type=float, nargs="+", default=[0.5, 1.0, 2.0, 5.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for dim in arguments.dims:
        for nu in arguments.nus:
            for method in arguments.methods:
                result = fit(method, nu, dim, arguments.steps)
                rows.append(
                    (dim, f"{nu:g}", method, f"{result['khat']:.2f}", f"{result['ess']:.3f}",
                     f"{result['elbo']:.3f}", f"{result['seconds']:.0f}")
                )  # fmt: skip
                print(rows[-1], flush=True)
    print(table(("d", "nu", "method", "k-hat", "ESS fraction", "ELBO", "CPU s"), rows))


if __name__ == "__main__":
    main()
