"""The double well by flow, Markov chain, annealing, stochastic flow and FAB, at equal cost.

Every method may evaluate the target's gradient (or value) the same number of times before it hands over
20,000 draws: a flow spends one evaluation a draw, an annealed path one a step, chains all of them on
moving. Means and standard errors over seeds; the weights' own standard errors are not shown.

    python tests/benchmarks/stochastic.py [method ...] [--seeds 5] [--evaluations 1200000] [--steps 300]
"""

import argparse
import time

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


def elbo(gradient):
    return lambda n: vf.expect(
        lambda q: vf.objectives.elbo()(q, target), num_samples=n, gradient=gradient
    )


def fab(n):
    objective = vf.objectives.fab(n)
    return vf.expect(lambda q: objective(q, target))


# name: (family, objective of the number of draws, evaluations of the target a draw, learning rate)
METHODS = {
    "flow, ELBO": (couplings, elbo("path"), 1, 3e-3),
    "flow, FAB": (couplings, fab, 29, 3e-3),
    "annealed": (annealed, elbo("total"), 41, 1e-2),
    "stochastic flow": (stochastic, elbo("total"), 16, 3e-3),
}


def trained(method, seeds, evaluations, steps):
    family, objective, cost, rate = METHODS[method]
    estimate = objective(max(2, evaluations // (steps * cost)))
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(rate, steps, 0.01))
    )

    def one(key):
        key_start, key_train, key_draw = jax.random.split(key, 3)
        # the structure is that of any key, the weights are those of this one
        trainable, static = vf._core.partition(family(key_start))

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
        q = vf._core.combine(trainable, static)
        x, log_q = vf.sample_and_log_prob(key_draw, q, DRAWS, log_density=target)
        return x, jax.vmap(target)(x) - log_q

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), seeds))


def chains(seeds, evaluations):
    """HMC at the target from the base's draws: no weights."""
    layer = S.HMC(num_steps=max(1, evaluations // (DRAWS * 6)), num_leapfrog=5, step_size=0.15)

    def one(key):
        x = jax.random.normal(key, (DRAWS, 2))
        keys = jax.random.split(jax.random.fold_in(key, 1), DRAWS)
        return jax.vmap(lambda key, x: layer.forward(key, x, target)[0])(keys, x)

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), seeds))


def summary(values):
    values = np.asarray(values, np.float64)
    return f"{values.mean():.3f} +- {values.std(ddof=1) / np.sqrt(values.size):.3f}"


def row(name, x, log_w, seconds):
    right = np.asarray(x)[:, :, 0] > 0
    raw = summary(np.abs(right.mean(axis=1) - RIGHT))
    if log_w is None:
        print(f"| {name} | - | - | - | {raw} | - | {seconds:.0f} |")
        return
    log_w = np.asarray(log_w, np.float64)
    w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    log_z = np.log(w.mean(axis=1)) + log_w.max(axis=1)
    ess = w.sum(axis=1) ** 2 / (w**2).sum(axis=1) / w.shape[1]
    weighted = (w * right).sum(axis=1) / w.sum(axis=1)
    print(
        f"| {name} | {summary(log_w.mean(axis=1) - LOG_Z)} | {summary(np.abs(log_z - LOG_Z))} | "
        f"{summary(ess)} | {raw} | {summary(np.abs(weighted - RIGHT))} | {seconds:.0f} |"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=["chains, HMC", *METHODS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1_200_000)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    print(
        "| method | ELBO - log Z | error of log Z | ESS | error of P(right), raw | weighted | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.methods:
        began = time.process_time()
        if name in METHODS:
            drawn = trained(name, options.seeds, options.evaluations, options.steps)
            x, log_w = jax.device_get(drawn)
        else:
            x, log_w = np.asarray(chains(options.seeds, options.evaluations)), None
        row(name, x, log_w, (time.process_time() - began) / options.seeds)


if __name__ == "__main__":
    main()
