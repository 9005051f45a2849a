"""What drawing from a flow costs, with the density of the draws, beside flowjax and distrax.

    python tests/benchmarks/flows.py --json flows.json

For each family and dimension: 256 draws with their log densities, and the value and gradient of
E[log q - log p] for a cheap p. Layers, widths, activations and bins are the same in all libraries (of
flowjax its constructors, of distrax `MaskedCoupling` in a `Chain`; distrax has neither planar nor
autoregressive flows). Times are CPU milliseconds, medians over interleaved rounds in one process: in
each, every program is called five times in a row, as training calls it, and the order of the programs
is random. Trace and compile times are the smallest of three with empty caches.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import vflow as vf
from tests.benchmarks._measure import machine, table

BATCH, BINS, BOUND = 256, 8, 5.0
CALLS = 5  # of a program in a row
LAYERS = {"affine coupling": 8, "spline coupling": 8, "planar": 8, "IAF": 4, "MAF": 4}
WIDTHS = (32, 32)


class Flow(NamedTuple):
    """Parameters, and `draw(params, key) -> (x, log_q)` of a batch."""

    params: Any
    draw: Callable[..., Any]


def _moved(params):
    """Away from the start, where some of the work would be with zeros."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.05 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [a + e for a, e in zip(leaves, noise, strict=True)])


def in_vflow(family: str, dim: int, num_layers: int) -> Flow:
    options = {"num_layers": num_layers}
    if family != "planar":
        options |= {"hidden": WIDTHS, "activation": "relu"}
    if family == "spline coupling":
        options["transformer"] = vf.bijections.Spline(BINS, BOUND)
    constructors = {
        "planar": vf.flows.planar,
        "IAF": vf.flows.inverse_autoregressive,
        "MAF": vf.flows.masked_autoregressive,
    }
    flow = constructors.get(family, vf.flows.coupling)(jax.random.key(0), dim, **options)
    draw = lambda params, key: vf.sample_and_log_prob(key, eqx.combine(params, flow), BATCH)
    return Flow(vf.params(flow), draw)


def in_flowjax(family: str, dim: int, num_layers: int) -> Flow:
    import paramax
    from flowjax import bijections, distributions, flows

    options = {"base_dist": distributions.Normal(jnp.zeros(dim)), "flow_layers": num_layers}
    options["invert"] = family == "MAF"
    if family != "planar":
        options |= {"nn_width": WIDTHS[0], "nn_depth": len(WIDTHS)}
    if family == "spline coupling":
        spline = bijections.RationalQuadraticSpline(knots=BINS, interval=BOUND)
        options["transformer"] = spline
    constructors = {
        "planar": flows.planar_flow,
        "IAF": flows.masked_autoregressive_flow,
        "MAF": flows.masked_autoregressive_flow,
    }
    flow = constructors.get(family, flows.coupling_flow)(jax.random.key(0), **options)
    frozen = lambda leaf: isinstance(leaf, paramax.NonTrainable)
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=frozen)

    def draw(params, key):
        return paramax.unwrap(eqx.combine(params, static)).sample_and_log_prob(key, (BATCH,))

    return Flow(params, draw)


def in_distrax(family: str, dim: int, num_layers: int) -> Flow:
    import distrax

    spline = family == "spline coupling"
    num_params = 3 * BINS + 1 if spline else 2
    sizes = (dim, *WIDTHS, dim * num_params)
    rng = np.random.default_rng(0)
    params = [
        [
            (jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32), jnp.zeros(m))
            for n, m in pairwise(sizes)
        ]
        for _ in range(num_layers)
    ]
    base = distrax.Independent(distrax.Normal(jnp.zeros(dim), jnp.ones(dim)), 1)

    def bijector(params):
        if spline:
            return distrax.RationalQuadraticSpline(
                params, -BOUND, BOUND, boundary_slopes="identity", min_bin_size=1e-3
            )
        return distrax.ScalarAffine(shift=params[..., 0], log_scale=params[..., 1])

    def draw(params, key):
        layers = []
        for i, layer in enumerate(params):

            def conditioner(x, layer=layer):
                for weight, bias in layer[:-1]:
                    x = jax.nn.relu(x @ weight + bias)
                x = x @ layer[-1][0] + layer[-1][1]
                return x.reshape(*x.shape[:-1], dim, num_params)

            mask = jnp.arange(dim) % 2 == i % 2
            layers.append(distrax.MaskedCoupling(mask, conditioner, bijector))
        flow = distrax.Transformed(base, distrax.Chain(layers[::-1]))
        return flow.sample_and_log_prob(seed=key, sample_shape=BATCH)

    return Flow(params, draw)


def contenders(family: str) -> dict[str, Callable[..., Flow]]:
    libraries = {"vflow": in_vflow, "flowjax": in_flowjax}
    return libraries | ({"distrax": in_distrax} if "coupling" in family else {})


def programs(flow: Flow) -> dict[str, Callable[..., Any]]:
    """Drawing alone, and the value and gradient of E[log q - log p]."""

    def loss(params, key):
        x, log_q = flow.draw(params, key)
        return jnp.mean(log_q + 0.5 * jnp.sum(x**2, 1) + 0.01 * jnp.sum(x**4, 1))

    return {"draw": flow.draw, "gradient": jax.value_and_grad(loss)}


def compiled(program: Callable, params: Any) -> tuple[Any, float]:
    """The compiled program, and the CPU seconds that tracing and compiling took."""
    seconds = []
    for _ in range(3):
        jax.clear_caches()
        began = time.process_time()
        run = jax.jit(program).lower(params, jax.random.key(2)).compile()
        seconds.append(time.process_time() - began)
    return run, min(seconds)


def measure(family: str, dim: int, rounds: int, seconds: float) -> dict[tuple[str, str], tuple]:
    """`(milliseconds a call, seconds to trace and compile)` by library and program."""
    runs = {}
    for library, make in contenders(family).items():
        flow = make(family, dim, LAYERS[family])
        params = _moved(flow.params)
        for name, program in programs(flow).items():
            run, seconds_to_compile = compiled(program, params)
            jax.block_until_ready(run(params, jax.random.key(0)))
            runs[library, name] = (run, params, seconds_to_compile)
    times = {which: [] for which in runs}
    end = time.process_time() + seconds
    rng = np.random.default_rng(0)  # what ran before has its arrays in the caches
    for i in range(rounds):
        for which in map(list(runs).__getitem__, rng.permutation(len(runs))):
            run, params, _ = runs[which]
            keys = [jax.random.key(CALLS * i + j) for j in range(CALLS)]
            began = time.process_time()
            for key in keys:
                jax.block_until_ready(run(params, key))
            times[which].append((time.process_time() - began) / CALLS)
        if time.process_time() > end and i >= 4:
            break
    return {which: (1e3 * float(np.median(t)), runs[which][2]) for which, t in times.items()}


def rows_of(family: str, dim: int, results: dict) -> list[tuple]:
    """A row for each library, vflow's with its ratio to the best peer."""
    rows = []
    for library in contenders(family):
        cells = []
        for position, digits in ((0, 3), (1, 2)):
            for name in programs(Flow(None, lambda: None)):
                value = results[library, name][position]
                cell = f"{value:.{digits}f}"
                if library == "vflow":
                    peers = [
                        r[position] for (p, n), r in results.items() if p != library and n == name
                    ]
                    cell += f" ({value / min(peers):.2f})"
                cells.append(cell)
        rows.append((family, dim, library, *cells))
    return rows


def depth(dim: int, families: list[str]) -> list[tuple]:
    """CPU seconds to trace and compile vflow's gradient with 4 and with 32 layers."""
    rows = []
    for family in families:
        seconds = []
        for num_layers in (4, 32):
            flow = in_vflow(family, dim, num_layers)
            seconds.append(compiled(programs(flow)["gradient"], flow.params)[1])
        rows.append((family, *(f"{s:.2f}" for s in seconds), f"{seconds[1] / seconds[0]:.2f}"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="at most, of each program")
    parser.add_argument(
        "--seconds", type=float, default=4, help="of rounds, by family and dimension"
    )
    parser.add_argument("--families", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--dims", nargs="*", type=int, default=[10, 100])
    parser.add_argument("--json", type=Path, help="results, written at the end")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    print(f"{machine()}\ndistrax {importlib.metadata.version('distrax')}\n", flush=True)
    results, rows = {}, []
    for family in options.families:
        for dim in options.dims:
            found = measure(family, dim, options.rounds, options.seconds)
            results[f"{family}, {dim}"] = {" ".join(k): v for k, v in found.items()}
            rows += rows_of(family, dim, found)
            print("  ".join(f"{' '.join(k)}: {v[0]:.3f} ms" for k, v in found.items()), flush=True)
    print(f"\nCPU milliseconds a call, {BATCH} draws (ratio to the best peer)\n")
    header = (
        "family",
        "d",
        "library",
        "draw",
        "gradient",
        "draw: compile s",
        "gradient: compile s",
    )
    print(table(header, rows), flush=True)
    print("\nCPU seconds to trace and compile vflow's gradient at d = 10, by layers\n")
    rows = depth(10, options.families)
    print(table(("family", "4 layers", "32 layers", "ratio"), rows), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"times": results, "depth": rows}, indent=1))


if __name__ == "__main__":
    main()
