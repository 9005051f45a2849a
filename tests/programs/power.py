"""The rule by which Monte Carlo results are compared with the truth."""

import jax
import jax.numpy as jnp
import numpy as np


def moments(estimate, params, key, num_draws, batch=20_000):
    """Mean and standard deviation of (value, gradient) over keys, as flat float64 vectors."""

    def one(key):
        value, grad = jax.value_and_grad(estimate, argnums=1)(key, params)
        return jnp.concatenate([value.ravel(), *[leaf.ravel() for leaf in jax.tree.leaves(grad)]])

    @jax.jit
    def sums(key):
        draws = jax.vmap(one)(jax.random.split(key, batch)).astype(jnp.float64)
        return draws.sum(axis=0), (draws**2).sum(axis=0)

    state = Moments(batch, lambda i: sums(jax.random.fold_in(key, i)))
    while state.n < num_draws:
        state.more()
    return state


class Moments:
    def __init__(self, batch, sums):
        self.batch, self.sums, self.n, self.first, self.second = batch, sums, 0, 0.0, 0.0

    def more(self):
        first, second = self.sums(self.n)
        self.first, self.second = self.first + np.asarray(first), self.second + np.asarray(second)
        self.n += self.batch

    @property
    def mean(self):
        return self.first / self.n

    @property
    def sd(self):
        return np.sqrt(np.maximum(self.second / self.n - self.mean**2, 0.0))

    @property
    def se(self):
        return self.sd / np.sqrt(self.n)


def check(
    estimate, params, key, *, value=None, gradient=None, rel=0.01, absolute=0.0, most=2_000_000
):
    """|mean - truth| < 4.5 se, with draws added until se < 1 % of the truth (or `absolute`)."""
    gradient = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    truth = np.concatenate([[np.nan if value is None else value], np.asarray(gradient)])
    wanted = ~np.isnan(truth)
    state = moments(estimate, params, key, 1)
    enough = np.maximum(rel * np.abs(truth), absolute)
    while np.any((state.se > enough)[wanted]):
        assert state.n < most, f"no power: se {state.se} for {truth} after {state.n} draws"
        state.more()
    miss = np.abs(state.mean - truth)[wanted]
    assert np.all(miss <= 4.5 * state.se[wanted] + 1e-9), (
        f"mean {state.mean}, truth {truth}, se {state.se}, {state.n} draws"
    )
    return state
