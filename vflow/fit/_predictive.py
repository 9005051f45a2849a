"""Posterior predictive draws, in batches that bound the memory."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro.handlers as handlers
from jaxtyping import PRNGKeyArray
from numpyro.infer import Predictive

from vflow._core import FitError, ProgramError
from vflow.fit._dtype import scope
from vflow.programs._numpyro import NumpyroCall
from vflow.programs._numpyro_checks import model_name


def predict(
    key: PRNGKeyArray,
    model: Callable[..., Any],
    latent: dict[str, np.ndarray],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Every site of `model` that is neither in `latent` nor observed, one draw per latent draw.

    Args:
        key: PRNG key.
        model: a NumPyro model.
        latent: site -> (n, *shape); no deterministic sites, the model computes them anew.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        batch_size: how many draws are in memory at once on the device.
        dtype: "float32" or "float64", what the model computes in.

    Returns:
        Site -> (n, *shape), on the host.

    Raises:
        TypeError: `model` is not a function.
        ProgramError: the model fails, or has no site to predict.
    """
    if not callable(model):
        raise TypeError(
            "predictive: model must be a NumPyro model, a function, followed by its arguments; got "
            f"{type(model).__name__}."
        )
    call = NumpyroCall(model, args, kwargs, {})
    n = len(next(iter(latent.values())))
    batch_size = min(batch_size, n)

    @jax.jit
    def batch(key, latent):
        return Predictive(model, latent, parallel=True)(key, *call.args, **call.kwargs)

    def observed(key, latent):
        fixed = handlers.substitute(
            handlers.seed(model, key), data={k: v[0] for k, v in latent.items()}
        )
        trace = handlers.trace(fixed).get_trace(*call.args, **call.kwargs)
        data.update(name for name, site in trace.items() if site.get("is_observed"))

    parts, data = [], set()
    with scope(dtype), jax.numpy_rank_promotion("allow"):
        keys = jax.random.split(key, -(-n // batch_size))
        for i, start in enumerate(range(0, n, batch_size)):
            # The last batch is filled up by starting it earlier: one shape, one compilation.
            first = min(start, n - batch_size)
            block = {name: value[first : first + batch_size] for name, value in latent.items()}
            if not parts:
                _named(model, jax.eval_shape, observed, key, block)
            drawn = _named(model, batch, keys[i], block)
            kept = {name: value for name, value in drawn.items() if name not in data}
            parts.append({name: np.asarray(value)[start - first :] for name, value in kept.items()})
    if not parts[0]:
        raise ProgramError(
            f"predictive: model {model_name(model)} has no site to predict with these arguments: "
            "leave the data out (obs=None)."
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _named(model: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    try:
        return run(*args)
    except (ProgramError, FitError):
        raise
    except Exception as error:
        raise ProgramError(
            f"predictive: model {model_name(model)} failed on posterior draws: "
            f"{type(error).__name__}: {error}"
        ) from error
