"""Does the verdict catch fits that are wrong, and leave alone those that are right?

Forty targets of two, five and ten coordinates, each a known map of a known base, so that draws of the
truth and its evidence (zero) are exact: correlated Gaussians, skewed and heavy marginals, bananas,
funnels, two bumps, and all of it together. A coupling flow is fitted to each; flows whose truth is
off by the rule below are left out of the right ones, and told. Each flow is then judged with five fresh
keys, and spoilt in five ways, each judged once:

- family: instead of the flow a mean-field Gaussian, by the ELBO, in coordinates in which neighbours have
  correlation 0.9;
- mode: the target gets a second bump, of a quarter to a half of its mass, beside what the flow has;
- training: ended after a few of the steps, from a start as wide as the scale is usually off;
- scale: draws shrunk or stretched about their mean by a factor of 1.4 to 2.5;
- tails: the base is a Student-t (df 1.5 to 2.5), or its tails are cut as a sinh-arcsinh law cuts them.

Nothing but the verdict is run again: weights of 16384 draws, and the Gaussians and the mixture that
`vf.fit` finds from several starts. A posterior counts as wrong if a mean is off by more than 0.19 sd or an
sd by more than a quarter (1.6 times 0.12 and 0.15; quantiles where the sd is dominated by the tail);
what is spoilt too little for that is told apart.

    python tests/benchmarks/false_assurance.py [--flows 40] [--json PATH]
"""

import argparse
import json
import math
import time
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vflow as vf
from vflow._core import combine, partition
from vflow.fit import _precondition
from vflow.fit._recipe import default_flow
from vflow.fit._verdict import judge

NUM_DRAWS = 16384
NUM_STEPS, NUM_SAMPLES, FEW_STEPS = 2000, 64, 30
TIGHT = 5e-4  # nats
MAX_MEAN, MAX_LOG_SD = 0.19, 0.24
KINDS = ("correlated", "skewed", "heavy", "banana", "funnel", "bumps", "independent", "all")
WAYS = ("family", "mode", "training", "scale", "tails")
BY_WEIGHTS = ("family", "training", "scale", "tails")  # what weights can detect


class Theta(NamedTuple):
    """A target: base -> bumps, skew and tails by coordinate -> banana, funnel -> affine map."""

    gap: Any  # half the distance of the two bumps of the first coordinate, in its sd
    skew: Any  # (d,)
    tail: Any  # (d,), 1 is light
    bend: Any
    funnel: Any
    tril: Any  # (d, d)
    loc: Any  # (d,)
    other: Any  # log odds of a second copy of everything, -inf for none
    shift: Any  # (d,), where that copy lies


def theta_of(kind: str, dim: int, rng: np.random.Generator) -> Theta:
    """A random target of a kind."""
    has = lambda *kinds: kind in kinds or kind == "all"
    tril = np.diag(np.exp(rng.normal(0.0, 1.0, dim)))
    if has("correlated", "banana", "funnel", "heavy"):
        lower = np.tril(rng.normal(0.0, 0.7, (dim, dim)), -1) + np.eye(dim)
        tril = tril @ (lower / np.linalg.norm(lower, axis=1, keepdims=True))
    return Theta(
        gap=np.float64(rng.uniform(1.0, 1.5) if has("bumps") else 0.0),
        skew=rng.uniform(-0.2, 0.2, dim) if has("skewed") else np.zeros(dim),
        tail=rng.uniform(1.02, 1.08, dim) if has("heavy") else np.ones(dim),
        bend=np.float64(rng.uniform(0.3, 0.6) if has("banana") else 0.0),
        funnel=np.float64(rng.uniform(0.4, 0.8) if has("funnel") else 0.0),
        tril=tril,
        loc=rng.normal(0.0, 2.0, dim),
        other=np.float64(-np.inf),
        shift=np.zeros(dim),
    )


def with_second_bump(theta: Theta, rng: np.random.Generator) -> Theta:
    """The target and, six to nine sd away, a copy of it with a quarter to a half of the mass."""
    way = rng.normal(size=len(theta.loc))
    shift = theta.tril @ (way / np.linalg.norm(way)) * rng.uniform(6.0, 9.0)
    share = rng.uniform(0.25, 0.5)
    return theta._replace(other=np.float64(math.log(share / (1 - share))), shift=shift)


def truth(theta: Theta, rng: np.random.Generator, n: int) -> np.ndarray:
    """Exact draws (n, d)."""
    x = rng.standard_normal((n, len(theta.loc)))
    x[:, 0] += theta.gap * rng.choice([-1.0, 1.0], n)
    x = np.sinh(theta.tail * (np.arcsinh(x) + theta.skew))
    x[:, 1] += theta.bend * (x[:, 0] ** 2 - 1.0)
    x[:, 2:] *= np.exp(theta.funnel * x[:, :1])
    x = x @ theta.tril.T + theta.loc
    second = rng.random(n) < 1 / (1 + math.exp(-theta.other))
    return np.where(second[:, None], x + theta.shift, x)


def log_prob(theta: Theta, x):
    """The normalised log density."""

    def one(x):
        y = jax.scipy.linalg.solve_triangular(theta.tril, x - theta.loc, lower=True)
        log_det = jnp.sum(jnp.log(jnp.diagonal(theta.tril)))
        log_det += (len(x) - 2) * theta.funnel * y[0]
        y = y.at[2:].mul(jnp.exp(-theta.funnel * y[0]))
        y = y.at[1].add(-theta.bend * (y[0] ** 2 - 1.0))
        u = jnp.arcsinh(y) / theta.tail - theta.skew
        z = jnp.sinh(u)
        log_det += jnp.sum(0.5 * jnp.log1p(y**2) + jnp.log(theta.tail) - 0.5 * jnp.log1p(z**2))
        first = jnp.logaddexp(-0.5 * (z[0] - theta.gap) ** 2, -0.5 * (z[0] + theta.gap) ** 2)
        base = first - math.log(2.0) - 0.5 * jnp.sum(z[1:] ** 2)
        return base - 0.5 * len(x) * math.log(2 * math.pi) - log_det

    here, there = -jax.nn.softplus(theta.other), -jax.nn.softplus(-theta.other)
    return jnp.logaddexp(here + one(x), there + one(x - theta.shift))


class Density:
    """`log_prob` of one target as a function that knows its numbers."""

    def __init__(self, theta: Theta):
        self.theta = theta

    def __call__(self, x):
        return log_prob(jax.tree.map(lambda a: jnp.asarray(a, x.dtype), self.theta), x)


class SharedDensity(_precondition._Density):
    """That of the preconditioner, compiled once for all targets of as many coordinates."""

    def __init__(self, target: vf.Target):
        super().__init__(target)
        theta = jax.tree.map(jnp.asarray, target.space.log_density.theta)
        self._one, self._many = partial(_one, theta), partial(_many, theta)


_value_and_grad = jax.value_and_grad(log_prob, argnums=1)
_one = jax.jit(_value_and_grad)


@jax.jit
def _many(theta, points, count):
    def body(i, out):
        value, grad = jax.vmap(partial(_value_and_grad, theta))(points[i])
        return out[0].at[i].set(value), out[1].at[i].set(grad)

    return jax.lax.fori_loop(
        0, count, body, (jnp.zeros_like(points[..., 0]), jnp.zeros_like(points))
    )


class Witnesses(NamedTuple):
    """What the preconditioner hands to the verdict."""

    cover: vf.Estimate | None
    modes: Any


def witnesses(theta: Theta, seed: int) -> Witnesses:
    """Those of `vf.fit`: the Gaussians and the mixture found from several starts."""
    target = vf.Target(Density(theta), len(theta.loc))
    gaussian = _precondition.fit_gaussian(target, jax.random.key(seed))
    seen = gaussian.witness()
    return Witnesses(None if seen is None else vf.Estimate(*seen), getattr(gaussian, "modes", ()))


def trainer(template, num_steps: int, rate: float):
    """`(steps, leaves, theta, loc, tril, key) -> leaves`, over many fits at once.

    The learning rate decays over `num_steps`, whatever number of them is carried out. A fit whose bound
    is tight stays as it is, as in `vf.fit`.
    """
    _, static = partition(template)
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    )

    def train(steps, trainable, theta, loc, tril, key):
        def bound(flow):
            z, log_q = flow.simulate()
            return log_prob(theta, loc + tril @ z) - log_q

        estimate = vf.expect(bound, NUM_SAMPLES, gradient="path")

        def step(i, carry):
            params, state, mean, var = carry
            value, grad = vf.value_and_grad(lambda k, t: estimate(k, combine(t, static)))(
                jax.random.fold_in(key, i), params
            )
            updates, new = optimizer.update(jax.tree.map(jnp.negative, grad), state, params)
            fine = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grad)]))
            tight = (i > 300) & (0.5 * NUM_SAMPLES * var < TIGHT)
            mean = jnp.where(i == 0, value, mean)
            moved = 0.99 * mean + 0.01 * value
            spread = 0.99 * var + 0.01 * (value - mean) * (value - moved)
            fresh = (optax.apply_updates(params, updates), new, moved, spread)
            return jax.tree.map(lambda a, b: jnp.where(fine & ~tight, a, b), fresh, carry)

        start = (trainable, optimizer.init(trainable), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.fori_loop(0, steps, step, start)[0]

    return jax.jit(jax.vmap(train, in_axes=(None, *[0] * 5)))


class Spoil(NamedTuple):
    """How draws of a flow are changed, densities along with them; the identity by default."""

    df: Any = np.inf  # of the base
    tail: Any = 1.0  # exponent of a sinh-arcsinh map of the base
    scale: Any = 1.0
    mean: Any = 0.0  # about which it scales, in whitened coordinates


def drawer(template):
    """`(leaves, theta, loc, tril, spoil, key) -> (x, log weights)`, over many flows in turn."""
    _, static = partition(template)

    def draw(trainable, theta, loc, tril, spoil, key):
        flow = combine(trainable, static)

        def one(key):
            key_normal, key_gamma = jax.random.split(key)
            df = jnp.where(jnp.isinf(spoil.df), 5.0, spoil.df)
            z = jax.random.normal(key_normal, loc.shape)
            heavy = z / jnp.sqrt(2 * jax.random.gamma(key_gamma, df / 2, loc.shape) / df)
            light = jnp.isinf(spoil.df)
            z = jnp.where(light, z, heavy)
            normal = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
            log_t = jax.scipy.stats.t.logpdf(z, df)
            log_q = jnp.sum(jnp.where(light, normal, log_t))
            u = jnp.arcsinh(z) * spoil.tail
            bent = jnp.sinh(u)
            log_q -= jnp.sum(jnp.log(spoil.tail) + 0.5 * jnp.log1p(bent**2) - 0.5 * jnp.log1p(z**2))
            y, log_det = flow.bijection.forward_and_log_det(bent)
            y = spoil.mean + spoil.scale * (y - spoil.mean)
            log_q -= log_det + len(loc) * jnp.log(spoil.scale)
            log_q -= jnp.sum(jnp.log(jnp.diagonal(tril)))
            x = loc + tril @ y
            return x, log_prob(theta, x) - log_q

        return jax.vmap(one)(jax.random.split(key, NUM_DRAWS))

    return jax.jit(lambda *batch: jax.lax.map(lambda args: draw(*args), batch))


def off(x: np.ndarray, reference: np.ndarray) -> bool:
    """Whether draws are off by the rule; quantiles where the sd is dominated by the tail."""
    for mine, truth in zip(x.T, reference.T, strict=True):
        low, lower, median, upper = np.quantile(truth, (0.1, 0.25, 0.5, 0.75))
        spread, sd = (upper - lower) / 1.349, truth.std()
        if sd > 1.5 * spread:
            found = np.quantile(mine, (0.1, 0.5, 0.75))
            error, log_sd = np.abs(found - (low, median, upper)).max() / spread, 0.0
        else:
            error, log_sd = abs(mine.mean() - truth.mean()) / sd, abs(np.log(mine.std() / sd))
        if not (error < MAX_MEAN and log_sd < MAX_LOG_SD):
            return True
    return False


class Site(NamedTuple):
    """One coordinate, as the verdict wants it."""

    name: str
    start: int
    stop: int


def status_of(x: np.ndarray, log_w: np.ndarray, seen: Witnesses) -> tuple[str, tuple[str, ...]]:
    """The verdict."""
    sites = [Site(f"x[{i}]", i, i + 1) for i in range(x.shape[1])]
    verdict = judge(log_w, seen.cover, draws=x, modes=seen.modes, sites=sites)
    return verdict.status, verdict.reasons


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x, float) for x in leaves]), *trees)


def study(dim: int, kinds: list[str], seed: int) -> list[dict[str, Any]]:
    """One record a verdict, for flows of one dimension."""
    rng = np.random.default_rng(seed)
    n = len(kinds)
    thetas = [theta_of(kind, dim, rng) for kind in kinds]
    exact = [truth(theta, rng, 100_000) for theta in thetas]
    locs = [x.mean(axis=0) for x in exact]
    trils = [np.linalg.cholesky(np.atleast_2d(np.cov(x.T))) for x in exact]
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    template = default_flow(next(keys), dim)
    start = stacked([partition(template)[0]] * n)
    batch = (stacked(thetas), jnp.stack(jnp.asarray(locs)), jnp.stack(jnp.asarray(trils)))
    train = trainer(template, NUM_STEPS, 3e-3)
    fitted = train(NUM_STEPS, start, *batch, jax.random.split(next(keys), n))
    off_by = [np.exp(rng.choice([-1.0, 1.0]) * rng.uniform(0.7, 1.5)) for _ in kinds]
    rough = (
        jnp.asarray([m + t @ rng.normal(0.0, 0.5, dim) for m, t in zip(locs, trils, strict=True)]),
        jnp.asarray([np.diag(np.diag(t)) * s for t, s in zip(trils, off_by, strict=True)]),
    )
    short = train(FEW_STEPS, start, batch[0], *rough, jax.random.split(next(keys), n))
    plain = vf.flows.gaussian(jax.random.key(0), dim)
    ar = 0.9 ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    unsheared = np.linalg.inv(np.linalg.cholesky(ar))
    own = (batch[0], batch[1], jnp.asarray([t @ unsheared for t in trils]))
    gaussians = trainer(plain, 500, 2e-2)(
        500, stacked([partition(plain)[0]] * n), *own, jax.random.split(next(keys), n)
    )
    draw, draw_plain = drawer(template), drawer(plain)
    whole = Spoil(*(jnp.full(n, v) for v in (np.inf, 1.0, 1.0)), jnp.zeros((n, dim)))

    def drawn(which, leaves, theta, loc, tril, spoil):
        x, log_w = which(leaves, theta, loc, tril, spoil, jax.random.split(next(keys), n))
        return np.asarray(x, np.float64), np.asarray(log_w, np.float64)

    seen = [witnesses(theta, seed + i) for i, theta in enumerate(thetas)]
    doubled = [with_second_bump(theta, rng) for theta in thetas]
    seen_doubled = [witnesses(theta, seed + i) for i, theta in enumerate(doubled)]
    records = []

    def record(way, x, log_w, seen, reference):
        for i, kind in enumerate(kinds):
            status, reasons = status_of(x[i], log_w[i], seen[i])
            records.append(
                {
                    "dim": dim, "kind": kind, "way": way, "status": status,
                    "off": off(x[i], reference[i]), "reasons": list(reasons),
                    "log_w_sd": float(np.std(log_w[i])),
                }
            )  # fmt: skip

    for _ in range(5):
        x, log_w = drawn(draw, fitted, *batch, whole)
        record("right", x, log_w, seen, exact)
    centre = jnp.asarray(
        [np.linalg.solve(t, (v - m).T).mean(axis=1) for v, m, t in zip(x, locs, trils, strict=True)]
    )
    record("family", *drawn(draw_plain, gaussians, *own, whole), seen, exact)
    other = [truth(theta, rng, 100_000) for theta in doubled]
    x, log_w = drawn(draw, fitted, stacked(doubled), *batch[1:], whole)
    record("mode", x, log_w, seen_doubled, other)
    record("training", *drawn(draw, short, batch[0], *rough, whole), seen, exact)
    scale = np.exp(rng.choice([-1.0, 1.0], n) * rng.uniform(math.log(1.4), math.log(2.5), n))
    spoilt = whole._replace(scale=jnp.asarray(scale), mean=centre)
    record("scale", *drawn(draw, fitted, *batch, spoilt), seen, exact)
    heavy = np.arange(n) % 2 == 0
    spoilt = whole._replace(
        df=jnp.asarray(np.where(heavy, rng.uniform(1.5, 2.5, n), np.inf)),
        tail=jnp.asarray(np.where(heavy, 1.0, rng.uniform(0.6, 0.75, n))),
    )
    record("tails", *drawn(draw, fitted, *batch, spoilt), seen, exact)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Recall by way, and precision."""
    lines = [f"{'posteriors':<34}{'number':>8}{'not ok':>8}{'share':>8}"]

    def line(name, chosen):
        caught = sum(r["status"] != "ok" for r in chosen)
        share = caught / len(chosen) if chosen else math.nan
        lines.append(f"{name:<34}{len(chosen):>8}{caught:>8}{share:>8.3f}")
        return caught

    right = [r for r in records if r["way"] == "right"]
    wrong = [r for r in records if r["way"] in WAYS]
    for way in WAYS:
        chosen = [r for r in wrong if r["way"] == way]
        line(f"wrong: {way}", chosen)
        line("  of these off by the rule", [r for r in chosen if r["off"]])
    caught = line("wrong, all", wrong)
    line("  in ways that weights can detect", [r for r in wrong if r["way"] in BY_WEIGHTS])
    alarms = line("right, all", right)
    line("  of these off by the rule", [r for r in right if r["off"]])
    falsely = sum(r["status"] != "ok" and not r["off"] for r in right)
    lines.append(f"precision of 'not ok' {caught / max(1, caught + falsely):.3f} ({alarms} alarms)")
    missed = Counter((r["way"], r["kind"]) for r in wrong if r["status"] == "ok")
    lines += [f"  called ok: {way}, {kind}: {k}" for (way, kind), k in sorted(missed.items())]
    return "\n".join(lines)


def run(num_flows: int) -> list[dict[str, Any]]:
    """All records; the kinds take turns, and so do the dimensions."""
    _precondition._Density = SharedDensity
    dims = {2: 0.4, 5: 0.3, 10: 0.3}
    records, done = [], 0
    for dim, share in dims.items():
        n = round(share * num_flows)
        records += study(dim, [KINDS[(done + i) % len(KINDS)] for i in range(n)], seed=dim)
        done += n
        print(f"{dim} coordinates: {n} flows", flush=True)
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--flows", type=int, default=40)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    began = time.process_time()
    found = run(arguments.flows)
    print(table(found))
    print(f"{time.process_time() - began:.0f} s of CPU")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(found, file)
