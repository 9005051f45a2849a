"""Targets with a known log Z by coupling flow, stochastic flow, CMCD, FAB with replay, and refine.

Errors of log Z are those of the mean weight of all draws and, as published, the mean absolute one of
2000 of them. "Found" are the regions whose weighted mass is at least half of the true one. EUBO - ELBO
takes exact draws of the target, where there are any. CPU seconds are those of the whole cell.

    python tests/benchmarks/stochastic_targets.py [--cases gmm40 ...] [--methods fab ...] [--seed 0]
    python tests/benchmarks/stochastic_targets.py --reference phi4 cox

The Cox process has a field simulated from its prior and counts from the field, and runs only when named.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import brentq

import vflow as vf
from vflow.fit._draws import Drawer
from vflow.fit._posterior import Posterior
from vflow.fit._verdict import judge

S = vf.flows.stochastic
CHUNK = 2000
METHODS = ("coupling", "stochastic", "cmcd", "fab", "refine")

# The means of the 40 Gaussians, uniform on [-40, 40]^2, frozen.
MEANS = np.array([
    18.4, 15.5, 35.4, -35.2, 15.2, 33.8, -1.9, -12.9, 8.2, 18.5, -31.0, -31.3, 11.0, -36.6, -36.2,
    -14.5, -23.1, 22.1, 23.8, -26.3, -28.8, -10.4, 2.4, 3.4, -9.6, -5.5, -11.1, -18.0, 9.7, -18.5,
    -6.5, 1.0, -15.7, -13.3, -20.6, -18.9, -21.8, -16.6, 16.4, -28.4, 9.5, -0.1, -24.8, -13.8,
    -13.5, -15.4, -31.0, 5.0, 9.0, -27.0, -35.7, -1.6, -8.9, -29.2, -31.9, 38.5, 24.1, 9.0, -5.9,
    34.7, 5.7, 7.8, -18.0, 5.3, 12.7, 20.2, 15.9, 30.6, -33.2, 34.0, 6.8, -14.9, 21.3, -30.2,
    -28.7, 39.7, 25.6, 35.7, -18.9, -5.8,
]).reshape(40, 2)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A target: its log Z (None if unknown), regions with their masses, and exact draws."""

    dim: int
    log_density: Callable[[Any], Any]
    log_z: float | None
    regions: Callable[[np.ndarray], np.ndarray]  # (n, dim) -> (n, number of regions) booleans
    masses: np.ndarray
    exact: Callable[[np.random.Generator, int], np.ndarray] | None
    width: float = 1.0  # of the base


def gmm40():
    def log_density(x):
        squares = jnp.sum((x - jnp.asarray(MEANS, x.dtype)) ** 2, axis=1)
        return jax.nn.logsumexp(-0.5 * squares) - np.log(40 * 2 * np.pi)

    def regions(x):
        nearest = ((x[:, None, :] - MEANS) ** 2).sum(axis=2).argmin(axis=1)
        return nearest[:, None] == np.arange(40)

    def exact(rng, n):
        return MEANS[rng.integers(40, size=n)] + rng.normal(size=(n, 2))

    return Case(2, log_density, 0.0, regions, np.full(40, 1 / 40), exact, 20.0)


def funnel():
    def log_density(x):
        rest = -0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) - 4.5 * x[0]
        return rest - x[0] ** 2 / 18 - np.log(3) - 5 * np.log(2 * np.pi)

    def exact(rng, n):
        first = 3 * rng.normal(size=(n, 1))
        return np.concatenate([first, np.exp(first / 2) * rng.normal(size=(n, 9))], axis=1)

    regions = lambda x: np.stack([x[:, 0] < -3, np.abs(x[:, 0]) <= 3, x[:, 0] > 3], axis=1)
    return Case(10, log_density, 0.0, regions, np.array([0.158655, 0.682690, 0.158655]), exact)


def many_well():
    def log_density(x):
        y, z = x[::2], x[1::2]
        return jnp.sum(0.5 * y + 6.0 * y**2 - y**4) - 0.5 * jnp.sum(z**2)

    def exact(rng, n):
        grid = np.linspace(-3.5, 3.5, 20001)
        density = np.exp(0.5 * grid + 6 * grid**2 - grid**4)
        mass = np.cumsum(density)
        y = np.interp(rng.uniform(size=(n, 16)), mass / mass[-1], grid)
        return np.stack([y, rng.normal(size=(n, 16))], axis=2).reshape(n, 32)

    regions = lambda x: np.concatenate([x[:, ::2] > 0, x[:, ::2] <= 0], axis=1)
    masses = np.repeat([0.8443071, 1 - 0.8443071], 16)
    return Case(32, log_density, 16 * 10.2934797, regions, masses, exact)


@functools.cache
def modes():
    """Orthonormal Fourier modes of a row of 14 sites, and the sds of the field's modes.

    The sds are those of the translation-invariant Gaussian that is closest to the phi^4 action in
    reverse KL: its mass solves the gap equation M = m^2 + 6 lambda <phi^2>.
    """
    side, mass2, coupling = 14, -4.75, 5.1
    sites, half = np.arange(side), side // 2
    waves = [np.full(side, side**-0.5)]
    for k in range(1, half):
        angle = 2 * np.pi * k * sites / side
        waves += [np.sqrt(2 / side) * np.cos(angle), np.sqrt(2 / side) * np.sin(angle)]
    waves.append(np.cos(np.pi * sites) * side**-0.5)
    number = np.concatenate([[0], np.repeat(np.arange(1, half), 2), [half]])
    row = 2 - 2 * np.cos(2 * np.pi * number / side)
    kinetic = row[:, None] + row
    gap = lambda m: m - mass2 - 6 * coupling * np.mean(0.5 / (kinetic + m))
    return np.stack(waves, axis=1), (2 * (kinetic + brentq(gap, 1e-6, 100.0))) ** -0.5


def phi4():
    waves, sds = modes()

    def log_density(z):
        """In the coordinates that whiten the free field nearest to it, which leave Z as it is."""
        basis = jnp.asarray(waves, z.dtype)
        phi = basis @ (z.reshape(14, 14) * jnp.asarray(sds, z.dtype)) @ basis.T
        bonds = sum(phi * jnp.roll(phi, 1, axis) for axis in (0, 1))
        action = jnp.sum((4 - 4.75) * phi**2 + 5.1 * phi**4 - 2 * bonds)
        return np.log(sds).sum() - action

    regions = lambda z: np.stack([z[:, 0] > 0, z[:, 0] <= 0], axis=1)  # signs of the mean field
    return Case(196, log_density, None, regions, np.array([0.5, 0.5]), None)


@functools.cache
def field():
    """Factor of the prior covariance of 40 x 40 cells, and counts simulated from it."""
    side = 40
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    gaps = np.sqrt(((cells[:, None] - cells) ** 2).sum(axis=-1))
    factor = np.linalg.cholesky(1.91 * np.exp(-33 * gaps / side) + 1e-9 * np.eye(side**2))
    rng = np.random.default_rng(126)
    rate = np.exp(np.log(126) - 0.955 + factor @ rng.normal(size=side**2)) / side**2
    return factor, rng.poisson(rate)


def cox():
    factor, counts = field()

    def log_density(z):
        """In whitened coordinates, which leave Z as it is; without the factorials."""
        f = np.log(126) - 0.955 + jnp.asarray(factor, z.dtype) @ z
        likelihood = jnp.sum(jnp.asarray(counts, z.dtype) * f - jnp.exp(f) / counts.size)
        return likelihood - 0.5 * jnp.sum(z**2) - 0.5 * z.size * np.log(2 * np.pi)

    regions = lambda x: np.ones((len(x), 1), bool)
    return Case(counts.size, log_density, None, regions, np.ones(1), None)


CASES = {
    "gmm40": gmm40, "funnel": funnel, "manywell32": many_well, "phi4": phi4, "cox": cox,
}  # fmt: skip


def base(case):
    """A normal of the case's width; it is not trained."""
    scale = vf.bijections.Affine(jnp.zeros(case.dim), jnp.full(case.dim, case.width))
    return vf.distributions.Flow(vf.distributions.Normal(case.dim), scale)


def coupling_flow(key, case, **options):
    options = {"num_layers": 8, "hidden": (64, 64)} | options
    flow = vf.flows.coupling(key, case.dim, **options)
    scale = vf.bijections.Affine(jnp.zeros(case.dim), jnp.full(case.dim, case.width))
    return vf.distributions.Flow(flow.base, vf.bijections.Chain([flow.bijection, scale]))


def laplace(case):
    """The affine map to the Gaussian at the mode, all of whose entries are trained on."""
    slope, hessian = (jax.jit(f(case.log_density)) for f in (jax.grad, jax.hessian))
    loc = jnp.zeros(case.dim)
    for _ in range(8):
        loc = loc - jnp.asarray(np.linalg.solve(np.asarray(hessian(loc)), np.asarray(slope(loc))))
    tril = np.linalg.cholesky(np.linalg.inv(-np.asarray(hessian(loc), np.float64)))
    return vf.bijections.TriangularAffine.from_loc_tril(loc, jnp.asarray(tril, loc.dtype))


def skewed_flow(key, case, **options):
    """Couplings and a skew of each coordinate in front of the Laplace approximation."""
    flow = vf.flows.coupling(key, case.dim, **options)
    skew = vf.bijections.Elementwise(
        key, case.dim, transformer=vf.bijections.SinhArcsinhTransformer()
    )
    return vf.distributions.Flow(
        flow.base, vf.bijections.Chain([flow.bijection, skew, laplace(case)])
    )


def chain(key, case, blocks, **options):
    return vf.flows.stochastic_flow(
        key, case.dim, blocks, base=vf._core.stop_gradient(base(case)), **options
    )


def ascended(key, estimate, q, steps, rate):
    """Adam with cosine decay and clipped norms; steps that are not finite are left out."""
    optimizer = clipped(rate, steps)
    trainable, static = vf._core.partition(q)

    def step(carry, key):
        params, state = carry
        grad = jax.grad(lambda params: -estimate(key, vf._core.combine(params, static)))(params)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grad)]))
        updates, after = optimizer.update(grad, state)
        pick = lambda new, old: jnp.where(finite, new, old)
        new = jax.tree.map(pick, optax.apply_updates(params, updates), params)
        return (new, jax.tree.map(pick, after, state)), None

    @jax.jit
    def run(key):
        start = (trainable, optimizer.init(trainable))
        return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]

    return vf._core.combine(run(key), static)


def clipped(rate, steps):
    schedule = optax.warmup_cosine_decay_schedule(
        0.1 * rate, rate, steps // 20 + 1, steps, 0.01 * rate
    )
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def reverse(key, case, q, steps, rate, draws, gradient):
    objective = lambda q: vf.objectives.elbo()(q, case.log_density)
    return ascended(key, vf.expect(objective, draws, gradient=gradient), q, steps, rate)


def replayed(key, case, q, blocks, steps, rate, draws):
    fab = vf.objectives.fab_replay(
        q, case.log_density, clipped(rate, 4 * steps), num_particles=draws, blocks=blocks
    )

    @jax.jit
    def train(key):
        step = lambda state, key: fab.step(key, state)
        return jax.lax.scan(step, fab.init(key), jax.random.split(key, steps))[0]

    return fab.flow(train(key))


# Settings: (options of the family, steps, learning rate, draws a step).
COUPLING = {
    "gmm40": ({"transformer": "spline", "hidden": (32, 32)}, 1500, 3e-3, 256),
    "funnel": ({}, 2000, 3e-3, 256),
    "manywell32": ({}, 1500, 2e-3, 256),
    "phi4": ({"num_layers": 6, "hidden": (96,)}, 800, 2e-3, 128),
    "cox": ({"num_layers": 2, "hidden": (16,)}, 1100, 7e-4, 32),
}
# Number of HMC layers, step size, leapfrog steps.
ANNEALED = {
    "gmm40": (64, 0.7, 3), "manywell32": (256, 0.2, 8), "phi4": (256, 0.22, 10),
}  # fmt: skip
# Steps of the chain, step size, objective, training steps, learning rate, draws a step.
CMCD = {
    "gmm40": (48, 0.4, "log_variance", 300, 5e-3, 256),
    "funnel": (32, 0.1, "elbo", 500, 4e-3, 128),
    "manywell32": (32, 0.02, "elbo", 250, 5e-3, 128),
    "phi4": (32, 0.024, "elbo", 250, 2e-3, 64),
}
# Options of the flow, layers, step size and leapfrog steps of annealing, steps, rate, particles.
FAB = {
    "gmm40": ({"transformer": "spline", "hidden": (32, 32)}, 3, 0.8, 3, 400, 2e-3, 256),
    "funnel": ({}, 3, 0.2, 4, 300, 2e-3, 256),
    "manywell32": ({}, 4, 0.12, 4, 250, 2e-3, 256),
    "phi4": ({"num_layers": 6, "hidden": (96,)}, 4, 0.15, 4, 100, 2e-3, 128),
}
DRAWS = {"phi4": 4000, "cox": 2000}
REFINE = {
    "gmm40": {"num_samples": 2000, "num_warmup": 250, "num_rounds": 2},
    "phi4": {"num_samples": 400, "num_warmup": 100, "num_rounds": 1},
    "cox": {"num_samples": 800, "num_warmup": 200, "num_rounds": 1},
}


def fitted(key, name, case, method):
    key_start, key_train = jax.random.split(key)
    if method in ("coupling", "refine"):
        options, steps, rate, draws = COUPLING[name]
        q = (skewed_flow if name == "cox" else coupling_flow)(key_start, case, **options)
        return reverse(key_train, case, q, steps, rate, draws, "path")
    if method == "fab":
        options, layers, step, leapfrog, steps, rate, draws = FAB[name]
        q = coupling_flow(key_start, case, **options)
        blocks = [S.HMC(num_steps=1, num_leapfrog=leapfrog, step_size=step)] * layers
        return replayed(key_train, case, q, blocks, steps, rate, draws)
    if method == "cmcd":
        length, eta, objective, steps, rate, draws = CMCD[name]
        block = S.ControlledLangevin(num_steps=length, step_size=eta, hidden=(64, 64))
        q = chain(key_start, case, [block])
        if objective == "elbo":
            return reverse(key_train, case, q, steps, rate, draws, "total")
        loss = vf.objectives.log_variance(draws)
        estimate = vf.expect(lambda q: loss(q, case.log_density))
        return ascended(key_train, estimate, q, steps, rate)
    if name == "funnel":  # couplings, then annealed steps, trained together
        blocks = [S.couplings(num_layers=6, hidden=(64, 64))]
        blocks += [S.UnderdampedLangevin(num_steps=2, step_size=0.1)] * 4
        q = chain(key_start, case, blocks, temperatures=[0.85, 0.9, 0.95, 1.0])
        return reverse(key_train, case, q, 1500, 3e-3, 128, "total")
    layers, step, leapfrog = ANNEALED[name]
    return chain(
        key_start, case, [S.HMC(num_steps=1, num_leapfrog=leapfrog, step_size=step)] * layers
    )


def drawn(key, q, case, n):
    """Draws and log weights, in chunks."""

    def chunk(key):
        stochastic = isinstance(q, S.StochasticFlow)
        options = {"log_density": case.log_density} if stochastic else {}
        x, log_q = jax.vmap(lambda key: q.sample_and_log_prob(key, **options))(
            jax.random.split(key, CHUNK)
        )
        return x, jax.vmap(case.log_density)(x) - log_q

    x, log_w = jax.jit(lambda keys: jax.lax.map(chunk, keys))(jax.random.split(key, n // CHUNK))
    return np.asarray(x).reshape(n, -1), np.asarray(log_w, np.float64).ravel()


def log_ratio(key, q, case, x):
    """log p - log q at given points; by one reversed path each for stochastic flows."""

    def one(key, x):
        if isinstance(q, S.StochasticFlow):
            return case.log_density(x) - q.estimate_log_q(key, x, case.log_density)
        return case.log_density(x) - q.log_prob(x)

    x = jnp.asarray(x, jnp.float32)
    values = jax.jit(jax.vmap(one))(jax.random.split(key, len(x)), x)
    return np.asarray(values, np.float64)


def log_mean(log_w):
    return np.logaddexp.reduce(np.ravel(log_w)) - np.log(log_w.size)


def bridge(log_w, log_v):
    """Log Z from log weights at draws of q and at draws of p (Meng & Wong 1996)."""
    log_z, share = log_mean(log_w), np.log(log_w.size / log_v.size)
    for _ in range(200):
        up = log_mean(log_w - np.logaddexp(log_w, log_z + share))
        down = log_mean(-np.logaddexp(log_v, log_z + share))
        log_z = up - down
    return log_z


def cell(name, method, seed):
    """One line of the table."""
    case, began = CASES[name](), time.process_time()
    key_fit, key_draw, key_back, key_refine = jax.random.split(jax.random.key(seed), 4)
    q = jax.block_until_ready(fitted(key_fit, name, case, method))
    trained = time.process_time() - began
    x, log_w = drawn(key_draw, q, case, DRAWS.get(name, 20_000))
    log_w = np.where(np.isfinite(log_w), log_w, -np.inf)
    weights = np.exp(log_w - log_w.max())
    weights /= weights.sum()
    log_z, ess = log_mean(log_w), 1 / (weights**2).sum() / weights.size
    small = np.array([log_mean(part) for part in log_w.reshape(-1, CHUNK)])
    above = (
        log_ratio(key_back, q, case, case.exact(np.random.default_rng(1), 1000))
        if case.exact
        else None
    )
    note = ""
    if method == "refine":
        target = vf.Target(case.log_density, dim=case.dim)
        drawer = Drawer(target, "float32")
        _, own = drawer.weighted(q, key_draw, 4096)
        posterior = Posterior(q, target, judge(own), np.zeros(1), {"dtype": "float32"})
        refined = posterior.refine(key_refine, **REFINE.get(name, {"num_samples": 8000}))
        x = np.asarray(refined.draws["x"])
        weights = np.full(len(x), 1 / len(x))
        above = log_ratio(key_back, q, case, x)
        log_z, ess = bridge(log_w, above), refined.ess / len(x)
        small = np.array([bridge(part, above) for part in log_w.reshape(-1, CHUNK)])
        note = f"{refined.method}, R-hat {refined.rhat:.3f}, rounds: {refined.rounds}"
    inside = (weights[:, None] * case.regions(x)).sum(axis=0)
    found = int((inside > 0.5 * case.masses).sum())
    worst = np.abs(inside - case.masses).max()
    error, batches = f"{log_z:.3f}", "-"
    if case.log_z is not None:
        error = f"{abs(log_z - case.log_z):.4f}"
        batches = f"{np.abs(small - case.log_z).mean():.4f}"
    finite = log_w[np.isfinite(log_w)]
    gap = "-" if above is None else f"{above.mean() - finite.mean():.4g}"
    seconds = time.process_time() - began
    return (
        name, method, error, batches, f"{ess:.4f}", gap, f"{found} of {len(inside)}",
        f"{worst:.3f}", f"{trained:.0f}", f"{seconds:.0f}", note,
    )  # fmt: skip


# Of a long annealing run: HMC layers, step size, leapfrog steps, particles of each of 16 runs.
LONG = {"phi4": (1024, 0.22, 10, 250), "cox": (64, 0.3, 4, 32)}


def reference(name, seed):
    """Log Z by a long annealing run, in both directions; their s.e. are over 16 independent parts.

    Forwards by sequential Monte Carlo. Backwards from its particles, resampled and moved on by 50 HMC
    steps at the target: paths back to the base, E[q/p] = 1/Z. "Bridge" takes forward annealing
    paths and backward ones together.
    """
    case, began = CASES[name](), time.process_time()
    layers, step, leapfrog, size = LONG[name]
    keys = jax.random.split(jax.random.key(seed), 5)
    block = S.HMC(num_steps=1, num_leapfrog=leapfrog, step_size=step)
    q = chain(keys[0], case, [block] * layers)
    found = S.sequential_monte_carlo(keys[1], q, case.log_density, size, num_runs=16)
    pick = jax.random.categorical(keys[2], found.log_weights, shape=found.log_weights.shape)
    moves = S.HMC(num_steps=50, num_leapfrog=leapfrog, step_size=step)
    move = jax.jit(jax.vmap(lambda key, x: moves.forward(key, x, case.log_density)[0]))
    x = move(jax.random.split(keys[3], len(pick)), found.x[pick])
    log_v = log_ratio(keys[4], q, case, x).reshape(16, -1)
    log_w = drawn_at_once(jax.random.fold_in(keys[4], 1), q, case, log_v.size).reshape(16, -1)
    both = np.array([bridge(w, v) for w, v in zip(log_w, log_v, strict=True)])
    error = lambda values: values.std(ddof=1) / 4
    forward, backward = (np.array([log_mean(part) for part in parts]) for parts in (log_w, -log_v))
    print(
        f"{name}: SMC {found.log_evidence}, annealing {log_mean(log_w):.3f} +- {error(forward):.3f}, "
        f"backwards {-log_mean(-log_v):.3f} +- {error(backward):.3f}, bridge "
        f"{bridge(log_w.ravel(), log_v.ravel()):.3f} +- {error(both):.3f}; "
        f"{time.process_time() - began:.0f} CPU s"
    )


def drawn_at_once(key, q, case, n):
    """Log weights of n draws."""

    def one(key):
        x, log_q = q.sample_and_log_prob(key, log_density=case.log_density)
        return case.log_density(x) - log_q

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key, n)), np.float64)


HEADER = (
    "target", "method", "error of log Z", "of 2000 draws", "ESS", "EUBO - ELBO", "found",
    "worst error of a mass", "CPU s of training", "in all", "",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=[name for name in CASES if name != "cox"])
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", nargs="*", default=[])
    options = parser.parse_args()
    for name in options.reference:
        reference(name, options.seed)
    if options.reference:
        return
    print("|" + "|".join(HEADER) + "|\n" + "|---" * len(HEADER) + "|")
    for name in options.cases:
        for method in options.methods:
            if name == "cox" and method not in ("coupling", "refine"):
                continue
            line = cell(name, method, options.seed)
            print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
