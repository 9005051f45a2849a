"""Inner algorithms: weighted values of the sites of a program that are not given."""

import abc
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import ProgramError
from vflow.programs._frame import Frame, Recorder, current_frame
from vflow.programs._program import Program, draw, score
from vflow.programs._vmap import vmap

_MOST_JOINT_VALUES = 100_000


class Particles(NamedTuple):
    """Weighted values of the sites that are not given.

    Attributes:
        values: site name -> (n, *shape).
        weights: (n,), normalised.
        log_evidence: log of an unbiased estimate of the density of what is given; shape ().
    """

    values: dict[str, Any]
    weights: Array
    log_evidence: Array


class Algorithm(eqx.Module):
    """How a program is conditioned: properly weighted values of the sites not given."""

    @abc.abstractmethod
    def particles(
        self,
        program: Program,
        args: tuple,
        given: dict[str, Any],
        first: dict[str, Any] | None = None,
    ) -> Particles:
        r"""Weighted values, with $\mathbb{E}\, e^{\mathrm{log\_evidence}} = p(\mathrm{given})$.

        With `first`, values that were drawn together with `given`, they are the first particle, and
        $\mathbb{E}\, e^{-\mathrm{log\_evidence}} = 1/p(\mathrm{given})$ instead.
        """


class Importance(Algorithm):
    """See `importance`."""

    n: int = eqx.field(static=True)
    proposal: Any = None

    def particles(
        self,
        program: Program,
        args: tuple,
        given: dict[str, Any],
        first: dict[str, Any] | None = None,
    ) -> Particles:
        """Independent draws from the proposal, or from the program's own conditionals."""
        fresh = self.n if first is None else self.n - 1
        proposal = self.proposal
        if proposal is not None and not hasattr(proposal, "simulate"):
            proposal = proposal(given)

        def one() -> Any:
            if proposal is None:
                frame = current_frame("vf.importance")
                values, totals = draw(program, args, frame, Recorder(dict(given)))
                log_weight = totals.get("log_given", jnp.zeros(()))
                return {k: v for k, v in values.items() if k not in given}, log_weight
            values, log_r = proposal.simulate(gradient="total")
            return values, score(program, args, {**given, **values})[0] - log_r

        parts = [vmap(one, fresh)] if fresh else []
        if first is not None:
            log_joint = score(program, args, {**given, **first})[0]
            drawn = set(first)
            if proposal is None:
                log_r = score(program, args, {**given, **first}, drawn)[0]
            else:
                log_r = proposal.log_prob(first)
            parts.insert(
                0, jax.tree.map(lambda x: jnp.asarray(x)[None], (first, log_joint - log_r))
            )
        values, log_w = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        return Particles(values, jax.nn.softmax(log_w), jax.nn.logsumexp(log_w) - math.log(self.n))


class ExactEnumeration(Algorithm):
    """See `exact_enumeration`."""

    def particles(
        self,
        program: Program,
        args: tuple,
        given: dict[str, Any],
        first: dict[str, Any] | None = None,
    ) -> Particles:
        """Every joint value of the sites that are not given."""
        supports = _supports(program, args, given)
        sizes = [len(support) for support in supports.values()]
        if math.prod(sizes) > _MOST_JOINT_VALUES:
            raise ProgramError(
                f"exact_enumeration() would visit {math.prod(sizes)} joint values of the sites "
                f"{sorted(supports)}: use vf.importance(n)."
            )
        grid = list(itertools.product(*[range(size) for size in sizes]))
        picks = jnp.asarray(grid, int).reshape(len(grid), len(sizes))
        values = {k: support[picks[:, i]] for i, (k, support) in enumerate(supports.items())}
        log_w = jax.vmap(lambda values: score(program, args, {**given, **values})[0])(values)
        return Particles(values, jax.nn.softmax(log_w), jax.nn.logsumexp(log_w))


def _supports(program: Program, args: tuple, given: dict[str, Any]) -> dict[str, Array]:
    """The supports of the sites that are not given, found by an abstract run."""
    found = {}

    def note(site):
        value = jnp.asarray(site.draw_detached())
        if site.looped or value.size > 1:
            raise site.error(
                "exact_enumeration() takes single choices outside loops, this one has shape "
                f"{value.shape}{' in a loop' if site.looped else ''}: use vf.importance(n)."
            )
        with jax.ensure_compile_time_eval():
            found[site.name] = site.view.support(jnp.zeros(value.shape, value.dtype))
        return value

    def run(key):
        recorder = Recorder(dict(given), note=note)
        values, _ = draw(program, args, Frame(key, recorder=recorder), recorder)
        return values

    jax.eval_shape(run, jax.random.key(0))
    return found


class Smc(Algorithm):
    """See `smc`."""

    n: int = eqx.field(static=True)

    def particles(
        self,
        program: Program,
        args: tuple,
        given: dict[str, Any],
        first: dict[str, Any] | None = None,
    ) -> Particles:
        """Particles that are resampled after every group of given sites."""
        frame = current_frame("vf.smc")
        fresh = self.n if first is None else self.n - 1
        if fresh == 0:
            raise ProgramError("vf.smc(n) as the inner algorithm of a guide needs n >= 2.")
        retained = None if first is None else _by_site(program, args, {**given, **first})
        fixed: dict[str, Any] = {}
        groups, log_evidence, step = None, jnp.zeros(()), 0
        while groups is None or step < len(groups):
            order: list[str] = []

            def one(fixed, order=order):
                recorder = Recorder({**given, **fixed}, by_site=True, order=order)
                values, totals = draw(program, args, current_frame("vf.smc"), recorder)
                return {k: v for k, v in values.items() if k not in given}, totals

            inner = jax.tree.map(lambda x: x[self.n - fresh :], fixed)
            values, totals = vmap(one if fixed else lambda: one({}), fresh, inner or None)
            if groups is None:
                groups = _groups(order, values)
            if first is not None:
                values = {
                    k: jnp.concatenate([jnp.asarray(first[k])[None], v]) for k, v in values.items()
                }
            before, scored = groups[step]
            log_w = jnp.zeros((self.n,))
            for name in scored:
                part = totals[f"log_given/{name}"]
                if retained is not None:
                    part = jnp.concatenate([retained[f"log_given/{name}"][None], part])
                log_w = log_w + part
            log_evidence = log_evidence + jax.nn.logsumexp(log_w) - math.log(self.n)
            step += 1
            if step < len(groups):
                key = frame.key_for(None, "resample")
                ancestors = jax.random.categorical(
                    key, jax.lax.stop_gradient(log_w), shape=(fresh,)
                )
                # The choice of ancestors depends on the parameters: credit it by its score.
                frame.add("score", jnp.sum(jax.nn.log_softmax(log_w)[ancestors]))
                if first is not None:
                    ancestors = jnp.concatenate([jnp.zeros((1,), ancestors.dtype), ancestors])
                fixed = {k: values[k][ancestors] for k in before}
        return Particles(values, jax.nn.softmax(log_w), log_evidence)


def _by_site(program: Program, args: tuple, values: dict[str, Any]) -> dict[str, Any]:
    frame = Frame(None)
    return draw(program, args, frame, Recorder(values, by_site=True))[1]


def _groups(order: list[str], drawn: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """(sites drawn before, given sites) for each run of given sites in program order."""
    groups, before, scored = [], [], []
    for name in order:
        if name in drawn:
            if scored:
                groups.append((list(before), scored))
                scored = []
            before.append(name)
        else:
            scored.append(name)
    groups.append((before, scored))
    return groups


def importance(n: int, proposal: Any | Callable[[dict], Any] | None = None) -> Algorithm:
    r"""Importance sampling with n particles, $\hat p = \frac1n \sum_i p(x, u_i) / r(u_i \mid x)$.

    Args:
        n: number of particles.
        proposal: a program of the sites that are not given, or a function from the given values to
            one; None draws them from the program itself.

    Example:
        >>> import vflow as vf
        >>> algorithm = vf.importance(5)
    """
    return Importance(_positive("importance", n), proposal)


def exact_enumeration() -> Algorithm:
    """The exact sum over all joint values of the sites that are not given, all discrete.

    Example:
        >>> import vflow as vf
        >>> algorithm = vf.exact_enumeration()
    """
    return ExactEnumeration()


def smc(n: int) -> Algorithm:
    """Sequential Monte Carlo: n particles, resampled after each group of given sites.

    The program is run once for each group, earlier choices being replayed. Sites inside one
    `vf.scan` or `vf.vmap` are one step.

    Args:
        n: number of particles.

    Example:
        >>> import vflow as vf
        >>> algorithm = vf.smc(10)

    Source: Andrieu, Doucet and Holenstein, Particle MCMC (2010), for the conditional sweep.
    """
    return Smc(_positive("smc", n))


def _positive(name: str, n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"vf.{name}: n must be a positive integer, got {n!r}.")
    return n
