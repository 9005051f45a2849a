"""Fit a flow posterior to a model, and say whether to trust it."""

from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import PRNGKeyArray

from vflow.bijections import AbstractBijection
from vflow.distributions import AbstractDistribution
from vflow.distributions._sampling import as_key
from vflow.fit._budget import budget_of
from vflow.fit._checkpoint import Checkpoint
from vflow.fit._checks import (
    check_callable,
    check_choice,
    check_count,
    check_optimizer,
)
from vflow.fit._dtype import default_dtype
from vflow.fit._guards import check_process, check_sound
from vflow.fit._guide import GuideDistribution, make_guide
from vflow.fit._local_fit import fit_subsampled
from vflow.fit._loop import Progress
from vflow.fit._posterior import Posterior
from vflow.fit._run import Run
from vflow.flows.stochastic import StochasticFlow
from vflow.targets import Target, decentre
from vflow.targets import target as make_target
from vflow.targets._rows import subsampled


def fit(
    key: PRNGKeyArray,
    program_or_target: Any,
    *,
    flow: AbstractDistribution | StochasticFlow | None = None,
    init: Any = None,
    guide: Any = None,
    params: Any = None,
    objective: Callable[[Any, Any], Any] | None = None,
    gradient: str | None = None,
    optimizer: optax.GradientTransformation | None = None,
    budget: str | float = "default",
    num_steps: int | None = None,
    num_samples: int | None = None,
    precondition: str | AbstractBijection | None = "auto",
    progress: bool = True,
    callback: Callable[[Progress], Any] | None = None,
    checkpoint: Any = None,
    dtype: str = "auto",
    mesh: Any = None,
    local: str = "per-datum",
) -> Posterior:
    r"""Fit a flow to a model's posterior on unconstrained $R^d$; the result knows its own quality.

    $$\max_\theta\; E_{x \sim q_\theta}[\log \tilde p(x) - \log q_\theta(x)]$$

    In order: the density is checked at the starting points; a Gaussian is fitted in float64 and
    becomes the affine layer behind the flow; the flow is trained on the whitened space by
    stochastic ascent with the path gradient; fresh draws give k-hat, effective sample size and
    evidence, and other witnesses are heard. A target that is Gaussian but for 0.02 nats is not trained.
    Where the verdict is not "ok", further rounds try what it calls for: a start from draws that cover
    more, a layer with power tails, maximum likelihood on importance-weighted draws where only the tails
    object, more draws behind each gradient, spline layers. Each is kept only if
    the verdict on fresh draws improves, and told in the notes.

    Args:
        key: PRNG key; the fit is a deterministic function of it.
        program_or_target: what `vf.from_numpyro` returns, a `vf.Target`, or a log density (with
            `flow`, whose shape then gives the dimension).
        flow: the family, on `(dim,)`, unconditional; affine coupling layers by default. A stochastic
            flow (`vf.flows.stochastic_flow`) gets the target by itself.
        init: a `Posterior` of the same model, perhaps with other data, whose flow and coordinates to
            start from instead: no preconditioner is fitted.
        guide: instead of a flow, a guide over the model's sites that takes its parameters as an
            argument: a program, `vf.from_numpyro(guide)` or a `vf.program`, whose next argument they
            are, or a function from them to a program. Not preconditioned.
        params: the guide's parameters to start from, any pytree; `posterior.flow.params` at the end.
        objective: `objective(q, p) -> scalar` to be maximised, as in `vf.objectives`; the ELBO
            by default.
        gradient: "path", "total", or "auto" (their mixture of least variance, estimated as it
            goes); None takes path where objective and flow admit it.
        optimizer: an optax transformation; clipped Adam with cosine decay by default.
        budget: "quick": one round of 500 steps. "default": up to three rounds of 2000 steps of 128
            draws. "thorough": up to six rounds of 6000 steps of 256 draws. Or seconds: up to six rounds
            of the default's size, ended at that many seconds of wall clock; it is looked at after every
            100 steps and before each round, so that preparation, compilation and the verdict may
            exceed it, and the result depends on the machine. Those by name count steps: two runs agree.
        num_steps: gradient steps of one round without escalation, whatever the budget says.
        num_samples: draws behind each gradient in the first round; by the budget otherwise.
        precondition: "auto" fits the affine layer, after a change of coordinates where that helps: sites
            of a NumPyro model whose scale depends on other sites are decentred. None leaves both
            out; or a bijection to use.
        progress: whether to show a progress bar.
        callback: called with a `Progress` after every 100 steps; a true value stops training.
        checkpoint: path of a file written every 100 steps; the same call goes on from it.
        dtype: "float32" or "float64" to compute in; "auto" takes float64 where float32 breaks.
        mesh: a `jax.sharding.Mesh` with axes "particle", over which the draws of a step are spread,
            and "data", over which the rows of a NumPyro model's arguments are: draws do not depend on
            the number of devices.
        local: how the latents inside a subsampled plate of a NumPyro model are conditioned:
            "per-datum", with numbers of their own for each row, or "amortised", by a network on the
            rows of data. `flow` is then the family of the latents outside; `objective` has to be linear in
            the log densities; a round has 32 draws ("thorough": 64), and there are at most two rounds (four).

    Returns:
        A `Posterior`. Ctrl-C ends training early and returns what there is.

    Raises:
        ProgramError: the model is not one that can be fitted; the site is named.
        FitError: the log density or its gradient is not finite where it is needed.
        TypeError, ValueError: an argument is wrong; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> target = vf.Target(lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), dim=2)
        >>> posterior = vf.fit(jax.random.key(0), target, num_steps=100, progress=False)
        >>> print(posterior.status, f"{float(posterior.log_evidence):.2f}")
        ok 1.84

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770); Agrawal, Sheldon & Domke 2020 (arXiv 2006.10343)
        for the recipe; Yao, Vehtari, Simpson & Gelman 2018 (arXiv 1802.02538) for the verdict.
    """
    key = as_key(key)
    check_process("fit", key)
    if subsampled(program_or_target):
        return fit_subsampled(
            key,
            program_or_target,
            flow=flow,
            init=init,
            objective=objective,
            gradient=gradient,
            optimizer=optimizer,
            budget=budget,
            num_steps=num_steps,
            num_samples=num_samples,
            progress=progress,
            callback=callback,
            checkpoint=checkpoint,
            dtype=dtype,
            mesh=mesh,
            local=local,
            guide=guide,
            params=params,
            precondition=precondition,
        )
    target = _target(program_or_target, flow)
    if init is not None:
        target, flow, precondition = _warm(target, init, flow, guide, precondition)
    if guide is not None or params is not None:
        _check_guide(guide, flow, precondition)
        flow, precondition = make_guide(guide, params, target), None
    optimizer = check_optimizer("fit", optimizer)
    plan = budget_of(budget)
    if num_steps is not None:
        plan = plan._replace(num_steps=check_count("fit", "num_steps", num_steps), rounds=1)
    if num_samples is not None:
        plan = plan._replace(num_samples=check_count("fit", "num_samples", num_samples))
    check_choice("fit", "gradient", gradient, (None, "total", "path", "auto"))
    check_choice("fit", "dtype", dtype, ("auto", "float32", "float64"))
    for name, value in (("objective", objective), ("callback", callback)):
        if value is not None:
            check_callable("fit", name, value)
    _check_flow(flow, target.dim)
    _check_precondition(precondition, target.dim)
    if dtype == "float32" and default_dtype() == "float64":
        raise ValueError(
            "fit: dtype='float32' under jax_enable_x64 is not supported; switch x64 off."
        )

    run = Run(target, key, objective, gradient, optimizer, plan, mesh, near=num_steps is None)
    file = None if checkpoint is None else Checkpoint(checkpoint, run.identity(flow, precondition))
    run.prepare(flow, precondition, dtype, file)
    return run.train(progress, callback)


def _target(program: Any, flow: Any) -> Target:
    if isinstance(program, AbstractDistribution | StochasticFlow):
        raise TypeError(
            "fit: the second argument must be a program, a Target or a log density, got a "
            f"{type(program).__name__}; the family goes to flow=."
        )
    if callable(program) and not isinstance(program, Target) and not hasattr(program, "log_prob"):
        if flow is None:
            raise TypeError(
                "fit: a bare function has no dimension: pass vf.Target(log_density, dim), or "
                "vf.from_numpyro(model, *args) for a NumPyro model."
            )
        _check_flow(flow, None)
        return Target(program, flow.shape[0])
    return make_target(program)


def _warm(
    target: Target, init: Any, flow: Any, guide: Any, precondition: Any
) -> tuple[Target, AbstractDistribution, None]:
    """Target, flow and preconditioner of a fit that starts from another."""
    if not isinstance(init, Posterior):
        raise TypeError(f"fit: init must be a Posterior, got {type(init).__name__}.")
    if flow is not None or guide is not None or precondition != "auto":
        raise ValueError(
            "fit: init brings its flow and coordinates: pass no flow, guide, precondition."
        )
    if isinstance(init.flow, GuideDistribution):
        raise ValueError("fit: init is the fit of a guide: pass guide=, params=init.flow.params.")
    theirs, ours = ([(s.name, s.shape) for s in t.sites] for t in (init.target, target))
    if theirs != ours:
        raise ValueError(
            f"fit: init is a fit of another model: its sites are {theirs}, not {ours}."
        )
    return decentre(target, tuple(init.settings.get("decentred", ()))), init.flow, None


def _check_guide(guide: Any, flow: Any, precondition: Any) -> None:
    if guide is None:
        raise ValueError("fit: params= are the parameters of a guide: pass guide= too.")
    if flow is not None:
        raise ValueError("fit: flow and guide are two families: pass one of them.")
    if precondition not in ("auto", None):
        raise ValueError("fit: precondition is for flows; a guide has its own coordinates.")


def _check_flow(flow: Any, dim: int | None) -> None:
    if flow is None:
        return
    if not isinstance(flow, AbstractDistribution | StochasticFlow):
        raise TypeError(f"fit: flow must be a flow, as vf.flows.coupling(key, dim), got {flow!r}.")
    if len(flow.shape) != 1 or (dim is not None and flow.shape != (dim,)):
        raise ValueError(
            f"fit: flow has event shape {flow.shape}, the target needs ({dim or 'dim'},)."
        )
    if flow.condition_shape is not None:
        raise ValueError("fit: flow takes a condition; a posterior needs an unconditional flow.")
    if dim is not None:
        check_sound("fit", flow)


def _check_precondition(precondition: Any, dim: int) -> None:
    if precondition is None or precondition == "auto":
        return
    if not isinstance(precondition, AbstractBijection):
        raise ValueError(
            f"fit: precondition must be 'auto', None or a bijection, got {precondition!r}."
        )
    if precondition.shape != (dim,):
        raise ValueError(
            f"fit: precondition has event shape {precondition.shape}, the target needs ({dim},)."
        )
