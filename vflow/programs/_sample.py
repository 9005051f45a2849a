"""The words of the language that make and cost a random choice."""

from typing import Any

import jax.numpy as jnp

from vflow._core import ProgramError
from vflow.programs._frame import current_frame, strategy_of, support_of
from vflow.programs._path_run import NeedsPath, draw_site
from vflow.programs._site import Site, View
from vflow.programs._strategy import Strategy
from vflow.programs._support import check_support
from vflow.programs.strategies._implicit import Implicit
from vflow.programs.strategies._path import Path
from vflow.programs.strategies._reparam import Reparam


def sample(name: str, dist: Any, strategy: Any = None) -> Any:
    """A random choice inside an objective program, a guide or a model.

    Args:
        name: of the site, unique in the program; the noise is folded from it.
        dist: a NumPyro, distrax or vflow distribution.
        strategy: how its gradient is estimated: `vf.reparam()`, `vf.implicit()`, `vf.path()`,
            `vf.reinforce()`, `vf.enum()`, `vf.measure_valued()`, `vf.disarm()`,
            `vf.rao_blackwell()` or one's own `vf.Strategy`; None is reparam where the distribution
            has it, else implicit, else an error.

    Returns:
        The value, of the shape of a draw.

    Raises:
        ProgramError: outside a program, for a duplicate name, a strategy that does not apply, or a
            site inside a raw JAX transformation.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> estimate = vf.expect(lambda t: vf.sample("x", dist.Normal(t, 1.0)) ** 2)
        >>> value = estimate(jax.random.key(0), 0.7)
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a site must be a string, got {name!r}.")
    return choose(name, dist, strategy)


def choose(name: str, dist: Any, strategy: Any, scale: Any = None) -> Any:
    """`sample`, of a site whose log density counts `scale` times."""
    frame = current_frame(f"vf.sample({name!r})")
    recorder = frame.recorder
    if recorder is not None and name in recorder.given:
        frame.check_trace(name)
        value, view = recorder.value(name), View(dist, name)
        if recorder.as_model:
            check_support(name, support_of(value), view.domain)
        frame.add_given(name, _scaled(view.log_prob(value), scale))
        frame.record(name, value)
        return value
    site = Site(name, dist, frame, frame.key_for(name, "sample"))
    if recorder is not None and recorder.note is not None:
        frame.record(name, recorder.note(site))
        return frame.records[name]
    strategy = strategy_of(name, strategy)
    if strategy is None:
        strategy = _default(site)
    if not isinstance(strategy, Strategy):
        raise ProgramError(
            f"site {name!r}: the strategy must be a vf.Strategy such as vf.reinforce(), got "
            f"{strategy!r}."
        )
    value = strategy.draw(site)
    follows = _follows_path(strategy, recorder, frame, site, scale)
    if frame.run.path is None:
        if follows:
            raise NeedsPath
    else:
        value = draw_site(frame, site, value)
    if recorder is not None:
        if recorder.meet(name):
            log_prob = site.drawn_log_prob
            log_prob = site.view.log_prob(value) if log_prob is None else log_prob
            frame.add("log_path" if follows else "log_drawn", _scaled(log_prob, scale))
        if follows:
            recorder.path.add(name)
            recorder.labels.add(frame.scope + name)
        frame.record(name, value)
        frame.supports[id(value)] = (value, site.view.domain)
    return value


def _follows_path(strategy: Strategy, recorder: Any, frame: Any, site: Site, scale: Any) -> bool:
    """Whether the log density of the site is to have derivatives along its draw alone."""
    if recorder is None or recorder.unit is None:
        return False
    wanted = (Path,) if recorder.gradient == "total" else (Path, Reparam, Implicit)
    if not isinstance(strategy, wanted):
        return False
    # Where the weights of log densities depend on draws, the rule wants the density of the sampler.
    path = frame.run.path
    plain = path is None or path.kind in ("trace", "plain")
    return plain or (scale is None and not site.view.masked)


def _scaled(log_prob: Any, scale: Any) -> Any:
    return log_prob if scale is None else scale * log_prob


def _default(site: Site) -> Strategy:
    if site.view.reparameterised:
        return Reparam()
    if Implicit.applies(site):
        return Implicit()
    raise site.error(
        f"{site.view.family()} has no reparameterised sampler: choose a strategy, vf.enum(), "
        "vf.measure_valued() or vf.reinforce()."
    )


def cost(value: Any) -> None:
    r"""Add a term to the objective; only the sites visited so far are credited with it.

    Args:
        value: shape ().

    Raises:
        ProgramError: outside an objective program, or for a value that is not a scalar.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     vf.cost(vf.sample("x", dist.Normal(t, 1.0)) ** 2)
        ...     vf.cost(vf.sample("y", dist.Normal(t, 1.0), vf.reinforce()))
        >>> value = vf.expect(objective)(jax.random.key(0), 0.7)
    """
    frame = current_frame("vf.cost(...)")
    frame.check_trace("vf.cost")
    value = jnp.asarray(value)
    if value.shape != ():
        raise ProgramError(f"vf.cost takes a scalar, got shape {value.shape}: sum it first.")
    frame.add_cost(value)
