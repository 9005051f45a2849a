"""Programs: whatever can be simulated and scored."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import ProgramError
from vflow.programs._frame import Frame, Recorder, current_frame, running
from vflow.programs._linearity import tag
from vflow.programs._path_run import NeedsPath, along, slope_of


class Program(eqx.Module):
    r"""A variational family or a model: it can be simulated and scored.

    `simulate` satisfies $\mathbb{E}[1/\hat q \mid x] = 1/q(x)$ and `log_prob` satisfies
    $\mathbb{E}[\hat p(x)] = p(x)$; exact densities are the case without noise.
    """

    @abc.abstractmethod
    def log_prob(self, values: dict[str, Any], *args: Any) -> Array:
        """The log density of given values of all sites; shape ()."""

    @abc.abstractmethod
    def run(self, *args: Any) -> Any:
        """Meet all sites through `vf.sample`, in a running frame."""

    def simulate(
        self,
        *args: Any,
        gradient: str | None = None,
        condition: Any = None,
        log_density: Any = None,
        name: str | None = None,
    ) -> tuple[dict[str, Any], Array]:
        """Draw all sites, inside an objective program.

        Args:
            args: further arguments of the program.
            gradient: "total", "path" or "auto"; None takes that of the objective. "path" drops the
                derivative of log q at fixed values for all reparameterised sites; the gradient
                of the objective stays unbiased. "auto" drops a share that is estimated.
            condition: must be None; a program takes its inputs as arguments.
            log_density: accepted and not needed.
            name: of this call; its sites are numbered by call otherwise.

        Returns:
            (site name -> value, log q of shape ()).
        """
        if condition is not None:
            raise ProgramError("a program has no condition: pass inputs as arguments of simulate.")
        frame = current_frame("simulate")
        return _simulate(self, args, frame, frame.gradient_of(gradient), name)


def _simulate(
    program: Program, args: tuple, frame: Frame, gradient: str, name: str | None
) -> tuple[dict[str, Any], Array]:
    block = frame.label("simulate") if name is None else name
    unit = f"{frame.scope}{block}/"
    recorder = Recorder({}, unit=unit, gradient=gradient)
    values, totals = draw(program, args, frame, recorder, block)
    run, log_q, only = frame.run.path, totals.get("log_drawn", jnp.zeros(())), recorder.path
    if gradient != "total" and not only and (run is None or run.kind in ("trace", "plain")):
        raise ProgramError(
            f'gradient="{gradient}" wants continuous sites with vf.reparam() or vf.implicit(), and '
            f"{block!r} has none: use gradient='total' (among particles, with control=\"vimco\")."
        )
    if not only:
        return values, log_q
    if run is None:
        raise NeedsPath
    run.meet(frame, unit, gradient, recorder.labels)
    own, weight = totals["log_path"], run.weight(gradient)
    if run.kind == "plain":
        total = log_q + own
        path = _path_log_prob(program, args, values, total, only)
        return values, path if weight is None else total + weight * slope_of(path - total)
    if run.kind == "stop":
        still = jax.lax.stop_gradient(own)
        return values, log_q + still + (0.0 if weight is None else (1.0 - weight) * slope_of(own))
    if run.kind == "trace":
        return values, tag("log_q", unit, log_q + own)
    return values, run.lower(frame, unit, log_q + own)


def draw(
    program: Program, args: tuple, frame: Frame, recorder: Recorder, name: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a program inside an objective: given sites are scored, the others drawn.

    Returns:
        (values of all sites, totals `log_drawn`, `log_given`, `log_given/<site>` where present).
    """
    block = frame.label("simulate") if name is None else name
    frame.check_trace(block)
    child = frame.child(block, frame.key)
    child.recorder, child.names = recorder, frame.names
    with running(child):
        program.run(*args)
    found = {
        k: child.totals.pop(k)
        for k in list(child.totals)
        if k.startswith("log_") and k != "log_weight"
    }
    frame.absorb(child.totals, {})
    frame.exports.update(child.exports)
    frame.supports |= child.supports
    return child.records, found


def _path_log_prob(
    program: Program, args: tuple, values: dict[str, Any], log_q: Array, only: set[str]
) -> Array:
    """The value of `log_q`; the terms of the sites in `only` have path derivatives only."""
    diff = {k: v for k, v in values.items() if jnp.issubdtype(jnp.result_type(v), jnp.inexact)}
    rest = {k: jax.lax.stop_gradient(v) for k, v in values.items() if k not in diff}

    def density(diff):
        return score(program, args, {**diff, **rest}, only)[0]

    part, slope = jax.lax.stop_gradient(jax.value_and_grad(density)(jax.lax.stop_gradient(diff)))
    part_path = part + along(slope, diff)
    if only == set(values):
        return part_path
    own = score(program, args, values, set(values) - only)[0]
    return own + part_path


def score(
    program: Program,
    args: tuple,
    values: dict[str, Any],
    only: set[str] | None = None,
    *,
    as_model: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """The log density of given values (of the terms of the sites in `only`, if given).

    With `as_model`, values drawn from a wider support than the program's are refused.
    """
    recorder = Recorder(dict(values), only=only, as_model=as_model)
    frame = Frame(None, recorder=recorder)
    with running(frame):
        program.run(*args)
    unused = set(values) - recorder.used
    if unused:
        raise ProgramError(
            f"values were given for sites that the program does not have: {sorted(unused)}; it has "
            f"{sorted(frame.records)}."
        )
    return jnp.asarray(frame.totals.get("log_given", 0.0)), frame.records


class _Function(Program):
    fn: Callable[..., Any] = eqx.field(static=True)
    args: tuple
    kwargs: dict[str, Any]

    def run(self, *args: Any) -> Any:
        """Call the function."""
        return self.fn(*self.args, *args, **self.kwargs)

    def log_prob(self, values: dict[str, Any], *args: Any) -> Array:
        """The log density of given values of all sites; shape ().

        Raises:
            ProgramError: for a site without a value, or a value without a site.
        """
        return score(self, args, values, as_model=True)[0]

    def __call__(self, *args: Any, **kwargs: Any) -> "_Function":
        """The same program with arguments supplied."""
        return _Function(self.fn, self.args + args, {**self.kwargs, **kwargs})


def program(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Program:
    """Make a guide or a model from a function that draws with `vf.sample`.

    Args:
        fn: the function; also as a decorator, `@vf.program`.
        args: its first arguments; more may follow in `simulate` and `log_prob`, or by calling the
            program, `guide(params)`.
        kwargs: its keyword arguments.

    Returns:
        A `Program` with `simulate(*args) -> (values, log_q)` and `log_prob(values, *args)`.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> @vf.program
        ... def guide(mean):
        ...     vf.sample("z", dist.Normal(mean, 0.8))
        >>> def elbo(mean):
        ...     values, log_q = guide.simulate(mean)
        ...     return dist.Normal(0.0, 1.0).log_prob(values["z"]) - log_q
        >>> value = vf.expect(elbo)(jax.random.key(0), 0.3)
    """
    if not callable(fn):
        raise TypeError(f"vf.program takes a function, got {type(fn).__name__}.")
    return _Function(fn, args, kwargs)
