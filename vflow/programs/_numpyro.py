"""NumPyro models and guides as programs."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpyro.handlers as handlers
from jaxtyping import Array
from numpyro.primitives import Messenger

from vflow._core import ProgramError
from vflow.programs._frame import current_frame, support_of
from vflow.programs._fresh import fresh
from vflow.programs._numpyro_checks import (
    bind_arguments,
    model_name,
    running_model,
    site_shape,
)
from vflow.programs._program import Program
from vflow.programs._sample import choose
from vflow.programs._site import View
from vflow.programs._support import check_support


class NumpyroCall:
    """A model with the arguments bound to it; compared by identity, never traced.

    Args:
        model: the NumPyro model or guide.
        args: its first positional arguments.
        kwargs: its keyword arguments.
        strategies: site name -> gradient strategy.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        strategies: dict[str, Any],
    ):
        self.model = model
        self._args = args
        self._kwargs = kwargs
        self.strategies = strategies

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments, NumPy arrays as views made anew."""
        return fresh(self._args)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments, NumPy arrays as views made anew."""
        return fresh(self._kwargs)


class NumpyroProgram(Program):
    r"""A NumPyro model or guide as a program: it simulates its latent sites and scores them.

    Make one with `vf.from_numpyro`. Values are dicts `site name -> constrained value`.
    """

    call: NumpyroCall = eqx.field(static=True)

    def log_prob(self, values: dict[str, Any], *args: Any) -> Array:
        r"""The joint density $\log p(\text{values}, \text{data})$, with scales, masks, factors.

        Args:
            values: a value for every latent site, constrained; deterministic sites may be there
                too and are ignored.
            *args: further positional arguments of the model.

        Returns:
            A scalar, in nats.

        Raises:
            ProgramError: a site is missing, unknown, observed, has the wrong shape, or was drawn by
                a guide with a wider support; or the model itself fails.
        """
        model, args, kwargs = self.call.model, self.call.args + args, self.call.kwargs
        bind_arguments(model, args, kwargs, partial=False)

        def lookup(site):
            if site["type"] != "sample" or site["is_observed"]:
                return None
            if site["name"] not in values:
                raise ProgramError(
                    f"latent site {site['name']!r} of model {model_name(model)} has no value; "
                    f"got values for {sorted(values)}."
                )
            return values[site["name"]]

        with running_model(model, validate=True) as guard:
            scored = _ValueCheck(handlers.substitute(guard, substitute_fn=lookup))
            trace = handlers.trace(scored).get_trace(*args, **kwargs)
            _refuse_unknown(values, trace, model)
            return sum_terms(log_probs(trace))

    def run(self, *args: Any) -> Any:
        """Run the model; its latent sites are choices of the language, the observed are scored."""
        model, args, kwargs = self.call.model, self.call.args + args, self.call.kwargs
        bind_arguments(model, args, kwargs, partial=False)
        with running_model(model) as guard:
            sites = _Choices(guard, self.call.strategies)
            with sites:
                result = guard(*args, **kwargs)
        unknown = set(self.call.strategies) - sites.seen
        if unknown:
            raise ProgramError(
                f"strategies name {sorted(unknown)}, which are no latent sites of model "
                f"{model_name(model)}; it has {sorted(sites.seen)}."
            )
        return result


def log_probs(trace: dict[str, Any]) -> dict[str, Array]:
    """The log density of a trace by sample site: masked, scaled, summed over its axes."""
    terms = {}
    for name, site in trace.items():
        if site["type"] != "sample":
            continue
        cached = (site["intermediates"],) if site["intermediates"] else ()
        # NumPyro's support checks take NumPy data for a sign that the bounds are NumPy's too.
        value = site["fn"].log_prob(jnp.asarray(site["value"]), *cached)
        if site["scale"] is not None:
            value = site["scale"] * value
        terms[name] = jnp.sum(value) if jnp.ndim(value) else value
    return terms


def sum_terms(terms: dict[str, Array]) -> Array:
    """The sum of log densities, a floating-point scalar also where there are none."""
    return jnp.asarray(sum(terms.values(), start=0.0))


def latent_values(trace: dict[str, Any]) -> dict[str, Any]:
    """The values of the latent sites of a trace."""
    return {name: site["value"] for name, site in trace.items() if is_latent(site)}


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is an unobserved sample site."""
    return site["type"] == "sample" and not site["is_observed"]


class _ValueCheck(Messenger):
    """Refuses a latent value that would broadcast, or was drawn from a wider support."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if not is_latent(msg):
            return
        domain = View(msg["fn"], msg["name"]).domain
        check_support(msg["name"], support_of(msg["value"]), domain)
        if tuple(jnp.shape(msg["value"])) != site_shape(msg):
            raise ProgramError(
                f"latent site {msg['name']!r} has shape {site_shape(msg)}, "
                f"got a value of shape {jnp.shape(msg['value'])}."
            )


class _Choices(Messenger):
    """Makes latent sites choices of the language, each with its strategy."""

    def __init__(self, fn: Callable[..., Any], strategies: dict[str, Any]):
        super().__init__(fn)
        self.strategies, self.seen = strategies, set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if not is_latent(msg) or msg["value"] is not None:
            return
        name, shape = msg["name"], msg["kwargs"].get("sample_shape", ())
        self.seen.add(name)
        dist = msg["fn"].expand((*shape, *msg["fn"].batch_shape)) if shape else msg["fn"]
        strategy = self.strategies.get(name, msg["infer"].get("strategy"))
        msg["value"] = choose(name, dist, strategy, msg["scale"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            frame = current_frame(f"site {msg['name']!r}")
            frame.add_given(msg["name"], log_probs({msg["name"]: msg})[msg["name"]])


def _refuse_unknown(values, trace, model) -> None:
    for name in values:
        site = trace.get(name)
        if site is not None and (is_latent(site) or site["type"] == "deterministic"):
            continue
        what = "is observed in" if site is not None else "is not a site of"
        raise ProgramError(
            f"{name!r} {what} model {model_name(model)}, whose latent sites are "
            f"{list(latent_values(trace))}."
        )


def from_numpyro(
    model: Any,
    *args: Any,
    strategies: Any = None,
    **kwargs: Any,
) -> NumpyroProgram:
    r"""A NumPyro model or guide as a program, with its arguments bound.

    The arguments stay concrete (models call NumPy on data); they may also be tracers, as
    when a guide is made of parameters inside an objective.

    Args:
        model: a function with NumPyro sites; not its result.
        *args: positional arguments of the model, from the first; the rest may come later, in
            `simulate(...)` and `log_prob(values, ...)`.
        strategies: how the gradient is estimated, a dict `site name -> strategy`; a site may also
            carry its own, `numpyro.sample(..., infer={"strategy": vf.enum()})`.
        **kwargs: keyword arguments of the model.

    Returns:
        A program: `simulate()` draws the latent sites, `log_prob(values)` is the joint density.

    Raises:
        TypeError: `model` is not callable.
        ProgramError: the arguments do not fit the model's signature.

    Example:
        >>> import numpyro, numpyro.distributions as dist, vflow as vf
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> program = vf.from_numpyro(model, 0.5)
        >>> print(f"{program.log_prob({'mu': 0.5}):.4f}")
        -1.9629
    """
    if not callable(model):
        raise TypeError(
            f"model must be a function with NumPyro sites, got {type(model).__name__}; pass the "
            "function itself and its arguments, from_numpyro(model, *args)."
        )
    if strategies is not None and not isinstance(strategies, dict):
        raise TypeError(
            f"strategies must be a dict from site name to strategy, got {strategies!r}."
        )
    bind_arguments(model, args, kwargs, partial=True)
    return NumpyroProgram(NumpyroCall(model, args, kwargs, dict(strategies or {})))
