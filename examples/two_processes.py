"""One fit over the devices of two processes, as on two machines of a cluster.

Each process calls `jax.distributed.initialize` and then runs the same script: the mesh spans the devices
of all of them, everything else stays as it is on one machine. Here both run on this machine, each
with two virtual CPU devices, and process 0 tells what came out. On a cluster a launcher (SLURM,
Kubernetes) starts the processes, and `jax.distributed.initialize()` needs no arguments.

    python examples/two_processes.py
"""

import argparse
import os
import socket
import subprocess
import sys


def worker(process, port, steps):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

    import numpy as np
    import numpyro
    import numpyro.distributions as dist

    import vflow as vf

    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)

    rng = np.random.default_rng(0)
    x = rng.standard_normal(64).astype(np.float32)
    y = (0.7 * x + 0.5 * rng.standard_normal(64)).astype(np.float32)

    mesh = jax.make_mesh((2, 2), ("particle", "data"))
    posterior = vf.fit(
        jax.random.key(0),
        vf.from_numpyro(model, x, y),
        flow=vf.flows.gaussian(jax.random.key(1), 2),
        mesh=mesh,
        num_steps=steps,
        progress=False,
    )
    if process == 0:
        print(f"{jax.device_count()} devices of {jax.process_count()} processes")
        print(f"{posterior.status}, log evidence {posterior.log_evidence}")
        print(posterior.summary())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--process", type=int, help="set by the script itself")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    if arguments.process is not None:
        worker(arguments.process, arguments.port, arguments.steps)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--steps", str(arguments.steps), "--port", str(port)]
    processes = [subprocess.Popen([*command, "--process", str(i)]) for i in range(2)]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"the processes ended with codes {codes}.")


if __name__ == "__main__":
    main()
