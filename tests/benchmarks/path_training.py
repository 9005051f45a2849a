"""Training with total, path and mixed gradients: quality by step and by CPU second.

The same flow, optimiser, seeds and draws; only the estimator of the gradient differs. Targets: 64
Gaussians in six dimensions at (+-1, ..., +-1) with variance 1/2 (affine and spline couplings), the
phi^4 theory on a 6 x 6 lattice (checkerboard split), and a flow of planar layers that cannot match its
target. CPU seconds are those of the steps, without compilation.

    python tests/benchmarks/path_training.py --seeds 5 --svg docs/guide/path_gradients.svg
"""

import argparse
import functools as ft
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vflow as vf
from tests.benchmarks._measure import machine, table
from vflow._core import combine, partition
from vflow.fit._loop import Ascent
from vflow.fit._mixing import mixed
from vflow.programs._frame import mixing

GRADIENTS = ("total", "path", "auto")
EVEN_FIRST = np.argsort(np.indices((6, 6)).sum(axis=0).ravel() % 2, kind="stable")


def corners(x):
    """64 Gaussians of variance 1/2 at the corners of a cube, normalised."""
    both = jnp.logaddexp(-((x - 1.0) ** 2), -((x + 1.0) ** 2))
    return jnp.sum(both) - x.size * jnp.log(2.0 * jnp.sqrt(jnp.pi))


def corner_draws(key, n, dim=6):
    centre, noise = jax.random.split(key)
    signs = jax.random.rademacher(centre, (n, dim), jnp.float32)
    return signs + jnp.sqrt(0.5) * jax.random.normal(noise, (n, dim))


def phi4(x, kappa=0.25, coupling=0.022):
    """Minus the action of the phi^4 theory on a 6 x 6 torus; the even sites come first in x."""
    field = jnp.zeros(36).at[EVEN_FIRST].set(x).reshape(6, 6)
    neighbours = jnp.roll(field, 1, axis=0) + jnp.roll(field, 1, axis=1)
    action = -2 * kappa * field * neighbours + (1 - 2 * coupling) * field**2 + coupling * field**4
    return -jnp.sum(action)


def bent(x):
    """A quartic in four dimensions with correlations."""
    return -0.25 * jnp.sum(x**4) + x[0] * x[1] - x[2] * x[3]


class Case(NamedTuple):
    """What is trained, and for how long."""

    log_density: Callable[..., Any]
    make: Callable[..., Any]
    num_steps: int


_coupling = ft.partial(vf.flows.coupling, num_layers=6)
CASES = {
    "corners, affine": Case(corners, lambda k: _coupling(k, 6, hidden=(64, 64)), 2000),
    "corners, spline": Case(
        corners, lambda k: _coupling(k, 6, hidden=(64, 64), transformer="spline"), 2000
    ),
    "phi4, affine": Case(phi4, lambda k: _coupling(k, 36, hidden=(128, 128)), 3000),
    "mismatched": Case(bent, lambda k: vf.flows.planar(k, 4, num_layers=2), 1000),
}


class Snapshot(NamedTuple):
    """A flow on its way."""

    step: int
    seconds: float
    params: Any
    share: float


def reverse_kl(case, gradient):
    def objective(flow):
        x, log_q = flow.simulate(gradient=gradient)
        return case.log_density(x) - log_q

    return vf.expect(objective, num_samples=256)


def trainer(make, estimate, num_steps, *, auto=False):
    """`train(seed) -> snapshots`, one a hundred steps; compiled once for all seeds."""
    _, static = partition(make(jax.random.key(0)))

    def value_and_grad(key, trained):
        return jax.value_and_grad(lambda p: estimate(key, combine(p, static)))(trained)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, num_steps, alpha=0.01))
    ascent = Ascent(value_and_grad, mixed(optimizer) if auto else optimizer)
    start = partition(make(jax.random.key(0)))[0]
    ascent.run(jax.random.key(0), start, 1)

    def train(seed):
        key, key_flow = jax.random.split(jax.random.key(seed))
        start = partition(make(key_flow))[0]
        snapshots = []

        def save(state):
            jax.block_until_ready(state.params)
            seconds = time.process_time() - began
            share = float(state.optimizer_state[1].share()) if auto else 1.0
            snapshots.append(Snapshot(state.step, seconds, state.params, share))

        began = time.process_time()
        ascent.run(key, start, 1, save=save)  # for the coefficient of the first step
        first = Snapshot(0, 0.0, start, snapshots.pop().share)
        began = time.process_time()
        ascent.run(key, start, num_steps, save=save)
        return [first, *snapshots]

    return train, static


def ess_of(case, static, n=20_000):
    """`params -> ESS fraction` on n draws."""

    @jax.jit
    def fraction(params, key):
        x, log_q = vf.sample_and_log_prob(key, combine(params, static), n)
        return vf.diagnostics.ess_fraction(jax.vmap(case.log_density)(x) - log_q)

    return lambda params: float(fraction(params, jax.random.key(1000)))


def variances_of(case, static, n=40):
    """`(params, share) -> (total, path, mixture)`: traces of the covariance over n minibatches."""
    estimate = reverse_kl(case, "auto")

    @jax.jit
    def variances(params, share):
        def one(key):
            def gradient(share):
                with mixing(share):
                    return jax.grad(lambda p: estimate(key, combine(p, static)))(params)

            return jax.vmap(gradient)(jnp.array([0.0, 1.0, share]))

        rows = jax.lax.map(one, jax.random.split(jax.random.key(2000), n))
        return sum(leaf.var(axis=0, ddof=1).reshape(3, -1).sum(1) for leaf in jax.tree.leaves(rows))

    return lambda params, share: [float(v) for v in variances(params, jnp.float32(share))]


def reverse(name, seeds, gradients=GRADIENTS):
    """Curves of ESS and, at start, middle and end, variances; by gradient and seed."""
    case, results = CASES[name], {}
    for gradient in gradients:
        estimate = reverse_kl(case, gradient)
        train, static = trainer(case.make, estimate, case.num_steps, auto=gradient == "auto")
        ess, variances = ess_of(case, static), variances_of(case, static)
        results[gradient] = []
        for seed in range(seeds):
            shots = train(seed)
            few = [s for s in shots if s.step % 500 == 0 or s.step == 200]
            curve = [(s.step, s.seconds, ess(s.params)) for s in few]
            marked = [few[0], few[1], few[len(few) // 2], few[-1]] if seed == 0 else []
            spread = [(s.step, s.share, *variances(s.params, s.share)) for s in marked]
            results[gradient].append({"curve": curve, "variances": spread})
    return results


def forward(seeds, num_steps=2000):
    """Negative log-likelihood of fresh draws, trained on 1000; by gradient and seed."""
    make = lambda key: _coupling(key, 6, hidden=(64, 64), activation="tanh")
    fresh = corner_draws(jax.random.key(3000), 20_000)
    results = {}
    for gradient in ("total", "path"):
        results[gradient] = []
        for seed in range(seeds):
            data = corner_draws(jax.random.key(4000 + seed), 1000)
            estimate = vf.objectives.forward_kl(corners, data, batch_size=256, gradient=gradient)
            train, static = trainer(make, estimate, num_steps)
            flow = combine(train(seed)[-1].params, static)
            loss = -jnp.mean(jax.vmap(flow.log_prob)(fresh))
            x, log_q = vf.sample_and_log_prob(jax.random.key(1000), flow, 20_000)
            ess = vf.diagnostics.ess_fraction(jax.vmap(corners)(x) - log_q)
            results[gradient].append((float(loss), float(ess)))
    return results


def picture(results, path):
    """ESS against CPU seconds; seeds thin, one colour a gradient."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3), layout="tight")
    for axis, (name, by_gradient) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for colour, (gradient, runs) in zip(("C7", "C0", "C1"), by_gradient.items(), strict=False):
            for i, run in enumerate(runs):
                _, seconds, ess = zip(*run["curve"], strict=True)
                label = gradient if i == 0 else None
                axis.plot(seconds, ess, color=colour, lw=1, alpha=0.8, label=label)
        axis.set(title=name, xlabel="CPU seconds of training", ylabel="ESS fraction", ylim=(0, 1))
    np.atleast_1d(axes)[0].legend(frameon=False)
    figure.savefig(path)


def report(results):
    """Two markdown tables."""
    ends, spread = [], []
    for name, by_gradient in results.items():
        for gradient, runs in by_gradient.items():
            ess = sorted(run["curve"][-1][2] for run in runs)
            steps, seconds, _ = zip(*(run["curve"][-1] for run in runs), strict=True)
            step = 1e3 * np.median(np.divide(seconds, steps))
            cost = (f"{np.median(seconds):.1f}", f"{step:.2f}")
            ends.append(
                (name, gradient, f"{np.median(ess):.3f}", f"{ess[0]:.3f} to {ess[-1]:.3f}", *cost)
            )
            for at, share, total, path, auto in runs[0]["variances"]:
                mixed_in = (f"{share:.2f}", f"{auto / min(total, path):.2f}")
                row = (name, gradient, at, f"{total:.3g}", f"{path:.3g}", f"{total / path:.1f}")
                spread.append(row + (mixed_in if gradient == "auto" else ("", "")))
    header = ("target and flow", "gradient", "ESS fraction, median", "range", "CPU s", "ms a step")
    print(table(header, ends))
    header = ("trained with", "", "step", "variance of total", "of path", "ratio")
    print("\n" + table((*header, "coefficient", "mixture / smaller of both"), spread), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=[*CASES, "forward"])
    parser.add_argument("--json", type=Path, help="results, added to those already there")
    parser.add_argument("--svg", type=Path, help="plot of ESS against CPU seconds, of all results")
    options = parser.parse_args()
    print(machine(), flush=True)
    stored = options.json and options.json.exists()
    results = json.loads(options.json.read_text()) if stored else {}
    for name in [name for name in options.cases if name != "forward"]:
        results[name] = reverse(name, options.seeds)
        report({name: results[name]})
        if options.json:
            options.json.write_text(json.dumps(results))
    if "forward" in options.cases:
        rows = [
            (gradient, *(f"{loss:.2f} ({ess:.2f})" for loss, ess in runs))
            for gradient, runs in forward(options.seeds).items()
        ]
        seeds = [f"seed {i}" for i in range(options.seeds)]
        print("\nForward KL: NLL of fresh draws (ESS fraction)\n" + table(("", *seeds), rows))
    if options.svg:
        picture(results, options.svg)


if __name__ == "__main__":
    main()
