"""The double well by flow, Markov chain, annealing, stochastic flow and FAB, at equal cost.

Every method may evaluate the target's gradient (or value) the same number of times before it hands over
20,000 draws: a flow spends one evaluation a draw, an annealed path one a step, chains all of them on
moving. Means and standard errors over seeds; the weights' own standard errors are not shown.

    python tests/benchmarks/stochastic.py [method ...] [--seeds 5] [--evaluations 1200000] [--steps 300]
        [--json found.json]
    python tests/benchmarks/stochastic.py --picture docs/guide/double_well.svg --json found.json ...

With `--picture` nothing is run: the files are drawn.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vflow as vf

S = vf.flows.stochastic
LOG_Z, RIGHT = 10.2934797, 0.8443071
DRAWS = 20_000


def target(x):
    return 0.5 * x[0] + 6.0 * x[0] ** 2 - x[0] ** 4 - 0.5 * x[1] ** 2


def couplings(key):
    return vf.flows.coupling(key, 2, num_layers=6)


def annealed(key):
    return vf.flows.stochastic_flow(
        key, 2, [S.UnderdampedLangevin(num_steps=4, step_size=0.12)] * 8
    )


def stochastic(key):
    block = [S.couplings(num_layers=2), S.UnderdampedLangevin(num_steps=4, step_size=0.12)]
    return vf.flows.stochastic_flow(key, 2, block * 3)


def reversible(key):
    block = [S.couplings(num_layers=2), S.HMC(num_steps=1, num_leapfrog=5, step_size=0.15)]
    return vf.flows.stochastic_flow(key, 2, block * 4)


def elbo(gradient):
    return lambda n: vf.expect(
        lambda q: vf.objectives.elbo()(q, target), num_samples=n, gradient=gradient
    )


def fab(n):
    objective = vf.objectives.fab(n)
    return vf.expect(lambda q: objective(q, target))


def craft(n):
    objective = vf.objectives.craft(n)
    return vf.expect(lambda q: objective(q, target))


# name: (family, objective of the number of draws, evaluations of the target a draw, learning rate)
METHODS = {
    "flow, ELBO": (couplings, elbo("path"), 1, 3e-3),
    "flow, FAB": (couplings, fab, 29, 3e-3),
    "flow, FAB with replay": (couplings, None, 29, 3e-3),
    "annealed, ELBO": (annealed, elbo("total"), 41, 1e-2),
    "stochastic flow, ELBO": (stochastic, elbo("total"), 16, 3e-3),
    "stochastic flow, CRAFT": (reversible, craft, 37, 3e-3),
}


def drawn(key, q):
    options = {"log_density": target} if isinstance(q, S.StochasticFlow) else {}
    x, log_q = vf.sample_and_log_prob(key, q, DRAWS, **options)
    return x, jax.vmap(target)(x) - log_q


def trained(method, seeds, evaluations, steps):
    family, objective, cost, rate = METHODS[method]
    draws = max(2, evaluations // (steps * cost))
    updates = steps if objective else 4 * steps
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.adam(optax.cosine_decay_schedule(rate, updates, 0.01)),
    )

    def replayed(key_start, key):
        """The first filling of the buffer is part of the evaluations."""
        fab = vf.objectives.fab_replay(
            family(key_start), target, optimizer, num_particles=draws, num_updates=4
        )
        step = lambda state, key: fab.step(key, state)
        state, _ = jax.lax.scan(step, fab.init(key), jax.random.split(key, steps - 4))
        return fab.flow(state)

    def one(key):
        key_start, key_train, key_draw = jax.random.split(key, 3)
        if objective is None:
            return drawn(key_draw, replayed(key_start, key_train))
        # the structure is that of any key, the weights are those of this one
        trainable, static = vf._core.partition(family(key_start))
        estimate = objective(draws)

        def step(carry, key):
            params, state = carry
            loss = lambda params: -estimate(key, vf._core.combine(params, static))
            grad = jax.grad(loss)(params)
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grad)]))
            grad = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grad)
            updates, state = optimizer.update(grad, state)
            return (optax.apply_updates(params, updates), state), None

        carry = (trainable, optimizer.init(trainable))
        (trainable, _), _ = jax.lax.scan(step, carry, jax.random.split(key_train, steps))
        return drawn(key_draw, vf._core.combine(trainable, static))

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), seeds))


def chains(seeds, evaluations):
    """HMC at the target from the base's draws: no weights."""
    layer = S.HMC(num_steps=max(1, evaluations // (DRAWS * 6)), num_leapfrog=5, step_size=0.15)

    def one(key):
        x = jax.random.normal(key, (DRAWS, 2))
        keys = jax.random.split(jax.random.fold_in(key, 1), DRAWS)
        return jax.vmap(lambda key, x: layer.forward(key, x, target)[0])(keys, x)

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), seeds))


HEADER = (
    "method", "ELBO - log Z", "error of log Z", "ESS", "error of P(right), raw", "weighted",
    "a well lost", "CPU s",
)  # fmt: skip
COLUMNS = ("bound", "log_z", "ess", "raw", "weighted")


def judged(x, log_w):
    """Per seed: ELBO - log Z, log Z - truth, ESS, P(right) raw and weighted."""
    right = np.asarray(x)[:, :, 0] > 0
    if log_w is None:
        return {"raw": right.mean(axis=1).tolist()}
    log_w = np.asarray(log_w, np.float64)
    w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    found = {
        "bound": log_w.mean(axis=1) - LOG_Z,
        "log_z": np.log(w.mean(axis=1)) + log_w.max(axis=1) - LOG_Z,
        "ess": w.sum(axis=1) ** 2 / (w**2).sum(axis=1) / w.shape[1],
        "raw": right.mean(axis=1),
        "weighted": (w * right).sum(axis=1) / w.sum(axis=1),
    }
    return {name: np.asarray(values).tolist() for name, values in found.items()}


def summary(values):
    values = np.asarray(values, np.float64)
    return f"{values.mean():.4f} +- {values.std(ddof=1) / np.sqrt(values.size):.4f}"


def line(name, found, seconds):
    weighted = found.get("weighted", found["raw"])
    cells = {column: "-" for column in COLUMNS}
    for column, values in found.items():
        if column in ("raw", "weighted"):
            values = np.abs(np.asarray(values) - RIGHT)
        cells[column] = summary(np.abs(values) if column == "log_z" else values)
    lost = sum(not 0.5 * RIGHT < p < 1 - 0.5 * (1 - RIGHT) for p in weighted)
    cells = " | ".join(cells.values())
    return f"| {name} | {cells} | {lost} of {len(weighted)} | {seconds:.0f} |"


def picture(found, path):
    """Mass of the right well and error of log Z, every seed a dot."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "vflow"
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), sharey=True)
    for place, values in enumerate(found.values()):
        for column, shift, colour in (("raw", 0.15, "tab:orange"), ("weighted", -0.15, "tab:blue")):
            dots = values.get(column, [])
            left.plot(dots, [place + shift] * len(dots), "o", color=colour, ms=4, alpha=0.7)
        dots = np.maximum(np.abs(values.get("log_z", [])), 1e-4)
        right.plot(dots, [place] * len(dots), "o", color="tab:blue", ms=4, alpha=0.7)
    left.axvline(RIGHT, color="k", lw=0.8)
    left.set_xlabel("mass of the right well (orange: raw)")
    left.set_yticks(range(len(found)), list(found))
    left.set_ylim(len(found) - 0.5, -0.5)
    right.set_xscale("log")
    right.set_xlabel("error of log Z, nats")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=["chains, HMC", *METHODS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1_200_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", nargs="*", default=[])
    parser.add_argument("--picture")
    options = parser.parse_args()
    if options.picture:
        files = [json.loads(Path(name).read_text()) for name in options.json]
        picture({name: found for file in files for name, found in file.items()}, options.picture)
        return
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    kept = {}
    for name in options.methods:
        began = time.process_time()
        if name in METHODS:
            x, log_w = jax.device_get(
                trained(name, options.seeds, options.evaluations, options.steps)
            )
        else:
            x, log_w = np.asarray(chains(options.seeds, options.evaluations)), None
        kept[name] = judged(x, log_w)
        seconds = (time.process_time() - began) / options.seeds
        print(line(name, kept[name], seconds), flush=True)
        if options.json:
            Path(options.json[0]).write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
