"""How the time and the memory of a training step grow: dimensions, rows, particles, devices.

    python tests/benchmarks/scale.py                     # all tables, and the picture
    python tests/benchmarks/scale.py --cases rows        # one of dim, rows, particles, devices, locals

A step is what `vf.fit` does at each iteration before the optimiser: value and path gradient of the bound.
Memory is what XLA plans for temporaries, by device; time the median of repeated runs in one process.
The devices are virtual ones of one CPU: they show who holds what, not speed.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import vflow as vf
from tests.benchmarks._measure import machine, table
from vflow._core import combine, partition
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._local_bound import minibatch_bound
from vflow.fit._local_draws import row_inputs
from vflow.fit._local_start import Start
from vflow.fit._low_rank import LowRank
from vflow.fit._mesh import Layout
from vflow.fit._recipe import default_flow, precondition
from vflow.programs import value_and_grad
from vflow.targets._rows import Rows

CASES = ("dim", "rows", "particles", "devices", "locals")
DIMS = (10, 50, 200, 500, 1000, 2000)
ROWS = (1_000, 10_000, 100_000, 1_000_000)
PARTICLES = (16, 64, 256, 1024, 4096)
DEVICES = (1, 2, 4, 8)
LOCALS = (100, 1_000, 10_000)


def measure(function, *arguments, seconds=2.0):
    """Milliseconds of a call, megabytes of its temporaries."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready(compiled(*arguments))
    times, until = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 200):
        began = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times), memory


def step_of(flow, target, num_samples, layout=None):
    """A step of `vf.fit` as a function of key, parameters and, on a mesh, data."""
    trainable, static = partition(flow)
    layout = Layout(None, target, num_samples) if layout is None else layout
    estimate = vf.expect(
        lambda flow, *inputs: vf.objectives.elbo()(flow, layout.bound(target, inputs)),
        num_samples,
        gradient="path",
    )

    def step(key, trainable, *inputs):
        with layout.particles():
            bound = lambda key, t: estimate(key, combine(t, static), *inputs)
            return layout.replicated(value_and_grad(bound)(key, trainable))

    return step, trainable


def by_dim():
    rows = []
    for dim in DIMS:
        target = vf.Target(lambda x: -0.5 * jnp.sum(x**2), dim=dim)
        flow = default_flow(jax.random.key(0), dim)
        if dim > 200:
            layer = LowRank.identity(dim).layer(np.zeros(dim), "float32")
        else:
            layer = vf.bijections.Freeze(vf.bijections.TriangularAffine(dim))
        step, trainable = step_of(precondition(flow, layer), target, 128)
        rows.append((dim, *measure(step, jax.random.key(1), trainable)))
    return rows


def by_particles():
    flow = default_flow(jax.random.key(0), 10)
    target = vf.Target(lambda x: -0.5 * jnp.sum(x**2), dim=10)
    rows = []
    for n in PARTICLES:
        step, trainable = step_of(flow, target, n)
        rows.append((n, *measure(step, jax.random.key(1), trainable)))
    return rows


def regression(x, y, batch):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y), subsample_size=batch) as i:
        numpyro.sample("y", dist.Normal(x[i] @ slope, scale), obs=y[i])


def groups(y, batch):
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(y), subsample_size=batch) as i:
        own = numpyro.sample("own", dist.Normal(mean, 1.5))
        numpyro.sample("y", dist.Normal(own, 1.0), obs=y[i])


def minibatch_step(program, num_samples):
    rows = Rows(program)
    n, own, shared = rows.size, rows.num_locals, rows.num_globals
    eye = np.broadcast_to(np.eye(own), (n, own, own))
    start = Start(
        np.zeros(shared),
        np.eye(shared),
        np.zeros((n, own)),
        np.zeros((n, own, shared)),
        eye,
        np.zeros(n),
        np.zeros((n, shared)),
    )
    layout = Layout(None, rows.whole, num_samples)
    flow = vf.flows.gaussian(jax.random.key(0), shared)
    if own:
        local = Locals(jax.random.key(1), start)
        flow = LocalFlow(flow, local, rows.global_index, rows.local_index)
    trainable, static = partition(flow)
    bound = minibatch_bound(rows, num_samples, vf.objectives.elbo(), "path")

    def step(key, trainable, inputs):
        return value_and_grad(lambda key, t: bound(key, combine(t, static), inputs))(key, trainable)

    return step, trainable, row_inputs(rows, layout, start, "float32")


def by_rows():
    rng, rows = np.random.default_rng(0), []
    for n in ROWS:
        x = rng.standard_normal((n, 5)).astype(np.float32)
        y = x.sum(axis=1) + rng.standard_normal(n).astype(np.float32)
        step, *arguments = minibatch_step(vf.from_numpyro(regression, x, y, 100), 32)
        rows.append((n, *measure(step, jax.random.key(1), *arguments)))
    return rows


def by_locals():
    rng, rows = np.random.default_rng(0), []
    for n in LOCALS:
        y = rng.standard_normal(n).astype(np.float32)
        step, *arguments = minibatch_step(vf.from_numpyro(groups, y, 50), 32)
        rows.append((n, *measure(step, jax.random.key(1), *arguments)))
    return rows


def logistic(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


def on_devices():
    """Loss, time and memory of one step on 1 to 8 devices, along either axis of the mesh."""
    jax.config.update("jax_num_cpu_devices", 8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 8)).astype(np.float32)
    y = (x[:, 0] + rng.standard_normal(4096) > 0).astype(np.float32)
    target = vf.target(vf.from_numpyro(logistic, x, y))
    flow = vf.flows.gaussian(jax.random.key(0), 8)
    first = None
    for axis in ("particle", "data"):
        for count in DEVICES:
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), (axis,))
            layout = Layout(mesh, target, 64)
            step, trainable = step_of(flow, target, 64, layout)
            arguments = (jax.random.key(1), layout.everywhere(trainable), *layout.inputs("float32"))
            compiled = jax.jit(step).lower(*arguments).compile()
            plan = compiled.memory_analysis()
            loss = float(compiled(*arguments)[0])
            first = loss if first is None else first
            held = plan.temp_size_in_bytes / 2**20, plan.argument_size_in_bytes / 2**10
            print(axis, count, *(f"{v:.2f}" for v in held), f"{abs(loss / first - 1):.1e}")


def by_devices():
    done = subprocess.run(
        [sys.executable, __file__, "--on-devices"], capture_output=True, text=True, check=True
    )
    return [line.split() for line in done.stdout.splitlines()]


def picture(tables, path):
    """Milliseconds and megabytes against size, both axes logarithmic, a line for each case."""
    width, height, left, gap = 330, 230, 46, 60
    colours = {"dim": "#1b6ca8", "rows": "#c0392b", "particles": "#2e8b57", "locals": "#8e44ad"}
    names = {
        "dim": "dimensions",
        "rows": "rows",
        "particles": "particles",
        "locals": "rows with locals",
    }
    parts = []
    for panel, (column, title) in enumerate(((1, "ms a step"), (2, "MiB of temporaries"))):
        points = {k: [(r[0], max(r[column], 1e-3)) for r in rows] for k, rows in tables.items()}
        flat = np.log10(np.array([p for rows in points.values() for p in rows]))
        low, high = np.floor(flat.min(axis=0)), np.ceil(flat.max(axis=0))
        x0, y0 = left + panel * (width + gap), 26

        def place(p, low=low, high=high, x0=x0, y0=y0):
            u = (np.log10(p) - low) / (high - low)
            return x0 + width * u[0], y0 + height * (1 - u[1])

        parts.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" class="f"/>')
        parts.append(f'<text x="{x0}" y="{y0 - 8}">{title}</text>')
        for e in range(int(low[0]), int(high[0]) + 1):
            x, _ = place((10.0**e, 10.0 ** low[1]))
            parts.append(f'<text x="{x:.0f}" y="{y0 + height + 16}" class="m">1e{e}</text>')
        for e in range(int(low[1]), int(high[1]) + 1):
            _, y = place((10.0 ** low[0], 10.0**e))
            parts.append(f'<text x="{x0 - 4}" y="{y + 4:.0f}" class="e">1e{e}</text>')
        for i, (name, rows) in enumerate(points.items()):
            line = " ".join("{:.1f},{:.1f}".format(*place(p)) for p in rows)
            parts.append(f'<polyline points="{line}" stroke="{colours[name]}" class="l"/>')
            y = y0 + 16 + 15 * i
            parts.append(f'<text x="{x0 + 8}" y="{y}" fill="{colours[name]}">{names[name]}</text>')
    style = (
        "text{font:11px sans-serif}.m{text-anchor:middle}.e{text-anchor:end}"
        ".f{fill:none;stroke:#999}.l{fill:none;stroke-width:2}"
    )
    size = f'viewBox="0 0 {left + 2 * width + gap + 20} {height + 56}"'
    body = "\n".join(parts)
    with open(path, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{body}\n</svg>\n'
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--picture", help="where to write the picture of the measured cases")
    parser.add_argument("--on-devices", action="store_true", help="set by the script itself")
    args = parser.parse_args()
    if args.on_devices:
        on_devices()
        return
    print(machine(), flush=True)
    cases = {"dim": by_dim, "rows": by_rows, "particles": by_particles, "locals": by_locals}
    measured = {}
    for case in args.cases:
        if case == "devices":
            header = ("axis", "devices", "MiB of temporaries", "KiB of arguments", "loss off by")
            print(table(header, by_devices()), flush=True)
            continue
        measured[case] = cases[case]()
        rows = [(n, f"{ms:.2f}", f"{mib:.2f}") for n, ms, mib in measured[case]]
        print(f"\n{table((case, 'ms a step', 'MiB of temporaries'), rows)}", flush=True)
    if args.picture:
        picture(measured, args.picture)


if __name__ == "__main__":
    main()
