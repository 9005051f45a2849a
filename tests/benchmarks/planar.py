"""Planar flows on the energies U1 to U4: how far the ELBO stays below log Z.

    python tests/benchmarks/planar.py

Settings of all runs: Adam from 5e-3 with cosine decay, 10,000 steps of 256 draws, the log density
weighted by min(1, 0.01 + t / 3000) at step t, three seeds at once. The gap is taken on 100,000 fresh
draws.
"""

import argparse
import functools as ft
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vflow as vf
from tests.benchmarks._measure import machine, table
from tests.data.potentials import POTENTIALS
from vflow._core import combine, partition

FAMILIES = {
    "planar": vf.flows.planar,
    "radial": vf.flows.radial,
    "sylvester": ft.partial(vf.flows.sylvester, rank=2),
}


def fit_potential(
    name, num_layers, family="planar", num_seeds=3, num_steps=10_000, batch=256, gradient="total"
):
    """Gaps log Z - ELBO, one a seed; the seeds are trained side by side."""
    log_density, log_z = POTENTIALS[name]
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
    make = lambda key: FAMILIES[family](key, 2, num_layers=num_layers)
    _, static = partition(make(jax.random.key(0)))

    def elbo(trained, key, weight, num_draws, gradient):
        flow = combine(trained, static)
        draw = lambda key: flow.sample_and_log_prob(key, gradient=gradient)
        x, log_q = jax.vmap(draw)(jax.random.split(key, num_draws))
        return jnp.mean(weight * jax.vmap(log_density)(x) - log_q)

    def train(key):
        make_key, train_key, test_key = jax.random.split(key, 3)
        trained, _ = partition(make(make_key))

        def step(carry, t):
            trained, state = carry
            weight = jnp.minimum(1.0, 0.01 + t / 3000)
            loss = lambda p: -elbo(p, jax.random.fold_in(train_key, t), weight, batch, gradient)
            updates, state = optimizer.update(jax.grad(loss)(trained), state)
            return (eqx.apply_updates(trained, updates), state), None

        carry = (trained, optimizer.init(trained))
        (trained, _), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
        keys = jax.random.split(test_key, 100)
        fresh = jax.lax.map(lambda key: elbo(trained, key, 1.0, 1000, "total"), keys)
        return log_z - jnp.mean(fresh)

    keys = jax.random.split(jax.random.key(1), num_seeds)
    return np.asarray(jax.jit(jax.vmap(train))(keys))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="*", default=["planar"])
    parser.add_argument("--layers", nargs="*", type=int, default=[2, 8, 32])
    parser.add_argument("--energies", nargs="*", default=list(POTENTIALS))
    parser.add_argument("--gradient", default="total")
    args = parser.parse_args()
    print(machine())
    rows = []
    for family in args.families:
        for name in args.energies:
            cells = []
            for num_layers in args.layers:
                start = time.perf_counter()
                gaps = fit_potential(name, num_layers, family, gradient=args.gradient)
                cells.append(" / ".join(f"{gap:.3f}" for gap in np.sort(gaps)))
                print(family, name, num_layers, cells[-1], f"{time.perf_counter() - start:.0f} s")
                sys.stdout.flush()
            rows.append((family, name, *cells))
    print(table(("family", "energy", *(f"{k} layers" for k in args.layers)), rows))


if __name__ == "__main__":
    main()
