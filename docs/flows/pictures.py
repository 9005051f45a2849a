"""The pictures of the pages on flow families: `python docs/flows/pictures.py [name ...]`.

One function per picture, named after its file. Without arguments all are drawn again.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import vflow as vf

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent


def axes(count: int, titles: tuple[str, ...]) -> Any:
    """A row of square axes with titles."""
    _, row = plt.subplots(1, count, figsize=(2.6 * count, 2.8), layout="constrained")
    for ax, title in zip(np.atleast_1d(row), titles, strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_aspect("equal")
    return np.atleast_1d(row)


def density(ax: Any, log_prob: Callable, reach: float = 4.0) -> None:
    """A density on the plane as an image."""
    u = np.linspace(-reach, reach, 70)
    points = jnp.asarray(np.stack(np.meshgrid(u, u), -1).reshape(-1, 2))
    values = np.exp(np.asarray(jax.jit(jax.vmap(log_prob))(points))).reshape(70, 70)
    box = (-reach, reach, -reach, reach)
    ax.imshow(values / values.max(), extent=box, origin="lower", cmap="viridis")


def fit(flow: Any, log_density: Callable, num_steps: int = 1500, num_samples: int = 128) -> Any:
    """The flow trained on a log density by the ELBO."""

    def objective(q: Any) -> Any:
        x, log_q = q.simulate()
        return log_density(x) - log_q

    estimate = vf.expect(objective, num_samples=num_samples)
    return vf.maximize(jax.random.key(1), estimate, flow, num_steps=num_steps).params


def four_modes(x: Any) -> Any:
    """Four normals of unequal weight."""
    corners = 1.8 * jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    weights = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    return jax.nn.logsumexp(weights - 4 * jnp.sum((x - corners) ** 2, axis=1))


def banana(x: Any) -> Any:
    """A bent normal."""
    return -0.5 * (x[0] ** 2 / 2 + (x[1] - 0.7 * x[0] ** 2 + 1.5) ** 2 / 0.3)


def mixture() -> None:
    """Separated modes: one coupling flow bridges them, a mixture does not."""
    row = axes(3, ("target", "one coupling flow", "mixture of four"))
    make = lambda key: vf.flows.coupling(key, 2, num_layers=4, hidden=(16,))
    density(row[0], four_modes, 3)
    density(row[1], fit(make(jax.random.key(0)), four_modes).log_prob, 3)
    mixed = vf.flows.mixture(jax.random.key(0), make, 4, spread=1.5)
    density(row[2], fit(mixed, four_modes).log_prob, 3)


def continuous() -> None:
    """Particles on their way from the base to the target."""
    row = axes(3, ("target", "continuous flow", "paths of draws"))
    start = vf.flows.continuous(jax.random.key(0), 2, hidden=(32,), tolerance=1e-3)
    flow = fit(start, banana, 600, 64)
    density(row[0], banana)
    density(row[1], flow.log_prob)
    layer = flow.bijection.layers[0]
    z = jax.random.normal(jax.random.key(2), (60, 2))
    steps = [z]
    for t in np.linspace(0, 0.95, 20):
        velocity = lambda x, t=t: layer.velocity(jnp.concatenate([x, jnp.array([t])]))
        steps.append(steps[-1] + 0.05 * jax.vmap(velocity)(steps[-1]))
    row[2].plot(*np.stack(steps).transpose(2, 0, 1), color="tab:blue", lw=0.5)
    row[2].plot(*np.asarray(steps[-1]).T, ".", color="tab:orange", ms=3)
    row[2].set(xlim=(-4, 4), ylim=(-4, 4))


def injective() -> None:
    """A curve in the plane learned from noisy points."""
    row = axes(2, ("data", "injective flow, one latent dimension"))
    rng = np.random.default_rng(0)
    t = rng.normal(size=500)
    data = np.stack([1.5 * t, np.sin(2 * t)], 1) + 0.05 * rng.normal(size=(500, 2))
    flow = vf.flows.injective(jax.random.key(0), 2, 1, hidden=(32, 32))
    estimate = vf.objectives.free_form(jnp.asarray(data, jnp.float32), 128, beta=30.0, noise=0.05)
    flow = vf.maximize(jax.random.key(1), estimate, flow, num_steps=4000).params
    row[0].plot(*data.T, ".", ms=2, rasterized=True)
    z = jnp.linspace(-3, 3, 200)[:, None]
    x = jax.vmap(flow.decode)(z)
    colour = np.exp(np.asarray(jax.vmap(flow.log_prob)(x)))
    row[1].scatter(*x.T, c=colour, s=4, rasterized=True)
    for ax in row:
        ax.set(xlim=(-5, 5), ylim=(-3, 3))


def dependent() -> None:
    """A few large groups of rows that share their noise, with and without knowing it."""
    row = axes(3, ("law of a row, and the data", "rows as if independent", "dependence known"))
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(25), 20)
    u = np.sqrt(0.1) * rng.normal(size=(500, 2)) + np.sqrt(0.9) * rng.normal(size=(25, 2))[labels]
    warp = lambda u: np.stack([1.3 * u[:, 0], 0.6 * u[:, 0] ** 2 - 1 + 0.6 * u[:, 1]], 1)
    data = jnp.asarray(warp(u), jnp.float32)

    def law(x: Any) -> Any:
        return -0.5 * ((x[0] / 1.3) ** 2 + ((x[1] + 1 - 0.6 * (x[0] / 1.3) ** 2) / 0.6) ** 2)

    start = vf.flows.coupling(jax.random.key(0), 2, num_layers=6, hidden=(16,))
    blind = vf.maximize(
        jax.random.key(1), vf.objectives.forward_kl(None, data), start, num_steps=1500
    )
    similarity = (labels[:, None] == labels[None]).astype(float)
    rows = vf.distributions.RowCorrelated(start, similarity, 0.2)
    aware = vf.maximize(
        jax.random.key(1), vf.objectives.dependent_likelihood(data), rows, num_steps=1500
    )
    density(row[0], law)
    row[0].plot(*data.T, ".", color="white", ms=1, rasterized=True)
    density(row[1], blind.params.log_prob)
    density(row[2], aware.params.flow.log_prob)


def kernelised() -> None:
    """Density estimation from 400 rows."""
    rng = np.random.default_rng(4)
    angle, second = rng.uniform(0, np.pi, size=400), rng.integers(0, 2, size=400)[:, None]
    data = np.stack([np.cos(angle), np.sin(angle)], 1)
    data = 1.6 * (np.where(second, [1.0, 0.5] - data, data) - [0.5, 0.25])
    data = data + 0.2 * rng.normal(size=data.shape)
    flow = vf.flows.kernelised(jax.random.key(0), 2, num_layers=8, num_centres=25, lengthscale=1.0)
    result = vf.fit_density(jax.random.key(1), flow, data, learning_rate=5e-3)
    row = axes(3, ("400 rows", f"kernelised, {result.num_params} parameters", "400 draws"))
    density(row[1], result.flow.log_prob, 3)
    draws, _ = vf.sample_and_log_prob(jax.random.key(2), result.flow, 400)
    for ax, points in ((row[0], data), (row[2], draws)):
        ax.plot(*np.asarray(points).T, ".", ms=2, rasterized=True)
        ax.set(xlim=(-3, 3), ylim=(-3, 3))


def _survival(ax: Any, draws: Any, label: str) -> None:
    """P(|x| > r) on two logarithmic axes."""
    size = np.sort(np.abs(np.asarray(draws, float)))[::-1]
    rank = np.unique(np.geomspace(1, size.size, 60).astype(int))
    ax.loglog(size[rank - 1], rank / size.size, label=label, lw=1)
    ax.minorticks_off()


def tail_adaptive() -> None:
    """One light and one heavy marginal, and what two flows make of them."""
    _, row = plt.subplots(1, 2, figsize=(5.6, 2.8), layout="constrained")
    rng = np.random.default_rng(0)
    truth = rng.normal(size=100_000), rng.standard_t(2.0, 100_000)
    df = jnp.array([jnp.inf, 2.0])
    base = vf.distributions.StudentT(jnp.full(2, 2.0))
    flows = {
        "tail-adaptive": vf.flows.tail_adaptive(jax.random.key(0), 2, df=df, num_layers=4),
        "heavy base for all": vf.flows.coupling(jax.random.key(0), 2, num_layers=4, base=base),
    }

    def log_density(x: Any) -> Any:
        return -0.5 * x[0] ** 2 - 1.5 * jnp.log1p(x[1] ** 2 / 2)

    draws = {"target": np.stack(truth, 1)}
    for name, flow in flows.items():
        trained = fit(flow, log_density, 500)
        draws[name] = vf.sample_and_log_prob(jax.random.key(2), trained, 100_000)[0]
    for i, ax in enumerate(row):
        ax.set_title(f"{('light', 'heavy')[i]} marginal: P(|x| > r)", fontsize=9)
        for name, x in draws.items():
            _survival(ax, x[:, i], name)
        ax.set_xlim(0.5, (30, 1e3)[i])
    row[0].legend(fontsize=7)


def heavy_tail() -> None:
    """The maps, their densities, and one coordinate's importance weights on a Cauchy target."""
    _, row = plt.subplots(1, 3, figsize=(8.4, 2.8), layout="constrained")
    z = jnp.linspace(-2.5, 2.5, 161)[:, None]
    layers = {
        "HeavyTail": vf.bijections.HeavyTail(1, df=1.0),
        "SmoothHeavyTail": vf.bijections.SmoothHeavyTail(1, df=1.0, scale=1.25, weight=0.77),
    }
    for name, layer in layers.items():
        flow = vf.distributions.Flow(vf.distributions.Normal(1), layer)
        y = jax.vmap(layer.forward_and_log_det)(z)[0]
        u = jnp.linspace(-6, 6, 201)[:, None]
        log_q = jax.vmap(flow.log_prob)(u)
        row[0].plot(z, y, lw=1)
        row[1].plot(u, jnp.exp(log_q), lw=1, label=name)
        row[2].plot(u, -jnp.log(jnp.pi * (1 + u[:, 0] ** 2)) - log_q, lw=1)
    row[1].plot(u, 1 / (jnp.pi * (1 + u**2)), "k--", lw=0.7, label="Cauchy")
    row[1].legend(fontsize=7)
    titles = ("map of a normal variable", "density", "log weight against a Cauchy")
    for ax, title in zip(row, titles, strict=True):
        ax.set_title(title, fontsize=9)


def ring(x: Any) -> Any:
    """A ring of radius 2 with less mass on its left."""
    radius = jnp.sqrt(jnp.sum(x**2) + 1e-6)
    return -0.5 * ((radius - 2.0) / 0.35) ** 2 + 0.8 * x[0] / radius


def masked_autoregressive() -> None:
    """Draws of a ring, and a flow fitted to them by maximum likelihood."""
    left, right = axes(2, ("draws", "masked autoregressive flow"))
    rng = np.random.default_rng(0)
    angle = rng.vonmises(0.0, 0.8, 2000)
    points = (2 + 0.35 * rng.normal(size=2000)) * np.stack([np.cos(angle), np.sin(angle)])
    left.plot(*points[:, :300], ".", ms=1)
    left.set(xlim=(-4, 4), ylim=(-4, 4))
    flow = vf.flows.masked_autoregressive(jax.random.key(0), 2, num_layers=6, hidden=(32,))
    data = jnp.asarray(points.T, jnp.float32)
    estimate = lambda key, flow: jnp.mean(jax.vmap(flow.log_prob)(data))
    density(right, vf.maximize(jax.random.key(1), estimate, flow, num_steps=800).params.log_prob)


def _ring_by_elbo(flow: Any, title: str) -> None:
    left, right = axes(2, ("target", title))
    density(left, ring)
    density(right, fit(flow, ring).log_prob)


def inverse_autoregressive() -> None:
    """The ring fitted by the ELBO."""
    options = {"num_layers": 6, "hidden": (32,)}
    flow = vf.flows.inverse_autoregressive(jax.random.key(0), 2, **options)
    _ring_by_elbo(flow, "inverse autoregressive flow")


def block_autoregressive() -> None:
    """The ring fitted by the ELBO."""
    flow = vf.flows.block_autoregressive(jax.random.key(0), 2, num_layers=2, hidden=(16, 16))
    _ring_by_elbo(flow, "block autoregressive flow")


def _grid(ax: Any, layer: Any) -> None:
    """A square grid after one layer."""
    u = jnp.linspace(-3, 3, 31)
    for c in np.linspace(-3, 3, 9):
        for line in (jnp.stack([u, 0 * u + c], 1), jnp.stack([0 * u + c, u], 1)):
            y = jax.vmap(layer.forward_and_log_det)(line)[0]
            ax.plot(*np.asarray(y).T, color="tab:blue", lw=0.5)
    ax.set(xlim=(-4, 4), ylim=(-4, 4))


def planar() -> None:
    """What one layer does to a grid, and what sixteen make of a bent target."""
    row = axes(3, ("one layer", "target", "16 layers, fitted"))
    u, w = jnp.array([2.0, 1.0]), jnp.array([1.5, -0.5])
    layer = vf.bijections.Planar(jax.random.key(0), 2)
    layer = eqx.tree_at(lambda b: b.params, layer, jnp.concatenate([u, w, jnp.zeros(1)]))
    _grid(row[0], layer)
    density(row[1], banana)
    start = vf.flows.planar(jax.random.key(0), 2, num_layers=16)
    density(row[2], fit(start, banana, 3000).log_prob)


def radial() -> None:
    """Expansion and contraction of a grid, and a stack on a bent target."""
    row = axes(3, ("expansion", "contraction", "16 layers, fitted"))
    for ax, raw_beta in ((row[0], 3.0), (row[1], -3.0)):
        layer = vf.bijections.Radial(jax.random.key(0), 2)
        leaves = jnp.zeros(2), jnp.asarray(raw_beta)
        _grid(ax, eqx.tree_at(lambda b: (b.centre, b.raw_beta), layer, leaves))
    start = vf.flows.radial(jax.random.key(0), 2, num_layers=16)
    density(row[2], fit(start, banana, 3000).log_prob)


def sylvester() -> None:
    """Layers of rank one and two at the same number of hidden units."""
    row = axes(3, ("target", "16 layers of rank 1", "8 layers of rank 2"))
    density(row[0], banana)
    for ax, rank in ((row[1], 1), (row[2], 2)):
        start = vf.flows.sylvester(jax.random.key(0), 2, rank=rank, num_layers=16 // rank)
        density(ax, fit(start, banana, 3000).log_prob)


def residual() -> None:
    """The ring fitted by the ELBO."""
    flow = vf.flows.residual(jax.random.key(0), 2, num_layers=6, hidden=(16, 16))
    _ring_by_elbo(flow, "residual flow")


def spline() -> None:
    """Draws with four modes, and affine and spline couplings of one size by maximum likelihood."""
    row = axes(3, ("800 draws", "affine, 4 layers", "spline, 4 layers"))
    rng = np.random.default_rng(0)
    corners = 1.8 * np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    points = (
        corners[rng.choice(4, 800, p=[0.1, 0.2, 0.3, 0.4])] + rng.normal(size=(800, 2)) / 8**0.5
    )
    row[0].plot(*points.T, ".", ms=1, rasterized=True)
    row[0].set(xlim=(-3, 3), ylim=(-3, 3))
    data = jnp.asarray(points, jnp.float32)
    estimate = lambda key, flow: jnp.mean(jax.vmap(flow.log_prob)(data))
    for ax, transformer in ((row[1], "affine"), (row[2], "spline")):
        options = {"transformer": transformer, "num_layers": 4, "hidden": (16,)}
        start = vf.flows.coupling(jax.random.key(0), 2, **options)
        fitted = vf.maximize(jax.random.key(1), estimate, start, num_steps=600).params
        density(ax, fitted.log_prob, 3)


def tanh_mixture() -> None:
    """One map, its slope, and a ring by the ELBO."""
    titles = ("one map", "its slope", "4 layers, fitted")
    _, row = plt.subplots(1, 3, figsize=(7.8, 2.8), layout="constrained")
    mixture = vf.bijections.TanhMixture(3)
    params = jnp.array([0.0, 0.0, 2.0, -3.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    x = jnp.linspace(-4, 4, 201)
    y, log_slope = jax.vmap(lambda x: mixture.forward(x, params))(x)
    row[0].plot(x, y, lw=1)
    row[1].plot(x, jnp.exp(log_slope), lw=1)
    options = {"transformer": vf.bijections.TanhMixture(4), "num_layers": 4, "hidden": (16,)}
    start = vf.flows.coupling(jax.random.key(0), 2, **options)
    density(row[2], fit(start, ring, 800).log_prob)
    for ax, title in zip(row, titles, strict=True):
        ax.set_title(title, fontsize=9)
    row[2].set_xticks([])
    row[2].set_yticks([])


def shared_trunk() -> None:
    """Parameters of stacks with and without a shared trunk, and what the shared one fits."""
    _, row = plt.subplots(1, 3, figsize=(7.8, 2.8), layout="constrained")
    options = {"hidden": (64, 64)}
    depths = (2, 4, 8, 16, 32)
    for label, shared in (("own networks", False), ("shared trunk", True)):
        counts = []
        for num_layers in depths:
            make = lambda key, n=num_layers, shared=shared: vf.flows.coupling(
                key, 4, num_layers=n, shared_trunk=shared, **options
            )
            flow = eqx.filter_eval_shape(make, jax.random.key(0))
            leaves = jax.tree.leaves(vf.params(flow.bijection.layers[0]))
            counts.append(sum(leaf.size for leaf in leaves))
        row[0].loglog(depths, counts, "o-", ms=3, lw=1, label=label)
    row[0].set_xticks(depths, depths)
    row[0].minorticks_off()
    row[0].legend(fontsize=7)
    start = vf.flows.coupling(
        jax.random.key(0), 2, num_layers=8, hidden=(32, 32), shared_trunk=True
    )
    density(row[1], ring)
    density(row[2], fit(start, ring).log_prob)
    titles = ("parameters by layers, d = 4", "target", "8 layers, shared trunk")
    for ax, title in zip(row, titles, strict=True):
        ax.set_title(title, fontsize=9)
    for ax in row[1:]:
        ax.set_xticks([])
        ax.set_yticks([])


def main(names: list[str]) -> None:
    """Draw the named pictures, or all."""
    plt.rcParams["svg.hashsalt"] = "vflow"
    shared = {
        "axes",
        "density",
        "fit",
        "four_modes",
        "banana",
        "main",
        "_grid",
        "ring",
        "_ring_by_elbo",
        "_survival",
    }
    pictures = {
        name: value
        for name, value in globals().items()
        if callable(value) and getattr(value, "__module__", "") == __name__ and name not in shared
    }
    for name in names or sorted(pictures):
        pictures[name]()
        plt.savefig(HERE / f"{name}.svg", metadata={"Date": None})
        plt.close("all")


if __name__ == "__main__":
    main(sys.argv[1:])
