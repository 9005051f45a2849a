"""Fits to targets whose marginals have Student-t tails, by where the flow's tails come from.

The target in d dimensions: d - 1 independent t_nu coordinates, and the last one normal around the
one before, with unit variance. Its marginals all have the tail index nu, and log Z = 0. All nu of a
method and dimension are trained side by side, in one compiled program.
"""

import argparse
import functools as ft
import json
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
from vflow._core import combine, partition

DRAWS, BATCH = 16_384, 128


def log_density(nu, x):
    heavy = jnp.sum(student_t_log_density(x[:-1], jnp.full_like(x[:-1], nu)))
    return heavy - 0.5 * (x[-1] - x[-2]) ** 2 - 0.5 * jnp.log(2 * jnp.pi)


@ft.cache
def found(nu: float, dim: int, *, whiten: bool) -> vf.diagnostics.TailReport:
    """What `tails` says of the target."""
    return vf.diagnostics.tails(vf.Target(ft.partial(log_density, nu), dim), whiten=whiten)


def indices(nu: float, dim: int) -> np.ndarray:
    """Degrees of freedom by coordinate, all alike; in two dimensions, cheaper than in fifty."""
    return np.full(dim, found(nu, 2, whiten=False).df.min())


def _coupling(key, dim, **options):
    # Next to a coordinate of a million, one that is normal around it needs a slope of 1e-6.
    sharp = vf.bijections.AffineTransformer(min_log_scale=-30.0)
    return vf.flows.coupling(key, dim, transformer=sharp, num_layers=4, hidden=(32, 32), **options)


def _output(layer, triangular):
    def make(key, dim, nu):
        tails = layer(dim, df=indices(nu, dim), trainable_df=False)
        if triangular:
            tails = vf.bijections.Chain([vf.bijections.TriangularAffine(dim), tails])
        return _coupling(key, dim, tails=tails)

    return make


def _recipe(key, dim, nu):
    """All of it found from the density."""
    report = found(nu, dim, whiten=True)
    return vf.flows.heavy_tail(key, dim, df=report.df, loc=report.loc, tril=report.tril)


HEAVY, SMOOTH = vf.bijections.HeavyTail, vf.bijections.SmoothHeavyTail
# name -> a flow that knows the tails where it can; bases train df further, output layers keep it.
# "heavy_tail" is the recipe, with default options.
METHODS = {
    "Gaussian base": lambda key, dim, nu: _coupling(key, dim),
    "Student-t base": lambda key, dim, nu: _coupling(
        key, dim, base=vf.distributions.StudentT(jnp.asarray(indices(nu, dim)), trainable=True)
    ),
    "elliptical base": lambda key, dim, nu: _coupling(
        key,
        dim,
        base=vf.distributions.EllipticalStudentT(dim, indices(nu, dim)[0], trainable=True),
    ),
    "tail-adaptive": lambda key, dim, nu: vf.flows.tail_adaptive(
        key, dim, df=indices(nu, dim), num_layers=4, hidden=(32, 32)
    ),
    "HeavyTail": _output(HEAVY, triangular=False),
    "HeavyTail behind a triangular layer": _output(HEAVY, triangular=True),
    "SmoothHeavyTail": _output(SMOOTH, triangular=False),
    "SmoothHeavyTail behind a triangular layer": _output(SMOOTH, triangular=True),
    "heavy_tail": _recipe,
}


def fit(method: str, dim: int, nus: list[float], steps: int, rate: float, seeds: int):
    """Log weights of fresh draws, shape (nu, seed, draws), and CPU seconds with compilation."""
    lanes = [(nu, seed) for nu in nus for seed in range(seeds)]
    flows = [METHODS[method](jax.random.key(seed), dim, nu) for nu, seed in lanes]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *flows)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.01)),
    )

    def one(flow, nu, key):
        params, static = partition(flow)

        def loss(params, key):
            def draw(key):
                x, log_q = combine(params, static).sample_and_log_prob(key, gradient="path")
                return log_q - log_density(nu, x)

            return jnp.mean(jax.vmap(draw)(jax.random.split(key, BATCH)))

        def step(carry, key):
            params, state = carry
            gradient = jax.grad(loss)(params, key)
            gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
            change, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, change), state), None

        keys = jax.random.split(key, steps)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return combine(params, static)

    def judged(flow, nu, key):
        x, log_q = vf.sample_and_log_prob(key, flow, DRAWS)
        return jax.vmap(ft.partial(log_density, nu))(x) - log_q

    start = time.process_time()
    df = np.array([nu for nu, _ in lanes])
    keys = jnp.stack([jax.random.split(jax.random.key(100 + seed)) for _, seed in lanes])
    fitted = jax.jit(jax.vmap(one))(stacked, jnp.asarray(df), keys[:, 0])
    # In float64: beyond 1e7 float32 does not resolve the difference of two coordinates.
    with jax.enable_x64(True):
        wide = lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a
        log_w = jax.jit(jax.vmap(judged))(jax.tree.map(wide, fitted), jnp.asarray(df), keys[:, 1])
    return np.asarray(log_w).reshape(len(nus), seeds, DRAWS), time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--nus", type=float, nargs="+", default=[0.5, 1.0, 2.0, 5.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    print(machine(), flush=True)
    rows = []
    for method in options.methods:
        for dim in options.dims:
            log_w, seconds = fit(
                method, dim, options.nus, options.steps, options.rate, options.seeds
            )
            for nu, of_seeds in zip(options.nus, log_w, strict=True):
                khat = [f"{vf.diagnostics.khat(w):.2f}" for w in of_seeds]
                ess = [
                    f"{float(vf.diagnostics.ess_fraction(jnp.asarray(w))):.3f}" for w in of_seeds
                ]
                elbo = [f"{w.mean():.2f}" for w in of_seeds]
                parts = (" / ".join(values) for values in (khat, ess, elbo))
                rows.append((dim, f"{nu:g}", method, *parts, f"{seconds / len(options.nus):.0f}"))
                print(rows[-1], flush=True)
    print(table(("d", "nu", "method", "k-hat", "ESS fraction", "ELBO", "CPU s"), rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
