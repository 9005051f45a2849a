"""A guide of one's own as a family on the unconstrained space of a target."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.handlers as handlers
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

from vflow._core import ProgramError, partition
from vflow.distributions import AbstractDistribution
from vflow.fit._points import log_det
from vflow.programs import Program
from vflow.programs._frame import Frame, override, running, support_of
from vflow.programs._marginal import _Marginal
from vflow.programs._numpyro import NumpyroProgram, is_latent
from vflow.programs._numpyro_checks import model_name
from vflow.programs._site import Site
from vflow.programs._strategy import Strategy
from vflow.programs._support import check_support
from vflow.programs.strategies._implicit import Implicit
from vflow.programs.strategies._path import Path
from vflow.programs.strategies._reparam import Reparam
from vflow.targets import Target
from vflow.targets._space import NamedSpace


@dataclasses.dataclass(frozen=True, repr=False)
class _Plain(Strategy):
    """A draw for its value alone, whichever strategy trains the site."""

    def draw(self, site: Site) -> Any:
        """A draw."""
        return site.draw_detached()


@dataclasses.dataclass(eq=False)
class _Setting:
    """What a guide is fitted to; compared by identity, never traced.

    Attributes:
        guide: a program that takes the parameters, or a function from them to a program.
        target: the target.
        estimated: whether the density of the guide is only estimated.
        unpathed: sites whose strategy has no path gradient.
    """

    guide: Any
    target: Target
    estimated: bool = False
    unpathed: tuple[str, ...] = ()


class GuideDistribution(AbstractDistribution):
    r"""A guide over named sites, moved to the unconstrained space of a target.

    $$\log q(x) = \log q(v) + \log|\det \partial T/\partial x|, \qquad v = T(x) \sim q$$

    with $T$ the map of the target onto the supports of its sites, so that log weights are those of the
    constrained values, $\log p(v) - \log q(v)$. `vf.fit(..., guide=, params=)` makes it; its
    `params` are the fitted parameters.

    Args:
        params: the parameters, any pytree.
        setting: the guide and the target.
    """

    params: Any
    setting: _Setting = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, params: Any, setting: _Setting):
        self.params, self.setting = params, setting
        self.shape, self.condition_shape = (setting.target.dim,), None

    def _program(self) -> tuple[Any, tuple[Any, ...]]:
        guide = self.setting.guide
        return (guide, (self.params,)) if isinstance(guide, Program) else (guide(self.params), ())

    def _moved(self, values: dict[str, Any], log_q: Array) -> tuple[Array, Array]:
        x = self.setting.target.unconstrain(values)
        return x, log_q + log_det(self.setting.target, x)

    def simulate(
        self,
        *,
        gradient: str | None = None,
        condition: None = None,
        log_density: Any = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        """One draw and its log density inside an objective program, by the strategies of the sites.

        Args:
            gradient: as `Program.simulate` takes it.
            condition: must be None.
            log_density: ignored.
            name: of this call.

        Returns:
            `(x, log_q)`: shapes `(dim,)` and `()`.
        """
        program, args = self._program()
        if self.setting.estimated and gradient is None:
            gradient = "total"
        return self._moved(
            *program.simulate(*args, gradient=gradient, condition=condition, name=name)
        )

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density, or an estimate of it; without derivatives."""
        program, args = self._program()
        with running(Frame(key)), override(lambda name, strategy: _Plain()):
            return self._moved(*program.simulate(*args, gradient="total"))

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x`, shape `(dim,)`.

        Raises:
            ProgramError: the density of the guide is only estimated.
        """
        if self.setting.estimated:
            raise ProgramError(
                "the density of this guide is only estimated, by the inner algorithm of its "
                "vf.marginal: there is no log_prob at a point. Draws, weights and evidence are right."
            )
        target = self.setting.target
        values = target.constrain(x)
        program, args = self._program()
        log_q = program.log_prob({site.name: values[site.name] for site in target.sites}, *args)
        return log_q + log_det(target, x)

    def path_refusal(self) -> str | None:
        """Why `gradient="path"` is not defined for this guide, or None where it is."""
        if self.setting.estimated:
            return "the density of the guide is only estimated"
        if self.setting.unpathed:
            return f"sites {list(self.setting.unpathed)} of the guide are not reparameterised"
        return None


def name_of(guide: Any) -> str:
    """What messages and files call a guide."""
    if isinstance(guide, NumpyroProgram):
        return model_name(guide.call.model)
    return model_name(getattr(guide, "fn", guide))


def make_guide(guide: Any, params: Any, target: Target) -> GuideDistribution:
    """The family of a guide, checked against the target in an abstract run.

    Args:
        guide: a program that takes the parameters as its next argument, or a function from the
            parameters to a program.
        params: where to start from.
        target: what it is to be fitted to.

    Raises:
        TypeError, ValueError: `guide` is no program, `params` missing or without a trainable leaf.
        ProgramError: the guide does not have the sites of the target.
    """
    if not isinstance(guide, Program) and not callable(guide):
        raise TypeError(
            f"fit: guide must be a program, vf.from_numpyro(guide), got {type(guide).__name__}."
        )
    if params is None:
        raise ValueError(
            "fit: guide= needs params=, the parameters to start from: the guide is called with them."
        )
    params = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, params)
    if not jax.tree.leaves(partition(params)[0]):
        raise ValueError("fit: params has no trainable leaf: floating-point arrays are needed.")
    setting = _Setting(guide, target)
    family = GuideDistribution(params, setting)
    program, args = family._program()
    if not isinstance(program, Program):
        raise TypeError(
            "fit: guide must be a program that takes params, vf.from_numpyro(guide), or a function "
            f"from params to a program; {name_of(guide)}(params) returned {type(program).__name__}."
        )
    setting.estimated = isinstance(program, _Marginal)
    _refuse_scaled(program, args)
    setting.unpathed = _meet(program, args, target)
    return family


def _refuse_scaled(program: Program, args: tuple[Any, ...]) -> None:
    """A scaled log density is none that draws could be weighted with."""
    if not isinstance(program, NumpyroProgram):
        return
    scaled = []

    def run(key):
        model = handlers.seed(program.call.model, key)
        with jax.numpy_rank_promotion("allow"):
            trace = handlers.trace(model).get_trace(
                *program.call.args, *args, **program.call.kwargs
            )
        sites = ((k, s["scale"]) for k, s in trace.items() if is_latent(s))
        scaled.extend(k for k, scale in sites if scale is not None and not _is_one(scale))

    try:
        jax.eval_shape(run, jax.random.key(0))
    except Exception:  # told in the words of its sites when it is run as a program
        return
    if scaled:
        raise ProgramError(
            f"guide site {scaled[0]!r} is scaled (numpyro.handlers.scale, or a subsampled plate), so "
            "that its log density is not that of its draws and weights would be wrong: drop the "
            "scale, or train with an objective of your own and vf.maximize."
        )


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, Tracer) and bool(np.all(scale == 1))


def _meet(program: Program, args: tuple[Any, ...], target: Target) -> tuple[str, ...]:
    """Run guide and target abstractly; the sites of the guide without a path gradient."""
    unpathed = []

    def note(name, strategy):
        if not (strategy is None or isinstance(strategy, Reparam | Implicit | Path)):
            unpathed.append(name)
        return _Plain()

    def run(key):
        with running(Frame(key)), override(note):
            values, _ = program.simulate(*args, gradient="total")
            _compare({name: jnp.asarray(value) for name, value in values.items()}, target)
            if target.program is not None:
                target.program.log_prob(values)
            elif isinstance(target.space, NamedSpace):
                maps = zip(target.sites, target.space.transforms.by_site, strict=True)
                for site, transform in maps:
                    check_support(site.name, support_of(values[site.name]), transform.codomain)

    jax.eval_shape(run, jax.random.key(0))
    return tuple(unpathed)


def _compare(values: dict[str, Array], target: Target) -> None:
    """The guide's sites are the target's, in name, shape and kind."""
    wanted = {site.name: site.shape for site in target.sites}
    for name in wanted:
        if name not in values:
            raise ProgramError(
                f"the guide misses site {name!r} of the model; it has {sorted(values)}."
            )
    for name, value in values.items():
        if name not in wanted:
            raise ProgramError(
                f"guide site {name!r} is no latent site of the model, which has {sorted(wanted)}: "
                "drop it, or sum it out of the guide with vf.marginal(guide, keep, inner)."
            )
        if value.shape != wanted[name]:
            raise ProgramError(
                f"site {name!r} has shape {value.shape} in the guide and {wanted[name]} in the model."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ProgramError(
                f"site {name!r} is discrete in the guide: fit works on continuous sites; write an "
                "objective with a strategy for it and use vf.maximize."
            )
