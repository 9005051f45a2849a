"""Flows that the law tests run over. A new constructor joins by one line."""

from typing import Any

import jax
import jax.numpy as jnp

import vflow as vf
from vflow._core import combine, partition


def perturb(module: Any, key: Any, scale: float = 0.3) -> Any:
    """Normal noise on every trained leaf: away from the identity start."""
    trained, static = partition(module)
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(key, len(leaves) + 1)
    leaves = [
        leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=False)
    ]
    return combine(jax.tree.unflatten(tree, leaves), static)


def _heavy():
    df = jnp.array([3.0, jnp.inf, 5.0, 5.0, jnp.inf])
    return vf.distributions.StudentT(df, trainable=True)


SMALL = {"num_layers": 3, "hidden": (5,)}
# name -> a constructor of (key); conditions have three entries.
FLOWS = {
    "gaussian diagonal": lambda key: vf.flows.gaussian(key, 2),
    "gaussian full": lambda key: vf.flows.gaussian(key, 2, covariance="full"),
    "gaussian low_rank": lambda key: vf.flows.gaussian(key, 2, covariance="low_rank", rank=1),
    "block_autoregressive": lambda key: vf.flows.block_autoregressive(
        key, 2, num_layers=1, hidden=(3,), condition_dim=3
    ),
    "coupling": lambda key: vf.flows.coupling(key, 2, **SMALL),
    "coupling 1": lambda key: vf.flows.coupling(key, 1, **SMALL),
    "coupling 1 spline": lambda key: vf.flows.coupling(
        key, 1, transformer="spline", condition_dim=3, **SMALL
    ),
    "coupling conditional": lambda key: vf.flows.coupling(
        key, 2, condition_dim=3, mixing="lu", loft=100.0, **SMALL
    ),
    "coupling 5": lambda key: vf.flows.coupling(
        key,
        5,
        mixing="householder",
        actnorm=True,
        base=_heavy(),
        tails=vf.bijections.TriangularAffine(5),
        **SMALL,
    ),
    "coupling spline": lambda key: vf.flows.coupling(key, 2, transformer="spline", **SMALL),
    "coupling tanh mixture": lambda key: vf.flows.coupling(
        key, 2, transformer=vf.bijections.TanhMixture(2), num_layers=2, hidden=(5,)
    ),
    "coupling shared": lambda key: vf.flows.coupling(key, 2, shared_trunk=True, **SMALL),
    "heavy_tail 5": lambda key: vf.flows.heavy_tail(
        key, 5, df=_heavy().df, loc=jnp.ones(5), tril=jnp.eye(5) + jnp.tri(5, k=-1), **SMALL
    ),
    "inverse_autoregressive": lambda key: vf.flows.inverse_autoregressive(key, 2, **SMALL),
    "inverse_autoregressive 1": lambda key: vf.flows.inverse_autoregressive(key, 1, **SMALL),
    "inverse_autoregressive 5": lambda key: vf.flows.inverse_autoregressive(
        key, 5, condition_dim=3, base=_heavy(), **SMALL
    ),
    "kernelised": lambda key: vf.flows.kernelised(key, 2, num_layers=3, num_centres=4),
    "kernelised 1 conditional": lambda key: vf.flows.kernelised(
        key, 1, condition_dim=3, num_layers=1, num_centres=4, kernel="matern32"
    ),
    "kernelised 5": lambda key: vf.flows.kernelised(
        key, 5, num_layers=3, num_centres=4, kernel="matern52", linear_mean=True, base=_heavy()
    ),
    "masked_autoregressive": lambda key: vf.flows.masked_autoregressive(key, 2, **SMALL),
    "masked_autoregressive 5": lambda key: vf.flows.masked_autoregressive(
        key, 5, condition_dim=3, tails=vf.bijections.TriangularAffine(5), **SMALL
    ),
    "planar": lambda key: vf.flows.planar(key, 2, num_layers=3),
    "planar conditional": lambda key: vf.flows.planar(
        key, 2, num_layers=2, hidden=(5,), condition_dim=3
    ),
    "radial": lambda key: vf.flows.radial(key, 5, num_layers=3, base=_heavy()),
    "residual": lambda key: vf.flows.residual(key, 2, num_layers=2, hidden=(4,)),
    "residual 3 conditional": lambda key: vf.flows.residual(
        key, 3, num_layers=2, hidden=(4,), condition_dim=3, lipschitz=0.7
    ),
    "sylvester": lambda key: vf.flows.sylvester(key, 2, num_layers=2),
    "tail_adaptive": lambda key: vf.flows.tail_adaptive(
        key, 2, df=jnp.array([3.0, jnp.inf]), **SMALL
    ),
    "tail_adaptive 1": lambda key: vf.flows.tail_adaptive(key, 1, df=3.0, **SMALL),
    "tail_adaptive 5 conditional": lambda key: vf.flows.tail_adaptive(
        key, 5, df=_heavy().df, condition_dim=3, **SMALL
    ),
}
