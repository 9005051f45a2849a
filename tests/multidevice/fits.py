"""One fit on each of the meshes named in the arguments, as "particle x data"; prints JSON.

Run in a process of its own: the number of devices is fixed when JAX starts.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import vflow as vf


def logistic(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 2))
    y = (rng.random(64) < 1 / (1 + np.exp(-x[:, 0]))).astype(float)
    program = vf.from_numpyro(logistic, x, y)
    affine = vf.bijections.Affine(jnp.array([1.3, 0.2]), jnp.array([0.4, 0.4]))
    out = {}
    for name in sys.argv[1:]:
        particle, data = map(int, name.split("x"))
        mesh = None
        if particle * data > 1:
            devices = np.array(jax.devices()[: particle * data]).reshape(particle, data)
            mesh = jax.sharding.Mesh(devices, ("particle", "data"))
        posterior = vf.fit(
            jax.random.key(0),
            program,
            flow=vf.flows.gaussian(jax.random.key(1), 2),
            precondition=affine,
            mesh=mesh,
            num_steps=30,
            num_samples=16,
            progress=False,
        )
        out[name] = {
            "history": posterior.history.tolist(),
            "status": posterior.status,
            "khat": posterior.khat,
            "log_evidence": posterior.log_evidence.value,
            "draws": np.asarray(posterior.sample(jax.random.key(2), 5)["b"]).tolist(),
        }
    sys.stdout.write(json.dumps(out))


if __name__ == "__main__":
    main()
