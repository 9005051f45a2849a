"""Which strategy suits a program: variance times cost, measured."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow._core import ProgramError
from vflow.programs._expect import expect, value_and_grad
from vflow.programs._frame import override
from vflow.programs._strategy import Strategy
from vflow.programs.strategies._disarm import disarm
from vflow.programs.strategies._enum import enum
from vflow.programs.strategies._implicit import implicit
from vflow.programs.strategies._measure_valued import measure_valued
from vflow.programs.strategies._rao_blackwell import rao_blackwell
from vflow.programs.strategies._reinforce import reinforce
from vflow.programs.strategies._reparam import reparam

_SAMPLES = 4


class Candidate(NamedTuple):
    """One strategy at one site, the others as the program has them.

    Attributes:
        site: name of the site.
        strategy: what it was given.
        variance: of the gradient of one run of 4 samples, summed over parameters.
        cost: floating-point operations of value and gradient, relative to the cheapest candidate.
        score: variance times cost; the smallest wins.
    """

    site: str
    strategy: Strategy
    variance: float
    cost: float
    score: float


class Recommendation(NamedTuple):
    """What `vf.strategies.recommend` found.

    Attributes:
        winners: site name -> strategy.
        table: all candidates, by site, the best first.
        refused: (site, strategy) -> why it does not apply.
    """

    winners: dict[str, Strategy]
    table: tuple[Candidate, ...]
    refused: dict[tuple[str, str], str]

    def __str__(self) -> str:
        rows = [f"{'site':<12} {'strategy':<28} {'variance':>10} {'cost':>6} {'product':>10}"]
        for row in self.table:
            mark = " <-" if self.winners[row.site] is row.strategy else ""
            rows.append(
                f"{row.site:<12} {row.strategy!r:<28} {row.variance:>10.3g} {row.cost:>6.2f} "
                f"{row.score:>10.3g}{mark}"
            )
        return "\n".join(rows)


def recommend(
    objective: Callable[..., Any],
    key: PRNGKeyArray,
    *args: Any,
    sites: list[str] | None = None,
    num_draws: int = 1000,
) -> Recommendation:
    """Measure variance x cost of every admissible strategy at every discrete or chosen site.

    Sites are varied one at a time, the others keeping the strategy that the program gives them.
    Each run averages 4 samples, of which the baseline "loo" is made; learned baselines are not among
    the candidates.

    Args:
        objective: the objective program.
        key: PRNG key.
        *args: its arguments; the gradient is that of the trainable leaves of the first.
        sites: names of the sites to vary; all by default.
        num_draws: runs from which a variance is estimated.

    Returns:
        A `Recommendation`; `print` shows its table.

    Raises:
        ProgramError: for a name that is no site.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t):
        ...     return 2.0 * vf.sample("b", dist.Bernoulli(probs=t), vf.reinforce())
        >>> found = vf.strategies.recommend(objective, jax.random.key(0), jax.numpy.array(0.3))
        >>> found.winners["b"]
        enum()
    """
    met: dict[str, None] = {}
    with override(lambda name, strategy: met.setdefault(name) or strategy):
        jax.eval_shape(lambda key: expect(objective, _SAMPLES)(key, *args), key)
    unknown = set(sites or ()) - set(met)
    if unknown:
        raise ProgramError(f"{sorted(unknown)} are no sites of the program; it has {sorted(met)}.")
    candidates = [
        reparam(),
        implicit(),
        enum(),
        measure_valued(),
        disarm(),
        rao_blackwell(1),
        reinforce(),
        reinforce(baseline="loo"),
    ]
    rows, refused = [], {}
    for site in sites or met:
        for strategy in candidates:
            with override(
                lambda name, given, site=site, strategy=strategy: (
                    strategy if name == site else given
                )
            ):
                try:
                    rows.append((site, strategy, *_measure(objective, key, args, num_draws)))
                except ProgramError as error:
                    refused[site, repr(strategy)] = str(error)
    cheapest = min((flops for *_, flops in rows), default=1.0)
    costs = [flops / cheapest for *_, flops in rows]
    table = [
        Candidate(site, strategy, variance, cost, variance * cost)
        for (site, strategy, variance, _), cost in zip(rows, costs, strict=True)
    ]
    table.sort(key=lambda row: (row.site, row.score, row.cost))
    winners: dict[str, Strategy] = {}
    for row in table:
        winners.setdefault(row.site, row.strategy)
    return Recommendation(winners, tuple(table), refused)


def _measure(objective: Callable, key: PRNGKeyArray, args: tuple, num_draws: int) -> tuple:
    gradient = value_and_grad(expect(objective, _SAMPLES))

    def flat(key):
        return jnp.concatenate(
            [jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient(key, *args)[1])]
        )

    keys = jax.random.split(key, num_draws)
    compiled = jax.jit(jax.vmap(flat)).lower(keys).compile()
    draws = np.asarray(compiled(keys))
    flops = float((compiled.cost_analysis() or {})["flops"])
    # Rounding is no variance: candidates that are exact tie, and the cheaper one wins.
    variance = float(draws.var(axis=0).sum())
    return (0.0 if variance < 1e-10 * float((draws**2).mean(axis=0).sum()) else variance), flops
