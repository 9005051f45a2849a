"""Default fits of real posteriors against NumPyro's guides and flowjax, judged alike.

    python tests/benchmarks/posteriors.py --seeds 3 --json results.json

Each run starts with empty caches, as in a fresh process; its seconds cover the fit and the 16384
weighted draws behind k-hat. Everyone is judged by importance-resampled draws (tests/data). Peers
get the unconstrained log density (so that none stumbles over a support), JAX's default float type,
and a second run in float64 where the first ends in NaN or an error. An existing JSON file is gone on with.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, SVI, Trace_ELBO, autoguide
from numpyro.infer import NUTS as NUTS_KERNEL

import vflow as vf
from tests.benchmarks._measure import Clock, machine, table
from tests.data.posteriors import POSTERIORS, acceptable, errors
from vflow.fit import _precondition
from vflow.fit._budget import budget_of
from vflow.fit._resample import resample

FIVE = (
    "eight_schools_centered",
    "eight_schools_noncentered",
    "kidscore_interaction",
    "garch11",
    "gp_pois_regr",
)
NUM_JUDGED, NUM_WEIGHTED, BATCH = 20_000, 16_384, 4096
PARTICLES = 16


def schedule(options):
    return optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))


def numpyro_guide(make_guide):
    """A method: NumPyro SVI with a guide; returns draw(key) -> (x, log q)."""

    def fit(key, target, options):
        def model():
            flat = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))
            x = numpyro.sample("x", flat)
            with handlers.block():  # the sites of the posterior's own model are none of this one
                log_density = target.log_prob(x)
            numpyro.factor("log_density", log_density)

        guide = make_guide(model)
        svi = SVI(model, guide, schedule(options), Trace_ELBO(num_particles=PARTICLES))
        params = svi.run(key, options.steps, progress_bar=False).params

        def draw(key):
            seeded = handlers.seed(handlers.substitute(guide, params), key)
            sites = handlers.trace(seeded).get_trace().values()
            sites = {site["name"]: site for site in sites if site["type"] == "sample"}
            log_q = sum(site["fn"].log_prob(site["value"]).sum() for site in sites.values())
            return sites["x"]["value"], log_q

        return draw

    return fit


def flowjax_coupling(stick_the_landing):
    """A method: flowjax's coupling flow and ELBO."""

    def fit(key, target, options):
        from flowjax.distributions import Normal
        from flowjax.flows import coupling_flow
        from flowjax.train import fit_to_key_based_loss
        from flowjax.train.losses import ElboLoss

        flow_key, key = jax.random.split(key)
        base = Normal(jnp.zeros(target.dim))
        loss = ElboLoss(target.log_prob, PARTICLES, stick_the_landing=stick_the_landing)
        flow, _ = fit_to_key_based_loss(
            key,
            coupling_flow(flow_key, base_dist=base, invert=False),
            loss_fn=loss,
            steps=options.steps,
            optimizer=schedule(options),
            show_progress=False,
        )
        return flow.sample_and_log_prob

    return fit


PEERS = {
    "numpyro AutoNormal": numpyro_guide(autoguide.AutoNormal),
    "numpyro AutoMultivariateNormal": numpyro_guide(autoguide.AutoMultivariateNormal),
    "numpyro AutoIAFNormal": numpyro_guide(autoguide.AutoIAFNormal),
    "flowjax coupling": flowjax_coupling(False),
    "flowjax coupling, stick-the-landing": flowjax_coupling(True),
}
NUTS = "numpyro NUTS, 1000 + 1000"
# What a default fit is without one of its ingredients: arguments of `vf.fit`, by what is left out.
ABLATIONS = {
    "vflow, one start": "start",
    "vflow, no preconditioner": "preconditioner",
    "vflow, Gaussian only": "flow",
    "vflow, total gradient": "path gradient",
    "vflow, one round": "escalation",
}
METHODS = ("vflow", NUTS, *PEERS)


@contextlib.contextmanager
def without(ingredient, target_dim):
    """Arguments of `vf.fit` that leave an ingredient out; two are settings inside."""
    arguments = {}
    if ingredient == "preconditioner":
        arguments = {"precondition": None}
    elif ingredient == "flow":
        arguments = {"flow": vf.flows.gaussian(jax.random.key(0), target_dim)}
    elif ingredient == "path gradient":
        arguments = {"gradient": "total"}
    with contextlib.ExitStack() as stack:
        if ingredient == "start":
            nothing = lambda *_: None
            one = mock.patch.multiple(_precondition, _NUM_STARTS=1, find_cover=nothing)
            stack.enter_context(one)
        if ingredient == "escalation":
            plan = budget_of("default")._replace(rounds=1)
            module = sys.modules["vflow.fit._fit"]
            stack.enter_context(mock.patch.object(module, "budget_of", return_value=plan))
        yield arguments


def run_vflow(posterior, seed, clock, ingredient=None):
    program = vf.from_numpyro(posterior.model, **posterior.data)
    key, draw_key = jax.random.split(jax.random.key(seed))
    with without(ingredient, posterior.dim) as arguments, clock.measure():
        fitted = vf.fit(key, program, progress=False, **arguments)
    draws = fitted.resample(draw_key, NUM_JUDGED)
    return {
        "status": fitted.status,
        "dtype": fitted.settings["dtype"],
        "khat": fitted.khat,
        "ess_fraction": float(fitted.ess_fraction),
        "elbo": float(fitted.elbo),
        "errors": errors(posterior.reference, draws),
        "settings": {
            k: fitted.settings[k] for k in ("gradient", "num_steps", "rounds", "tried", "seconds")
        },
        "reasons": list(fitted.reasons),
        "notes": fitted.settings["notes"],
    }


def run_nuts(posterior, seed, clock):
    """NumPyro's own recommendation for such models; judged by its draws as they are."""
    kernel = NUTS_KERNEL(posterior.model)
    with clock.measure():
        chain = MCMC(kernel, num_warmup=1000, num_samples=1000, progress_bar=False)
        chain.run(jax.random.key(seed), **posterior.data)
        draws = {name: np.asarray(x) for name, x in chain.get_samples().items()}
    latent = [x.reshape(1, len(x), -1) for x in draws.values() if np.ptp(x) > 0]
    sizes = [effective_sample_size(x[..., i]) for x in latent for i in range(x.shape[-1])]
    return {
        "status": "",
        "dtype": str(jnp.zeros(0).dtype),
        "khat": math.nan,
        "ess_fraction": float(np.nanmin(sizes)) / 1000,
        "elbo": math.nan,
        "errors": errors(posterior.reference, draws),
    }


def run_peer(method, posterior, seed, clock, options):
    target = vf.target(vf.from_numpyro(posterior.model, **posterior.data))
    key, draw_key, judge_key = jax.random.split(jax.random.key(seed), 3)
    with clock.measure():
        draw = PEERS[method](key, target, options)

        @jax.jit
        def weighted(key):
            x, log_q = jax.vmap(draw)(jax.random.split(key, BATCH))
            return x, jax.vmap(target.log_prob)(x) - log_q

        def propose(key, n):
            parts = [weighted(k) for k in jax.random.split(key, -(-n // BATCH))]
            return tuple(np.concatenate([np.asarray(p[i]) for p in parts])[:n] for i in (0, 1))

        _, log_w = propose(draw_key, NUM_WEIGHTED)
        smoothed = vf.diagnostics.psis(log_w)
    result = {
        "status": "NaN" if np.isnan(log_w).all() else "",
        "dtype": str(log_w.dtype),
        "khat": smoothed.khat,
        "ess_fraction": float(vf.diagnostics.ess_fraction(log_w)),
        "elbo": float(np.mean(log_w)),
        "errors": (math.nan, math.nan),
    }
    if result["status"]:
        return result
    keys = iter(jax.random.split(judge_key, 64))
    try:
        x = resample(
            lambda n: propose(next(keys), n), NUM_JUDGED, result["ess_fraction"] or 1e-3, 0.5
        )
    except vf.FitError as error:
        return result | {"reason": str(error)}
    constrain = eqx.filter_jit(jax.vmap(target.constrain))
    return result | {"errors": errors(posterior.reference, constrain(x))}


def run(method, name, seed, clock, options):
    """The rows of one method on one posterior: two where a peer needed float64."""
    rows = []
    for dtype in ("float32", "float64"):
        jax.clear_caches()
        load = os.getloadavg()[0]
        with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if method.startswith("vflow"):
                    result = run_vflow(POSTERIORS[name], seed, clock, ABLATIONS.get(method))
                elif method == NUTS:
                    result = run_nuts(POSTERIORS[name], seed, clock)
                else:
                    result = run_peer(method, POSTERIORS[name], seed, clock, options)
            except Exception as error:
                result = {"status": f"{type(error).__name__}", "reason": str(error)[:500]}
        rows.append(
            {"method": method, "posterior": name, "seed": seed, "float": dtype, "load": load}
            | {"wall": clock.wall, "compile": clock.compile, "cpu": clock.cpu}
            | result
        )
        if method.startswith("vflow") or not result["status"]:
            break
    return rows


def _passes(method, numbers):
    if method == NUTS:  # its draws are taken as they are
        return "yes" if acceptable(0.0, 1.0, *numbers[2:]) else "no"
    return "yes" if acceptable(*numbers) else "no"


def report(rows):
    """One line a posterior and method, the medians over seeds."""
    lines = []
    groups = {}
    for row in rows:
        groups.setdefault((row["posterior"], row["method"], row["float"]), []).append(row)
    order = {name: i for i, name in enumerate((*POSTERIORS, *METHODS, *ABLATIONS))}
    for (name, method, _), group in sorted(
        groups.items(), key=lambda g: [order[x] for x in g[0][:2]]
    ):
        found = [row for row in group if "khat" in row]
        numbers = [math.nan] * 4
        if found:
            columns = [(r["khat"], r["ess_fraction"], *r["errors"]) for r in found]
            columns += [(math.inf, 0.0, math.nan, math.nan)] * (len(group) - len(found))
            numbers = np.median(columns, axis=0)
        seconds = np.median(
            [(r["wall"], r["wall"] - r["compile"], r["cpu"]) for r in group], axis=0
        )
        words = sorted({row["status"] for row in group} - {""})
        counts = [
            f"{sum(r['status'] == word for r in group)}/{len(group)} {word}" for word in words
        ]
        lines.append(
            (
                name,
                method + (" (float64)" if group[0].get("dtype") == "float64" else ""),
                ", ".join(counts),
                _passes(method, numbers),
                f"{numbers[0]:.2f}",
                *(f"{x:.3f}" for x in numbers[1:]),
                *(f"{x:.1f}" for x in seconds),
            )
        )
    header = ("posterior", "method", "status", "passes", "k-hat", "ESS fraction", "mean error")
    header += ("log sd error", "s", "s without compilation", "CPU s")
    return table(header, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", default=",".join(FIVE), help="names, comma-separated")
    parser.add_argument("--all", action="store_true", help="all thirteen posteriors")
    parser.add_argument(
        "--methods", help="separated by semicolons; " + "; ".join((*METHODS, *ABLATIONS))
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10_000, help="of the peers")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of the peers")
    parser.add_argument("--json", type=Path, help="results, written after each run")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    print(machine(), flush=True)
    clock = Clock()
    names = POSTERIORS if options.all else options.posteriors.split(",")
    methods = options.methods.split(";") if options.methods else METHODS
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    done = {(row["method"], row["posterior"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for name in names:
            for method in methods:
                if (method, name, seed) in done:
                    continue
                rows += run(method, name, seed, clock, options)
                hidden = ("settings", "reason", "notes")
                last = {k: v for k, v in rows[-1].items() if k not in hidden}
                print(json.dumps(last), file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    print(report(rows))


if __name__ == "__main__":
    main()
