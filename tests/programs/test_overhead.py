"""Step time of programs beside hand-written JAX with the same keys, interleaved in one process."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow as vf
from tests.programs.test_variance import cone_elbo, cone_elbo_by_hand, fold

pytestmark = pytest.mark.slow


def by_hand(num_particles):
    def bound(key, p):
        keys = jax.random.split(fold(key, "vmap #0"), num_particles)
        particles = jax.vmap(lambda key: cone_elbo_by_hand(key, p))(keys)
        return jax.nn.logsumexp(particles) - jnp.log(num_particles)

    return lambda key, p: jax.vmap(lambda k: bound(k, p))(jax.random.split(key, 64)).mean()


def program(num_particles):
    def bound(p):
        particles = vf.vmap(lambda: cone_elbo(p), num_particles)
        return jax.nn.logsumexp(particles) - jnp.log(num_particles)

    return vf.expect(bound, 64)


@pytest.mark.parametrize("num_particles", [1, 5])
def test_step_and_compilation(num_particles):
    p, key = jnp.array([0.3, 0.1, 0.5, 0.4]), jax.random.key(0)
    runs, built = [], []
    for make in (by_hand, program):
        start = time.perf_counter()
        lowered = jax.jit(jax.value_and_grad(make(num_particles), argnums=1)).lower(key, p)
        built.append(time.perf_counter() - start)
        runs.append(lowered.compile())

    def block(run, steps=300):
        start = time.perf_counter()
        for _ in range(steps):
            out = run(key, p)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / steps

    times = np.array([[block(run) for run in runs] for _ in range(15)])
    hand, ours = np.median(times, axis=0)
    assert ours <= (1.2 if hand < 200e-6 else 1.1) * hand, (hand, ours)
    assert built[1] <= 1.6 * built[0] + 0.2, built
