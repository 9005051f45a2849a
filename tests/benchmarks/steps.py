"""The cost of one training step: value and gradient of the ELBO of flows of eight layers.

    python tests/benchmarks/steps.py --json steps.json

Times are medians over interleaved rounds in one process; a round runs 20 steps in a compiled loop
(each followed by a small move of the parameters). The target is cheap, so the flow is what costs.
Flops are XLA's count for the compiled step with unrolled layers: a property of the program, without
noise. vflow and the hand-written flow have the same layers, the peers their default networks.

A variational autoencoder, written as a program and by hand with the same keys, comes at the end.
"""

import argparse
import itertools
import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO, autoguide

import vflow as vf
from tests.benchmarks._measure import machine, table

SIZES = ((10, 16), (10, 128), (100, 256))
STEPS = 20


class Step(NamedTuple):
    """`value_and_grad(params, key)` of an ELBO (or its negative), and parameters to start from."""

    params: Any
    value_and_grad: Callable[..., Any]


def log_density(x):
    return -0.5 * jnp.sum(x**2) - 0.05 * jnp.sum(x**4)


def sliced(layers, num_layers):
    """The layers of a stack, one by one."""
    arrays, static = eqx.partition(layers, eqx.is_array)
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], arrays)
    return [eqx.combine(take(i), static) for i in range(num_layers)]


def vflow_step(gradient):
    def make(dim, batch, num_layers=8, unrolled=False):
        flow = vf.flows.coupling(jax.random.key(0), dim, num_layers=num_layers)
        if unrolled:
            scan, *rest = flow.bijection.layers
            chain = vf.bijections.Chain([*sliced(scan.layers, num_layers), *rest])
            flow = vf.distributions.Flow(flow.base, chain)
        elbo = vf.objectives.elbo()
        estimate = vf.expect(lambda q: elbo(q, log_density), batch, gradient=gradient)
        params = vf.params(flow)
        gradient_of = vf.value_and_grad(estimate)
        # eqx.combine, as vf.fit does it: the static half of the flow is a constant of the program
        return Step(params, lambda p, key: gradient_of(key, eqx.combine(p, flow)))

    return make


def hand_written(dim, batch, num_layers=8, unrolled=False):
    """RealNVP in plain JAX, batched, with the layers of vflow's default flow."""
    half, hidden = dim // 2, 32
    sizes = (half, hidden, hidden, 2 * (dim - half))
    rng = np.random.default_rng(0)
    weights = [
        jnp.asarray(rng.normal(size=(num_layers, n, m)) * (i < 2) / n**0.5, jnp.float32)
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    ]
    biases = [jnp.zeros((num_layers, m)) for m in sizes[1:]]
    orders = jnp.asarray([rng.permutation(dim) for _ in range(num_layers)])
    params = (weights, biases, jnp.zeros(dim), jnp.zeros(dim))

    def layer(carry, given):
        (x, log_det), (weights, biases, order) = carry, given
        passive, active = x[:, :half], x[:, half:]
        h = passive
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            h = jax.nn.silu(h @ w + b)
        shift, raw = jnp.split(h @ weights[-1] + biases[-1], 2, axis=1)
        log_scale = 4 / jnp.pi * jnp.arctan(raw / 2)
        x = jnp.concatenate([passive, active * jnp.exp(log_scale) + shift], axis=1)
        return (x[:, order], log_det + log_scale.sum(axis=1)), None

    def negative_elbo(params, key):
        weights, biases, loc, log_scale = params
        z = jax.random.normal(key, (batch, dim))
        carry, given = (z, jnp.zeros_like(z[:, 0])), (weights, biases, orders)
        if unrolled:
            for i in range(num_layers):
                carry, _ = layer(carry, jax.tree.map(lambda leaf, i=i: leaf[i], given))
        else:
            carry, _ = jax.lax.scan(layer, carry, given)
        x, log_det = carry
        x, log_det = x * jnp.exp(log_scale) + loc, log_det + log_scale.sum()
        log_q = -0.5 * (z**2 + jnp.log(2 * jnp.pi)).sum(axis=1) - log_det
        return (log_q - jax.vmap(log_density)(x)).mean()

    return Step(params, jax.value_and_grad(negative_elbo))


def flowjax_step(stick_the_landing):
    def make(dim, batch, num_layers=8, unrolled=False):
        import paramax
        from flowjax.bijections import Chain
        from flowjax.distributions import Normal, Transformed
        from flowjax.flows import coupling_flow
        from flowjax.train.losses import ElboLoss

        base = Normal(jnp.zeros(dim))
        flow = coupling_flow(
            jax.random.key(0), base_dist=base, flow_layers=num_layers, invert=False
        )
        if unrolled:
            flow = Transformed(base, Chain(sliced(flow.bijection.bijection, num_layers)))
        frozen = lambda leaf: isinstance(leaf, paramax.NonTrainable)
        params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=frozen)
        loss = ElboLoss(log_density, batch, stick_the_landing=stick_the_landing)
        return Step(params, lambda p, key: jax.value_and_grad(loss)(p, static, key))

    return make


def numpyro_step(dim, batch, num_layers=8, unrolled=True):
    """AutoIAFNormal; NumPyro's layers are always unrolled."""

    def model():
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (dim,))
        numpyro.factor("log_density", log_density(numpyro.sample("x", flat)))

    guide = autoguide.AutoIAFNormal(model, num_flows=num_layers)
    elbo = Trace_ELBO(num_particles=batch)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), elbo)
    params = svi.get_params(svi.init(jax.random.key(0)))
    loss = lambda p, key: elbo.loss(key, p, model, guide)
    return Step(params, jax.value_and_grad(loss))


CONTENDERS = {
    "vflow, path": vflow_step("path"),
    "vflow, total": vflow_step("total"),
    "hand-written RealNVP, total": hand_written,
    "flowjax coupling, total": flowjax_step(False),
    "flowjax coupling, stick-the-landing": flowjax_step(True),
    "numpyro AutoIAFNormal, total": numpyro_step,
}


def loop(step):
    """STEPS steps in one compiled program."""

    def run(params, key):
        def body(params, key):
            value, gradient = step.value_and_grad(params, key)
            return jax.tree.map(lambda p, g: p - 1e-6 * g, params, gradient), value

        return jax.lax.scan(body, params, jax.random.split(key, STEPS))

    return jax.jit(run)


def step_times(dim, batch, rounds):
    """Median microseconds a step by contender."""
    runs = {}
    for name, make in CONTENDERS.items():
        step = make(dim, batch)
        runs[name] = (loop(step), step.params)
        jax.block_until_ready(runs[name][0](step.params, jax.random.key(0)))
    times = {name: [] for name in runs}
    for i in range(rounds):
        for name, (run, params) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(params, jax.random.key(i)))
            times[name].append((time.perf_counter() - began) / STEPS * 1e6)
    return {name: float(np.median(values)) for name, values in times.items()}


def flops(dim, batch):
    """Flops of one step by contender, layers unrolled."""
    counts = {}
    for name, make in CONTENDERS.items():
        step = make(dim, batch, unrolled=True)
        compiled = jax.jit(step.value_and_grad).lower(step.params, jax.random.key(0)).compile()
        counts[name] = compiled.cost_analysis()["flops"]
    return counts


def compile_times(num_layers):
    """Seconds to construct, and to trace, lower and compile a step at (10, 16), by contender."""
    seconds = {}
    for name, make in CONTENDERS.items():
        jax.clear_caches()
        began = time.perf_counter()
        step = make(10, 16, num_layers)
        made = time.perf_counter()
        jax.jit(step.value_and_grad).lower(step.params, jax.random.key(0)).compile()
        seconds[name] = (made - began, time.perf_counter() - made)
    return seconds


def autoencoder_arms():
    """Value and gradient of a 784-400-20 autoencoder's ELBO, batch 128: by hand, and as a program."""
    rng = np.random.default_rng(0)
    sizes = {"e1": (784, 400), "e2": (400, 40), "d1": (20, 400), "d2": (400, 784)}
    params = {k: jnp.asarray(0.05 * rng.normal(size=n), jnp.float32) for k, n in sizes.items()}
    images = jnp.asarray(rng.integers(0, 2, (128, 784)), jnp.float32)

    def encode(p, x):
        out = jnp.tanh(x @ p["e1"]) @ p["e2"]
        return dist.Normal(out[:, :20], jnp.exp(out[:, 20:]))

    def log_joint(p, x, z):
        logits = jnp.tanh(z @ p["d1"]) @ p["d2"]
        return (
            dist.Normal(0.0, 1.0).log_prob(z).sum() + dist.BernoulliLogits(logits).log_prob(x).sum()
        )

    def by_hand(key, p, x):
        q = encode(p, x)
        z = q.sample(jax.random.fold_in(key, zlib.crc32(b"simulate #0/z")))
        return log_joint(p, x, z) - q.log_prob(z).sum()

    @vf.program
    def guide(p, x):
        vf.sample("z", encode(p, x))

    def program(p, x):
        values, log_q = guide.simulate(p, x)
        return log_joint(p, x, values["z"]) - log_q

    args = jax.random.key(0), params, images
    arms = {"by hand": by_hand, "program": vf.expect(program)}
    compiled = {
        name: jax.jit(jax.value_and_grad(arm, argnums=1)).lower(*args).compile()
        for name, arm in arms.items()
    }
    return compiled, args


def autoencoder(rounds):
    """Median CPU and wall milliseconds of a step, flops, and the median ratio of paired times."""
    compiled, args = autoencoder_arms()
    for run in compiled.values():
        jax.block_until_ready(run(*args))
    times = {name: [] for name in compiled}
    for i in range(rounds):
        names = list(compiled) if i % 2 else list(compiled)[::-1]
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                jax.block_until_ready(compiled[name](*args))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name].append((wall / STEPS * 1e3, cpu / STEPS * 1e3))
    hand, ours = np.array(times["by hand"]), np.array(times["program"])
    flops = {name: run.cost_analysis()["flops"] for name, run in compiled.items()}
    rows = [
        (name, *(f"{x:.2f}" for x in np.median(times[name], axis=0)), f"{flops[name] / 1e6:.1f}")
        for name in compiled
    ]
    ratio = (*(f"{x:.3f}" for x in np.median(ours / hand, axis=0)),)
    return [*rows, ("ratio", *ratio, f"{flops['program'] / flops['by hand']:.3f}")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="results, written at the end")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    print(machine(), flush=True)
    times = {size: step_times(*size, options.rounds) for size in SIZES}
    labels = [f"({d}, {n})" for d, n in SIZES]
    rows = [(name, *(f"{times[size][name]:.0f}" for size in SIZES)) for name in CONTENDERS]
    print("\nMicroseconds a step, by (dimension, batch)\n")
    print(table(("step", *labels), rows), flush=True)

    counts = {size: flops(*size) for size in SIZES[1:]}
    rows = [
        (
            name,
            *(
                f"{counts[size][name] / 1e6:.2f} "
                f"({counts[size][name] / counts[size]['vflow, total']:.2f})"
                for size in counts
            ),
        )
        for name in CONTENDERS
    ]
    print("\nMillions of flops a step (ratio to vflow, total), layers unrolled\n")
    print(table(("step", *labels[1:]), rows), flush=True)

    seconds = {num_layers: compile_times(num_layers) for num_layers in (4, 32)}
    rows = [(name, *(f"{x:.2f}" for n in (4, 32) for x in seconds[n][name])) for name in CONTENDERS]
    print("\nSeconds to construct the flow, and to trace and compile a step, by layers\n")
    header = ("step", "construct 4", "compile 4", "construct 32", "compile 32")
    print(table(header, rows), flush=True)

    print("\nVariational autoencoder 784-400-20, batch 128\n")
    header = ("step", "wall ms", "CPU ms", "millions of flops")
    rows = autoencoder(options.rounds)
    print(table(header, rows), flush=True)
    print("\n" + machine().splitlines()[1])
    if options.json:
        named = lambda results: {str(k): v for k, v in results.items()}
        results = {"times": named(times), "flops": named(counts), "compile": named(seconds)}
        results["autoencoder"] = rows
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
