"""The cost of a path gradient beside a total one, family by family, and beside other ways to it.

    python tests/benchmarks/path_cost.py

CPU time (`time.process_time`) of compiled value-and-gradient steps of the ELBO, draws included, float32:
variants interleaved in one process, medians of many rounds. "Through the inverse" is the usual way to
a path gradient: log q of the draw by inverting the flow with its parameters stopped. Flops are XLA's
count with the layers written out (the body of a loop is counted once, whatever its length; sweeps of
autoregressive layers are such a loop).
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import vflow as vf
from tests.benchmarks._measure import machine, table
from tests.flows.registry import perturb
from vflow._core import combine, partition, stop_gradient
from vflow.programs._frame import GRADIENTS, mixing


def action(x):
    """Minus the action of phi^4 on a ring of the sites."""
    return -jnp.sum(x**2 - 0.5 * x * jnp.roll(x, 1) + 0.022 * x**4)


class Bisection(vf.bijections.AbstractTransformer):
    """TanhMixture with the inverse of other libraries: 40 bisections, and a Newton step to carry
    derivatives."""

    num_terms: int = eqx.field(static=True, default=4)

    @property
    def num_params(self):
        return 3 * self.num_terms + 2

    def forward(self, x, params):
        return vf.bijections.TanhMixture(self.num_terms).forward(x, params)

    def inverse(self, y, params):
        still, fixed = jax.lax.stop_gradient((y, params))

        def halve(_, ends):
            lower, upper = ends
            middle = 0.5 * (lower + upper)
            below = self.forward(middle, fixed)[0] < still
            return jnp.where(below, middle, lower), jnp.where(below, upper, middle)

        ends = jnp.full_like(y, -60.0), jnp.full_like(y, 60.0)
        x = jax.lax.stop_gradient(0.5 * sum(jax.lax.fori_loop(0, 40, halve, ends)))
        value, log_slope = self.forward(x, params)
        x = x - (value - y) * jnp.exp(-jax.lax.stop_gradient(log_slope))
        return x, -self.forward(x, params)[1]


class Case(NamedTuple):
    """A flow and a batch."""

    make: Callable[..., Any]
    dim: int
    batch: int
    num_layers: int
    arms: tuple[str, ...] = ("total", "path", "auto", "through the inverse")
    flowjax: dict[str, Any] | None = None


def coupling(dim, num_layers, **options):
    return lambda key: vf.flows.coupling(
        key, dim, num_layers=num_layers, hidden=(128, 128), activation="tanh", **options
    )


_spline = {"transformer": vf.bijections.Spline(num_bins=8)}
_iaf = {"num_layers": 4, "hidden": (128,), "activation": "tanh"}
CASES = {
    "B1 affine, d = 64": Case(coupling(64, 8), 64, 512, 8, flowjax={}),
    "B2 affine, d = 16": Case(coupling(16, 8), 16, 512, 8),
    "B2 affine, d = 256": Case(coupling(256, 8), 256, 512, 8),
    "B3 spline, d = 64": Case(coupling(64, 6, **_spline), 64, 256, 6, flowjax={"spline": True}),
    "B4 planar, d = 64": Case(
        lambda k: vf.flows.planar(k, 64, num_layers=16), 64, 512, 16, arms=("total", "path", "auto")
    ),
    "B5 implicit inverse, d = 64": Case(
        coupling(64, 6, transformer=vf.bijections.TanhMixture(4)),
        64,
        256,
        6,
        arms=("total", "path", "auto", "through the inverse", "through bisection"),
    ),
    "B6 inverse autoregressive, d = 16": Case(
        lambda k: vf.flows.inverse_autoregressive(k, 16, **_iaf), 16, 256, 4
    ),
}


def written_out(flow):
    """The same flow with its stack of layers as a chain."""

    def layers_of(part):
        if not isinstance(part, vf.bijections.Scan):
            return [part]
        arrays, static = eqx.partition(part.layers, eqx.is_array)
        take = lambda i: eqx.combine(jax.tree.map(lambda leaf: leaf[i], arrays), static)
        return [take(i) for i in range(len(jax.tree.leaves(arrays)[0]))]

    layers = [layer for part in flow.bijection.layers for layer in layers_of(part)]
    return vf.distributions.Flow(flow.base, vf.bijections.Chain(layers))


def bisecting(flow):
    """The same flow with `Bisection` for its transformer."""
    where = lambda f: f.bijection.layers[0].layers.layers[0].transformer
    return eqx.tree_at(where, flow, Bisection(where(flow).num_terms))


def step(arm, flow, batch):
    """`(trained, key) -> (value, gradient)` of the negative ELBO, and the trained leaves."""
    trained, static = partition(flow)

    def objective(flow):
        if arm in GRADIENTS:
            x, log_q = flow.simulate(gradient=arm)
        else:
            x, _ = flow.simulate()
            log_q = stop_gradient(flow).log_prob(x)
        return action(x) - log_q

    def loss(trained, key):
        with mixing(0.7):  # the coefficient of "auto", which a loop measures now and then
            return -vf.expect(objective, batch)(key, combine(trained, static))

    return jax.value_and_grad(loss), trained


def flowjax_step(case, *, stick_the_landing):
    """The same of flowjax's coupling flow, with networks of the same size."""
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow
    from flowjax.train.losses import ElboLoss

    flow = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(case.dim)),
        transformer=RationalQuadraticSpline(knots=8, interval=5) if case.flowjax else None,
        flow_layers=case.num_layers,
        nn_width=128,
        nn_depth=2,
        nn_activation=jnp.tanh,
        invert=False,
    )
    frozen = lambda leaf: isinstance(leaf, paramax.NonTrainable)
    trained, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=frozen)
    loss = ElboLoss(action, case.batch, stick_the_landing=stick_the_landing)
    return jax.value_and_grad(lambda trained, key: loss(trained, static, key)), trained


def arms_of(case, *, unrolled):
    """`name -> (compiled step, its parameters)`."""
    flow = perturb(case.make(jax.random.key(0)), jax.random.key(1), 0.02)
    arms = {}
    for name in case.arms:
        here = bisecting(flow) if name == "through bisection" else flow
        here = written_out(here) if unrolled else here
        arms[name] = step(name, here, case.batch)
    if case.flowjax is not None and not unrolled:
        for name, landing in (("flowjax, total", False), ("flowjax, stick-the-landing", True)):
            arms[name] = flowjax_step(case, stick_the_landing=landing)
    key = jax.random.key(0)
    return {
        name: (jax.jit(run).lower(params, key).compile(), params)
        for name, (run, params) in arms.items()
    }


def times(arms, rounds):
    """Seconds of CPU by arm and round; the order turns round from one round to the next."""
    spent = {name: [] for name in arms}
    for i in range(rounds + 1):
        names = list(arms) if i % 2 else list(arms)[::-1]
        for name in names:
            run, params = arms[name]
            began = time.process_time()
            jax.block_until_ready(run(params, jax.random.key(i)))
            spent[name].append(time.process_time() - began)
    return {name: np.array(values[1:]) for name, values in spent.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cases", nargs="*", default=["B1", "B2", "B3", "B4", "B5", "B6"])
    parser.add_argument("--no-flowjax", action="store_true", help="without the slow compilation")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    print(machine(), flush=True)
    print("\n" + table(("flow", "gradient", "CPU ms", "ratio to total", "flop ratio"), []))
    for name, case in CASES.items():
        if name[:2] not in options.cases:
            continue
        case = case._replace(flowjax=None) if options.no_flowjax else case
        spent = times(arms_of(case, unrolled=False), options.rounds)
        unrolled = arms_of(case._replace(arms=GRADIENTS), unrolled=True)
        flops = {arm: run.cost_analysis()["flops"] for arm, (run, _) in unrolled.items()}
        for arm, seconds in spent.items():
            of = "flowjax, total" if arm.startswith("flowjax") else "total"
            ratio = np.median(seconds / spent[of])
            more = f"{flops[arm] / flops['total']:.3f}" if arm in flops else ""
            row = (name, arm, f"{1e3 * np.median(seconds):.2f}", f"{ratio:.2f}", more)
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
