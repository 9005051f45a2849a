"""What a NumPyro model may do, and its failures told in the words of its sites."""

import contextlib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.core import Tracer
from numpyro.distributions import Unit
from numpyro.primitives import Messenger

from vflow._core import FitError, ProgramError
from vflow.programs._frame import plate_indices
from vflow.programs._fresh import fresh

_TRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def model_name(model: Callable[..., Any]) -> str:
    """The name by which messages call a model."""
    model = getattr(model, "func", model)  # of a functools.partial
    return getattr(model, "__name__", type(model).__name__)


def site_shape(msg: dict[str, Any]) -> tuple[int, ...]:
    """The shape that the distribution at a sample site gives to its value."""
    return tuple(msg["fn"].shape(msg["kwargs"].get("sample_shape", ())))


def bind_arguments(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, partial: bool
) -> inspect.BoundArguments | None:
    """The model's arguments, defaults included; a ProgramError where they do not fit.

    With `partial`, arguments that are still to come may be missing.
    """
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # a callable without a signature: nothing to compare with
        return None
    try:
        bound = (signature.bind_partial if partial else signature.bind)(*args, **kwargs)
    except TypeError as error:
        raise ProgramError(
            f"model {model_name(model)}{signature} does not take these arguments: {error}."
        ) from error
    bound.apply_defaults()
    return bound


def _check_observed(name: str, shape: tuple[int, ...], value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        raise ProgramError(
            f"observed site {name!r}: its data has dtype {value.dtype} and holds no numbers. "
            "Convert it, numpy.asarray(data, float), and mask what is missing."
        )
    observed = tuple(jnp.shape(value))
    if 0 in observed or 0 in shape:
        raise ProgramError(
            f"observed site {name!r} is empty: its data has shape {observed}, its distribution "
            f"{shape}. Pass at least one observation."
        )
    try:
        joint = jnp.broadcast_shapes(shape, observed)
    except ValueError:
        raise ProgramError(
            f"observed site {name!r}: data of shape {observed} does not fit its distribution of "
            f"shape {shape}."
        ) from None
    if joint not in (shape, observed):
        raise ProgramError(
            f"observed site {name!r}: data of shape {observed} and a distribution of shape {shape} "
            f"broadcast to {joint}, larger than either, which counts every observation several "
            "times. Reshape one of them."
        )


class SiteGuard(Messenger):
    """Wraps a model directly and refuses, by name, what no fixed density can be made of.

    `last` is the site that was reached last, for messages about what failed after it.
    """

    def __init__(self, fn: Callable[..., Any]):
        super().__init__(fn)
        self.last: str | None = None
        self._seen: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Called at every site before its value is drawn."""
        kind, name = msg["type"], str(msg.get("name"))
        if kind == "prng_key" and msg["value"] is None:
            raise ProgramError(
                "the model asks for a random key outside its sample sites (numpyro.prng_key); make "
                "that choice a sample site, or pass it as an argument."
            )
        if kind == "param" and msg["value"] is None:
            raise ProgramError(
                f"site {name!r} is a numpyro.param: pass it to the model as an argument, or fix it "
                f"with numpyro.handlers.substitute(model, data={{{name!r}: value}})."
            )
        if kind == "plate" and msg["value"] is None:
            msg["value"] = plate_indices(name, *msg["args"])
            if msg["value"] is None:
                raise ProgramError(
                    f"plate {name!r} draws a random subsample, which makes the density random "
                    "outside vf.expect(objective): drop subsample_size, or fix the indices with "
                    "numpyro.handlers.substitute."
                )
        elif kind == "plate" and isinstance(msg["value"], Tracer):
            # All rows, unless a handler inside chose others: concrete, to index NumPy data with.
            if not isinstance(self.fn, Messenger) and msg["value"].shape == msg["args"][:1]:
                with jax.ensure_compile_time_eval():
                    msg["value"] = jnp.arange(msg["args"][0], dtype=msg["value"].dtype)
        if kind not in ("sample", "deterministic"):
            return
        if name in self._seen:
            raise ProgramError(f"site {name!r} is used twice: give every site its own name.")
        self._seen.add(name)
        if kind == "sample" and isinstance(msg["fn"], Unit):  # a factor
            return
        self.last = name
        if kind == "sample" and msg["is_observed"]:
            if isinstance(msg["value"], list | tuple):
                msg["value"] = np.asarray(msg["value"])
            _check_observed(name, site_shape(msg), msg["value"])


class _Apart(Messenger):
    """Keeps what happens inside from the NumPyro handlers that are active outside."""

    def process_message(self, msg: dict[str, Any]) -> None:
        # handlers.block would also ask for a random key, which scoring has none of.
        msg["stop"] = True


@contextlib.contextmanager
def running_model(model: Callable[..., Any], *, validate: bool = False) -> Iterator[SiteGuard]:
    """A guard around a model; whatever fails inside the block becomes a ProgramError.

    Models broadcast freely, so a strict `jax_numpy_rank_promotion` is lifted inside. Whether
    NumPyro validates does not depend on its global setting. Handlers outside the block do not see
    the model's sites: a density may be evaluated inside another NumPyro model.

    Args:
        model: the model.
        validate: whether a value outside the support of its distribution has log density -inf.
            It costs operations, and turns NaN values into -inf too.
    """
    guard, name = SiteGuard(fresh(model)), model_name(model)
    try:
        with (
            jax.numpy_rank_promotion("allow"),
            numpyro.validation_enabled(validate),
            warnings.catch_warnings(),
            _Apart(),
        ):
            warnings.filterwarnings("ignore", "Out-of-support values")  # told by the -inf
            yield guard
    except (ProgramError, FitError):
        raise
    except _TRACED as error:
        raise ProgramError(
            f"model {name} needs the concrete value of something random{_after(guard)}: a Python "
            "`if`, a NumPy function or an index that depends on a latent cannot be traced. Use "
            "jnp.where, jax.lax.cond or jax.numpy instead."
        ) from error
    except Exception as error:
        if "size of plate should be positive" in str(error):
            message = f"model {name} has an empty plate{_after(guard)}: the data is empty."
        else:
            what = str(error) or f"at {traceback.extract_tb(error.__traceback__)[-1].line!r}"
            message = f"model {name} failed{_after(guard)}: {type(error).__name__}: {what}"
        raise ProgramError(message) from error


def _after(guard: SiteGuard) -> str:
    return f" after site {guard.last!r}" if guard.last else " before its first site"


def sites_of_missing_arguments(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    latent: list[str],
    run: Callable[..., Any],
) -> dict[str, str]:
    """Latent sites whose data is an argument that is None: {site: argument}.

    A site that has the argument's name counts; so does one that receives a stand-in as its
    `obs` when the model runs (abstractly) with the stand-in for the argument.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        latent: names of its latent sites.
        run: `run(model, args, kwargs)` runs a model abstractly.
    """
    bound = bind_arguments(model, args, kwargs, partial=False)
    found: dict[str, str] = {}
    if bound is None:
        return found
    for holder, argument in _missing_arguments(bound):
        if argument in latent:
            found[argument] = argument
            continue
        watch, holder[argument] = _Watch(model), _STAND_IN
        # The stand-in is no array and may make the model fail: what was seen by then counts.
        with contextlib.suppress(Exception):
            run(watch, bound.args, bound.kwargs)
        holder[argument] = None
        found |= dict.fromkeys(watch.sites, argument)
    return found


_STAND_IN = object()


def _missing_arguments(bound: inspect.BoundArguments) -> list[tuple[dict[str, Any], str]]:
    """Where an argument is None: the dict that holds it, and its name."""
    holders = [bound.arguments]
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = dict(bound.arguments[name])
            holders.append(bound.arguments[name])
    return [(holder, name) for holder in holders for name in holder if holder[name] is None]


class _Watch(Messenger):
    """Notes which sites observe the stand-in itself, and leaves them latent."""

    def __init__(self, fn: Callable[..., Any]):
        super().__init__(fn)
        self.sites: list[str] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["value"] is _STAND_IN:
            self.sites.append(msg["name"])
            msg["value"], msg["is_observed"] = None, False


def is_concrete(value: Any) -> bool:
    """Whether a value can be inspected now, outside any trace."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def count_nan(value: Any) -> int:
    """How many entries of concrete data are NaN."""
    value = np.asarray(value)
    return int(np.isnan(value).sum()) if np.issubdtype(value.dtype, np.inexact) else 0
