"""Write a variational objective as a program, and train it twice: in a loop of one's own, and with
`vf.maximize`.

The objective is the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, arXiv
1509.00519): the logarithm of an average of K weights, a lower bound on the log evidence that grows
with K. The model is a robust regression with five observations; its posterior is not Gaussian.
"""

import argparse

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import vflow as vf

HEIGHT = jnp.array([-1.2, -0.4, 0.1, 0.8, 1.5])
WEIGHT = jnp.array([-0.9, -0.6, 0.3, 2.9, 1.1])  # the fourth is an outlier


def regression(height, weight=None):
    """A line with Student-t noise."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("person", len(height)):
        numpyro.sample("weight", dist.StudentT(3.0, slope * height, noise), obs=weight)


def log_weight(q, p):
    """One particle: draw from q, compare the densities. Its expectation is the ELBO."""
    x, log_q = q.simulate()
    return p.log_prob(x) - log_q


def importance_weighted(q, p, num_particles):
    """K independent particles, their weights averaged before the logarithm."""
    log_w = vf.vmap(lambda: log_weight(q, p), num_particles)
    return jax.nn.logsumexp(log_w) - jnp.log(num_particles)


def own_loop(key, estimate, flow, num_steps):
    """What `vf.maximize` does, by hand: `estimate` is an ordinary function of a key and a flow."""
    optimizer = optax.adam(1e-2)
    state = optimizer.init(vf.params(flow))

    @jax.jit
    def step(key, flow, state):
        value, gradient = vf.value_and_grad(estimate)(key, flow)
        ascent = jax.tree.map(jnp.negative, gradient)  # optax descends
        updates, state = optimizer.update(ascent, state)
        return vf.apply_updates(flow, updates), state, value

    values = []
    for step_key in jax.random.split(key, num_steps):
        flow, state, value = step(step_key, flow, state)
        values.append(value)
    last = jnp.stack(values[-50:])
    return flow, float(last.mean())


def main():
    """Train a Gaussian family on the bound with 1 and with 8 particles; compare with the evidence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()

    target = vf.target(vf.from_numpyro(regression, HEIGHT, weight=WEIGHT))
    start = vf.flows.gaussian(jax.random.key(0), target.dim)
    for num_particles in (1, 8):

        def objective(flow, num_particles=num_particles):
            return importance_weighted(flow, target, num_particles)

        estimate = vf.expect(objective, num_samples=16)
        _, last = own_loop(jax.random.key(1), estimate, start, args.steps)
        result = vf.maximize(jax.random.key(2), estimate, start, args.steps)
        print(f"{num_particles} particles: own loop {last:.3f}, vf.maximize {result.value} (nats)")

    x, log_q = vf.sample_and_log_prob(jax.random.key(3), result.params, 20_000)
    log_w = jax.vmap(target.log_prob)(x) - log_q
    print(f"log evidence by importance sampling {vf.diagnostics.log_evidence(log_w)}")
    print(f"k-hat {vf.diagnostics.khat(log_w):.2f}")


if __name__ == "__main__":
    main()
