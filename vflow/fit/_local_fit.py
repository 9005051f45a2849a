"""Fits of models with a subsampled plate: minibatches of rows, perhaps with locals of their own."""

from typing import Any

from jaxtyping import PRNGKeyArray

from vflow.fit._budget import Budget, budget_of
from vflow.fit._checkpoint import Checkpoint
from vflow.fit._checks import check_callable, check_choice, check_count, check_optimizer
from vflow.fit._dtype import default_dtype
from vflow.fit._local_bound import check_objective
from vflow.fit._local_init import check_init
from vflow.fit._local_run import LocalRun
from vflow.fit._posterior import Posterior
from vflow.targets._rows import Rows

LOCAL = ("per-datum", "amortised")
BUDGETS = {
    "quick": Budget(500, 32, 1),
    "default": Budget(2000, 32, 2),
    "thorough": Budget(6000, 64, 4),
}
_REFUSED = {
    "guide": "the locals of rows that a step does not see need a family of known form, local='per-datum' "
    "or 'amortised'",
    "params": "there is no guide",
    "precondition": "the Gaussian of the globals, with the locals integrated out, is also where "
    "the locals start and the noise of minibatches is taken off",
}


def fit_subsampled(
    key: PRNGKeyArray,
    program: Any,
    *,
    flow: Any,
    init: Any,
    objective: Any,
    gradient: str | None,
    optimizer: Any,
    budget: Any,
    num_steps: int | None,
    num_samples: int | None,
    progress: bool,
    callback: Any,
    checkpoint: Any,
    dtype: str,
    mesh: Any,
    local: str,
    **refused: Any,
) -> Posterior:
    """What `vf.fit` does with a model that has a subsampled plate; its arguments, some of them refused."""
    for name, value in refused.items():
        if value is not None if name != "precondition" else value != "auto":
            raise ValueError(
                f"fit: {name} is not possible for a model with a subsampled plate: {_REFUSED[name]}. "
                "Leave it out, or drop subsample_size."
            )
    check_choice("fit", "local", local, LOCAL)
    check_choice("fit", "gradient", gradient, (None, "total", "path"))
    check_choice("fit", "dtype", dtype, ("auto", "float32", "float64"))
    if dtype == "float32" and default_dtype() == "float64":
        raise ValueError(
            "fit: dtype='float32' under jax_enable_x64 is not supported; switch x64 off."
        )
    plan = budget_of(budget, BUDGETS)
    if num_steps is not None:
        plan = plan._replace(num_steps=check_count("fit", "num_steps", num_steps), rounds=1)
    if num_samples is not None:
        plan = plan._replace(num_samples=check_count("fit", "num_samples", num_samples))
    optimizer = check_optimizer("fit", optimizer)
    for name, value in (("objective", objective), ("callback", callback)):
        if value is not None:
            check_callable("fit", name, value)
    if objective is not None:
        check_objective(objective)
    rows = Rows(program)
    if flow is not None and getattr(flow, "shape", None) != (rows.num_globals,):
        raise ValueError(
            f"fit: flow must be a flow of the {rows.num_globals} coordinates outside plate "
            f"{rows.plate!r}, of event shape ({rows.num_globals},), got {getattr(flow, 'shape', flow)!r}."
        )
    if init is not None:
        check_init(init, flow, rows)
    run = LocalRun(rows, local, init, key, objective, gradient, optimizer, plan, mesh)
    file = None if checkpoint is None else Checkpoint(checkpoint, run.identity(flow, "auto"))
    run.prepare(flow, "auto", dtype, file)
    return run.train(progress, callback)
