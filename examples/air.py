"""Attend, infer, repeat: count, find and encode the digits of an image, without labels.

The model writes up to three digits on a canvas; the guide looks at what is not explained yet and
says, step by step, whether there is one more digit, where, and what. Whether is a discrete choice,
and its gradient is estimated by a strategy that the program is given: every strategy below climbs
the same bound. The images hold 0 to 2 of scikit-learn's 8 x 8 digits, which do not overlap, on a
canvas of 20 x 20.

    python examples/air.py --strategy all

Source: Eslami et al., Attend, Infer, Repeat (2016, arXiv 1603.08575). Objects have one size here, and
the state of the guide is the canvas painted so far instead of a recurrent network's.
"""

import argparse
import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from sklearn.datasets import load_digits

import vflow as vf

CANVAS, OBJECT, STEPS, CODE = 20, 8, 3, 12
ROOM = CANVAS - OBJECT


def composites(rng, digits, n):
    """n images in [0, 1], how many digits each has, and their corners (nan where there is none)."""
    images, counts = np.zeros((n, CANVAS, CANVAS), np.float32), rng.integers(0, 3, n)
    corners = np.full((n, 2, 2), np.nan)
    for image, count, corner in zip(images, counts, corners, strict=True):
        while True:
            image[:] = 0
            for i, digit in enumerate(digits[rng.integers(0, len(digits), count)]):
                row, column = corner[i] = rng.integers(0, ROOM + 1, 2)
                image[row : row + OBJECT, column : column + OBJECT] += digit
            if image.max() <= 1:  # more than full ink: digits overlap, draw again
                break
    return images, counts, corners


class Networks(eqx.Module):
    """look: image -> whether, where; read: patch -> what; write: what -> patch; worth: a baseline."""

    look: eqx.nn.MLP
    read: eqx.nn.MLP
    write: eqx.nn.MLP
    worth: eqx.nn.MLP

    def __init__(self, key):
        mlp = functools.partial(eqx.nn.MLP, depth=2, activation=jax.nn.silu)
        keys = jax.random.split(key, 4)
        self.look = mlp(CANVAS**2, 5, 128, key=keys[0])
        self.read = mlp(OBJECT**2, 2 * CODE, 64, key=keys[1])
        self.write = mlp(CODE, OBJECT**2, 64, key=keys[2])
        self.worth = mlp(CANVAS**2 + 1, "scalar", 128, key=keys[3])


def corner(where):
    """The upper left corner of an object: (2,) in pixels, inside the canvas."""
    return ROOM * jax.nn.sigmoid(where)


def windows(where):
    """Linear interpolation between the pixels of the canvas and of an object, by axis."""
    offset = jnp.arange(CANVAS)[:, None] - jnp.arange(OBJECT)[None, :]
    return [jax.nn.relu(1.0 - jnp.abs(offset - start)) for start in corner(where)]


def paint(nets, canvas, pres, where, what):
    """Add a digit to the canvas, if it is present."""
    rows, columns = windows(where)
    digit = jax.nn.sigmoid(nets.write(what) - 2.0).reshape(OBJECT, OBJECT)
    return canvas + pres * (rows @ digit @ columns.T)


def normal(parameters):
    loc, scale = jnp.split(parameters, 2)
    return dist.Normal(loc, jax.nn.softplus(scale))


def repeat(step, strategies):
    """The canvas after all steps: one strategy scans them, a tuple of strategies unrolls them."""
    state = jnp.zeros((CANVAS, CANVAS)), jnp.ones(())
    if not isinstance(strategies, tuple):
        return vf.scan(lambda state, _: (step(state, "", strategies), None), state, length=STEPS)[0]
    for i, strategy in enumerate(strategies):
        state = step(state, f" {i}", strategy)
    return state


@vf.program
def model(nets, strategies):
    def step(state, i, _):
        canvas, alive = state
        pres = vf.sample(f"pres{i}", dist.Bernoulli(probs=0.3 * alive))
        where = vf.sample(f"where{i}", dist.Normal(jnp.zeros(2), 1.7).to_event(1).mask(pres == 1))
        what = vf.sample(f"what{i}", dist.Normal(jnp.zeros(CODE), 1.0).to_event(1).mask(pres == 1))
        return paint(nets, canvas, pres, where, what), pres * alive

    canvas, _ = repeat(step, strategies)
    vf.sample("image", dist.Normal(canvas, 0.3).to_event(2))


@vf.program
def guide(nets, image, strategies):
    def step(state, i, strategy):
        canvas, alive = state
        rest = image - canvas  # what is left to explain
        seen = nets.look(rest.ravel())
        probs = alive * jax.nn.sigmoid(seen[0] + 2.0)  # starts from many objects
        if strategy == "baseline":
            strategy = vf.reinforce(baseline=lambda: worth(nets, rest, alive))
        pres = vf.sample(f"pres{i}", dist.Bernoulli(probs=probs), strategy)
        where = vf.sample(f"where{i}", normal(seen[1:]).to_event(1).mask(pres == 1))
        rows, columns = windows(where)
        code = nets.read((rows.T @ rest @ columns).ravel())
        what = vf.sample(f"what{i}", normal(code).to_event(1).mask(pres == 1))
        return paint(nets, canvas, pres, where, what), pres * alive

    repeat(step, strategies)


def worth(nets, rest, alive):
    """A learned baseline: the bound of this image, in nats, from what is left of it."""
    return 100.0 * nets.worth(jax.lax.stop_gradient(jnp.append(rest.ravel(), alive)))


def elbo(nets, image, strategies):
    values, log_q = guide.simulate(nets, image, strategies)
    return model.log_prob({**values, "image": image}, nets, strategies) - log_q


STRATEGIES = {  # name: (strategy of `pres` in all steps or step by step, samples per image)
    "reinforce": (vf.reinforce(), 1),
    "reinforce, learned baseline": ("baseline", 1),
    "reinforce, leave one out": (vf.reinforce(baseline="loo"), 4),
    "measure_valued": (vf.measure_valued(), 1),
    "disarm": (vf.disarm(), 1),
    "enum": ((vf.enum(),) * STEPS, 1),
    "mixed": ((vf.enum(), vf.measure_valued(), vf.disarm()), 1),
}


def train(key, images, num_steps, name):
    """Maximise the mean bound of an image, 64 of them a step."""
    strategies, num_samples = STRATEGIES[name]
    bound = vf.expect(lambda nets, image: elbo(nets, image, strategies), num_samples)

    def estimate(key, nets, rows):  # one expectation per image: enumeration multiplies within one
        keys = jax.random.split(key, len(rows))
        return jax.vmap(lambda key, image: bound(key, nets, image))(keys, rows).mean()

    net_key, train_key = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, num_steps, 0.05))
    return vf.maximize(
        train_key,
        estimate,
        Networks(net_key),
        num_steps,
        optimizer,
        data=images,
        batch=64,
    )


def look_at(nets, image, corners):
    """Draw from the guide: the number of objects, and how many digits are found within 2 pixels."""
    values, _ = guide.simulate(nets, image, vf.reinforce())
    apart = jnp.abs(corners[:, None, :] - jax.vmap(corner)(values["where"])[None, :, :]).max(axis=2)
    found = (apart <= 2) & (values["pres"] == 1)  # false for a nan
    return jnp.stack([values["pres"].sum(), found.any(axis=1).sum()]).astype(image.dtype)


@eqx.filter_jit
def perceive(key, nets, images, corners):
    """One draw of the guide for each image: how many objects it counts, how many digits it finds."""

    def one(key, image, corners):
        draw = vf.expect(lambda which: look_at(nets, image, corners)[which])
        return jax.vmap(lambda which: draw(key, which))(jnp.arange(2))

    return jax.vmap(one)(jax.random.split(key, len(images)), images, corners).T


def main():
    """Train with one strategy, or with each in turn; print accuracy on held-out digits, and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--strategy", choices=[*STRATEGIES, "all"], default="measure_valued")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    digits = (load_digits().images / 16).astype(np.float32)
    images, *_ = composites(rng, digits[:1500], 20_000)
    held_out, counts, corners = composites(rng, digits[1500:], 1000)

    def measure(nets):
        counted, found = perceive(jax.random.key(1), nets, held_out, corners)
        return float(np.mean(counted == counts)), float(np.sum(found) / counts.sum())

    print("| strategy | bound, nats | count accuracy | digits found | seconds | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in STRATEGIES if args.strategy == "all" else [args.strategy]:
        began, cpu_began = time.perf_counter(), time.process_time()
        result = train(jax.random.key(args.seed), images, args.steps, name)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        accuracy, found = measure(result.params)
        print(
            f"| {name} | {result.value} | {accuracy:.3f} | {found:.3f} | {wall:.0f} | {cpu:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
