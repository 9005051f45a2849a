"""The network behind amortised locals: what it sees, and what it learns before training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core import combine, partition
from vflow.fit._local import Locals
from vflow.fit._local_start import Start
from vflow.fit._loop import Ascent
from vflow.fit._recipe import default_optimizer
from vflow.targets._rows import Rows


def features_of(rows: Rows) -> np.ndarray:
    """What the data says of each row: its entries in all arguments that have one entry a row."""
    columns = [
        np.asarray(x, np.float64).reshape(rows.size, -1)
        for x in rows.data.values()
        if np.issubdtype(x.dtype, np.number) or x.dtype == bool
    ]
    if not columns:
        raise ValueError(
            "fit: local='amortised' needs data by row among the model's arguments; use 'per-datum'."
        )
    return np.concatenate(columns, axis=1)


def warmed(local: Locals, start: Start, key: PRNGKeyArray) -> Locals:
    """The encoder after a regression on the rows' Laplace approximations, in units of its base."""
    loc, slope, scale = (np.asarray(x)[0] for x in local.base.tree)
    inverse = np.linalg.inv(scale)
    spread = np.log(np.diagonal(start.scale, axis1=1, axis2=2) / np.diag(scale))
    goal = [
        (start.loc - loc) @ inverse.T,
        np.clip(spread, -2.5, 2.5),
        np.einsum("ij,njg->nig", inverse, start.slope - slope).reshape(len(start.loc), -1),
    ]
    features = local.features.tree
    goal = jnp.asarray(np.concatenate(goal, axis=1), features.dtype)
    trainable, static = partition(local.encoder)

    def fit(key, trainable, features, goal):
        def loss(trainable):
            pick = jax.random.randint(key, (256,), 0, len(goal))
            out = jax.vmap(combine(trainable, static))(features[pick])
            # A mean that is off counts in units of the row's own scale.
            own = jnp.exp(-goal[pick, loc.size : 2 * loc.size])
            weight = jnp.concatenate(
                [own, jnp.ones_like(own), jnp.repeat(own, slope.shape[1], axis=1)], axis=1
            )
            return -jnp.mean(jnp.sum((weight * (out - goal[pick])) ** 2, axis=1))

        return jax.value_and_grad(loss)(trainable)

    outcome = Ascent(fit, default_optimizer(1500, 1e-2)).run(
        key, trainable, 1500, inputs=(features, goal)
    )
    return eqx.tree_at(lambda x: x.encoder, local, combine(outcome.params, static))
