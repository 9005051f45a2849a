"""What a fit of globals and locals takes over from another."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core._compile import filter_jit_once
from vflow.fit._dtype import cast, scope
from vflow.fit._guide import GuideDistribution
from vflow.fit._local import Locals
from vflow.fit._local_bound import parts
from vflow.fit._posterior import Posterior
from vflow.targets import Target
from vflow.targets._numpyro import NumpyroSpace
from vflow.targets._rows import Rows

_NUM_DRAWS = 4096


def check_init(init: Any, flow: Any, rows: Rows) -> None:
    """Refuse what is no fit of this model; the number of rows may differ, and the data.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(init, Posterior):
        raise TypeError(f"fit: init must be a Posterior, got {type(init).__name__}.")
    if flow is not None:
        raise ValueError("fit: init brings its flow and coordinates: pass no flow.")
    theirs, ours = (_sites(target, rows.plate) for target in (init.target, rows.whole))
    if theirs != ours:
        raise ValueError(
            f"fit: init is a fit of another model: its sites are {theirs}, not {ours}."
        )
    shared, _ = parts(init.flow)
    if isinstance(shared, GuideDistribution) or shared.shape != (rows.num_globals,):
        raise ValueError(
            "fit: init is a fit of all rows at once, which has no family of the globals alone: fit "
            "without init, or start from a fit of the model with subsample_size."
        )
    if init.settings.get("decentred"):
        raise ValueError(
            f"fit: init was fitted with sites {init.settings['decentred']} decentred, which minibatches "
            "are not: fit it with precondition=None, or leave init out."
        )


def moments(init: Posterior, key: PRNGKeyArray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and lower root of the covariance of the globals, in float64."""
    with scope(dtype):
        shared = cast(parts(init.flow)[0], dtype)
        keys = jax.random.split(key, _NUM_DRAWS)
        draw = filter_jit_once(lambda shared, keys: jax.vmap(shared.sample)(keys))
        g = np.asarray(draw(shared, keys), np.float64)
    return g.mean(axis=0), np.linalg.cholesky(np.atleast_2d(np.cov(g, rowvar=False)))


def locals_of(init: Posterior, rows: Rows, local: str) -> Locals | None:
    """Its conditionals of the locals, if they are of this kind and its data were the same."""
    conditionals = parts(init.flow)[1]
    if conditionals is None or init.settings.get("local") != local:
        return None
    theirs, ours = (_data(target) for target in (init.target, rows.whole))
    same = len(theirs) == len(ours) and all(map(np.array_equal, theirs, ours))
    return conditionals if same else None


def _sites(target: Target, plate: str) -> list[tuple[str, tuple[int | str, ...]]]:
    """Names and shapes of the sites; whatever the number of rows of the plate."""
    return [
        (
            site.name,
            tuple(plate if of == plate else n for n, of in zip(site.shape, site.dims, strict=True)),
        )
        for site in target.sites
    ]


def _data(target: Target) -> list[Any]:
    """The arrays among the arguments: not the numbers, of which one may be the size of a minibatch."""
    if not isinstance(target.space, NumpyroSpace):
        return []
    call = target.space.program.call
    return [x for x in jax.tree.leaves((call.args, call.kwargs)) if np.ndim(x)]
