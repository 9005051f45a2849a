"""Kernelised coupling beside coupling with networks and masked autoregression on 500 rows.

Every family is tried with four settings, trained for the same number of steps, stopped by the same
validation rows; the setting with the best mean validation score over the seeds is the one reported.
"""

import argparse
import functools as ft
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer, load_digits

import vflow as vf
from tests.benchmarks._measure import machine, table
from vflow._core import combine, partition
from vflow.bijections._place_centres import place_centres

TRAIN, VALIDATION = 450, 50
NUM_LAYERS, NUM_CENTRES = 6, 50
BATCH, EVERY = 128, 25
RATES = (1e-3, 3e-3)


class Table(NamedTuple):
    """`draw(seed) -> (500 rows to learn from, rows to test, their exact log density or None)`."""

    dim: int
    draw: object


def _banana6(rng, n):
    z = rng.normal(size=(n, 6))
    x = z.copy()
    x[:, 1] = 0.5 * z[:, 1] + z[:, 0] ** 2 - 1
    x[:, 3] = z[:, 3] * np.exp(0.5 * z[:, 2])
    x[:, 5] = 0.3 * z[:, 5] + np.sin(2 * z[:, 4])
    log_p = -0.5 * np.sum(z**2 + np.log(2 * np.pi), 1) - np.log(0.5) - np.log(0.3) - 0.5 * z[:, 2]
    return x, log_p


def _moons(rng, n):
    """Two half circles, the angle uniform, with normal noise of 0.1; the density by quadrature."""
    noise, second = 0.1, rng.integers(0, 2, size=n)[:, None]

    def curve(angle, second):
        point = np.stack([np.cos(angle), np.sin(angle)], -1)
        return np.where(second, [1.0, 0.5] - point, point)

    x = curve(rng.uniform(0, np.pi, size=n), second) + noise * rng.normal(size=(n, 2))
    angle = np.linspace(0, np.pi, 401)
    weight = np.log(np.r_[0.5, np.ones(399), 0.5] / 400) - np.log(2 * np.pi * noise**2)
    terms = [
        weight - np.sum((x[:, None] - curve(angle, second)) ** 2, -1) / (2 * noise**2)
        for second in (False, True)
    ]
    return x, logsumexp(np.concatenate(terms, 1), axis=1) - np.log(2)


def _synthetic(draw, dim):
    def rows(seed):
        rng = np.random.default_rng(seed)
        (x, _), (test, log_p) = draw(rng, TRAIN + VALIDATION), draw(rng, 10000)
        return x, test, float(log_p.mean())

    return Table(dim, rows)


def _real(x):
    """500 rows to learn from at random, the rest to test."""

    def rows(seed):
        order = np.random.default_rng(seed).permutation(len(x))
        return x[order[: TRAIN + VALIDATION]], x[order[TRAIN + VALIDATION :]], None

    return Table(x.shape[1], rows)


def tables():
    pixels = load_digits().data
    pixels = pixels - pixels.mean(0)
    components = np.linalg.svd(pixels, full_matrices=False)[2][:8]
    return {
        "banana6": _synthetic(_banana6, 6),
        "moons": _synthetic(_moons, 2),
        "breast_cancer": _real(np.log(load_breast_cancer().data[:, :10] + 0.01)),
        "digits_pca8": _real(pixels @ components.T),
    }


def _width(dim, limit):
    """The hidden width with which two hidden layers have about `limit` parameters."""
    k, m = dim // 2, 2 * (dim - dim // 2)
    count = [NUM_LAYERS * (k * w + w + w * w + w + w * m + m) for w in range(1, 200)]
    return 1 + int(np.argmin(np.abs(np.array(count) - limit)))


def families(dim):
    """name -> (constructor of (key), second factor of the settings)."""
    k = dim // 2
    size = NUM_LAYERS * (NUM_CENTRES * (k + 2 * (dim - k)) + k)
    layers = {"num_layers": NUM_LAYERS}
    flows = {
        "kernelised": lambda key: vf.flows.kernelised(
            key, dim, num_centres=NUM_CENTRES, lengthscale=1.0, **layers
        )
    }
    for name, width in (("coupling, matched", _width(dim, size)), ("coupling, 2 x 64", 64)):
        flows[name] = ft.partial(vf.flows.coupling, dim=dim, hidden=(width, width), **layers)
    if hasattr(vf.flows, "masked_autoregressive"):
        maf = vf.flows.masked_autoregressive
        flows["masked autoregressive, 2 x 64"] = ft.partial(maf, dim=dim, hidden=(64, 64), **layers)
    return flows


def run(name, make, draws, num_steps):
    """Test and validation scores (settings, seeds) and the number of parameters."""
    kernel = name == "kernelised"
    factors = (2.0, 4.0) if kernel else (0.0, 0.1)  # lengthscale in medians; weight decay
    settings = [(rate, factor) for rate in RATES for factor in factors]
    lanes, parts = [], []
    for seed, (rows, test, _) in enumerate(draws):
        loc, scale = rows[:TRAIN].mean(0), rows[:TRAIN].std(0)
        train, held_out, test = (
            jnp.asarray((x - loc) / scale) for x in (rows[:TRAIN], rows[TRAIN:], test)
        )
        parts.append((train, held_out, test, float(np.log(scale).sum())))
        key, centre_key = jax.random.split(jax.random.key(seed))
        start = make(key)
        if kernel:
            placed, _ = place_centres(start.bijection, centre_key, train, None)
            start = vf.distributions.Flow(start.base, placed)
        for rate, factor in settings:
            trained, static = partition(start)
            if kernel:  # all the centres' lengthscales times the factor
                trained = jax.tree_util.tree_map_with_path(
                    lambda path, leaf, factor=factor: (
                        leaf + np.log(factor) if "log_lengthscale" in str(path) else leaf
                    ),
                    trained,
                )
            lanes.append((seed, rate, 0.0 if kernel else factor, trained))
    data = [jnp.stack([part[i] for part in parts]) for i in range(3)]
    seeds, rates, decays = (jnp.asarray([lane[i] for lane in lanes]) for i in range(3))
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(lane[3] for lane in lanes))
    adam = optax.chain(optax.clip_by_global_norm(10.0), optax.scale_by_adam())

    def score(params, rows):
        return jnp.mean(jax.vmap(combine(params, static).log_prob)(rows))

    def one(seed, rate, decay, params):
        train, held_out, test = (part[seed] for part in data)

        def step(carry, key):
            params, state = carry
            batch = train[jax.random.choice(key, TRAIN, (BATCH,), replace=False)]
            grad = jax.grad(lambda params: -score(params, batch))(params)
            updates, state = adam.update(grad, state, params)
            params = jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, updates)
            return (params, state), None

        def stretch(carry, key):
            params, state, best, best_score = carry
            (params, state), _ = jax.lax.scan(step, (params, state), jax.random.split(key, EVERY))
            new = score(params, held_out)
            better = new > best_score
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, best)
            return (params, state, best, jnp.where(better, new, best_score)), None

        carry = (params, adam.init(params), params, score(params, held_out))
        keys = jax.random.split(jax.random.key(seed), num_steps // EVERY)
        (last, _, best, best_score), _ = jax.lax.scan(stretch, carry, keys)
        return score(best, test), best_score, score(last, test)

    out = jax.jit(jax.vmap(one))(seeds, rates, decays, start)
    shift = np.array([part[3] for part in parts])
    scores = [np.asarray(a).reshape(len(draws), -1).T - shift for a in out]
    return scores, sum(leaf.size for leaf in jax.tree.leaves(trained)), settings


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tables", nargs="*", default=None)
    parser.add_argument("--families", nargs="*", default=None)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    print(machine(), flush=True)
    lines, results = [], {}
    for name, (dim, draw) in tables().items():
        if options.tables and name not in options.tables:
            continue
        draws = [draw(seed) for seed in range(options.seeds)]
        if draws[0][2] is not None:
            exact = np.mean([d[2] for d in draws])
            lines.append((name, "exact density", "", f"{exact:.2f}", "", "", ""))
        for family, make in families(dim).items():
            if options.families and not any(family.startswith(f) for f in options.families):
                continue
            began = time.process_time()
            (test, validation, last), count, settings = run(family, make, draws, options.steps)
            chosen = int(np.argmax(validation.mean(1)))
            mean, error = test[chosen].mean(), test[chosen].std(ddof=1) / options.seeds**0.5
            rate, factor = settings[chosen]
            what = "lengthscale" if family == "kernelised" else "weight decay"
            lines.append(
                (name, family, count, f"{mean:.2f} +- {error:.2f}", f"{last[chosen].mean():.2f}",
                 f"{rate:g}, {what} {factor:g}", f"{time.process_time() - began:.0f}")
            )  # fmt: skip
            results[f"{name}/{family}"] = {
                "params": count, "test": test.tolist(), "validation": validation.tolist(),
                "last": last.tolist(), "chosen": chosen,
            }  # fmt: skip
            print(lines[-1], test.mean(1).round(2), validation.mean(1).round(2), flush=True)
    header = ("table", "family", "parameters", "test log-likelihood", "without early stopping")
    print(table((*header, "chosen: rate, other", "CPU s"), lines))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
