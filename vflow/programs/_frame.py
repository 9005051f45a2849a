"""The record that a program's random choices find while an objective runs."""

import contextlib
import dataclasses
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vflow._core import ProgramError
from vflow.programs._leak import leak_message
from vflow.programs._linearity import tag

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # jax < 0.10
    from jax.core import get_opaque_trace_state


GRADIENTS = ("total", "path", "auto")


def magic(score: Any) -> Any:
    r"""$e^{s - \mathrm{stop}(s)}$: the value is one, the gradient is that of `score`."""
    return jnp.exp(score - jax.lax.stop_gradient(score))


class NeedsLanes(BaseException):
    """A site needs alternatives and the program runs plainly; `expect` catches it."""


@dataclasses.dataclass
class Plan:
    """Which sites need lanes: found by an abstract pass, read by the real one.

    Attributes:
        stars: full site name -> (alternatives, iterations of the enclosing loops).
        enums: full site name -> size of the support.
    """

    stars: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    enums: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_lanes(self) -> int:
        """The base lane and one for every alternative of every star site."""
        return 1 + sum(size * loops for size, loops in self.stars.values())

    def offset(self, name: str) -> int:
        """The first lane of a star site."""
        start = 1
        for other, (size, loops) in self.stars.items():
            if other == name:
                return start
            start += size * loops
        raise ProgramError(
            f"site {name!r} was not met in the abstract pass: the sites of a program must not "
            "depend on values."
        )


@dataclasses.dataclass
class Run:
    """What all frames of one run of an objective share.

    `plan` is None in a plain run, where a site that wants lanes raises `NeedsLanes`. `lane` is
    None where there is the base lane only. `path` is a `PathRun`, or None where path gradients
    raise `NeedsPath`. `nested` collects the labels of random `vf.expect`s called inside.
    """

    num_samples: int = 1
    plan: Plan | None = None
    discovering: bool = False
    lane: Any = None
    indices: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: Any = None
    nested: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Recorder:
    """Collects the values of a program's sites, and supplies those that are given.

    Attributes:
        given: site name -> value; these sites are scored, the others drawn.
        index: position in the enclosing loops, outermost first.
        used: names of the given sites that were met.
        unit: label of the call of `simulate` that this is; None in other blocks.
        gradient: of that call; but for "total", reparameterised sites are path sites.
        path: names of the sites whose own log density is to carry path gradients only.
        labels: their full names.
        only: the sites whose log density is wanted; None means all.
        by_site: whether the log densities of given sites are kept apart too.
        order: names of the sites, in program order.
        note: draws in place of the strategy of a site, for an abstract run.
        as_model: whether given values drawn from a wider support than the site's are refused.
    """

    given: dict[str, Any]
    index: tuple[Any, ...] = ()
    used: set[str] = dataclasses.field(default_factory=set)
    unit: str | None = None
    gradient: str = "total"
    path: set[str] = dataclasses.field(default_factory=set)
    labels: set[str] = dataclasses.field(default_factory=set)
    only: set[str] | None = None
    by_site: bool = False
    order: list[str] = dataclasses.field(default_factory=list)
    note: Any = None
    as_model: bool = False

    def meet(self, name: str) -> bool:
        """Note a site in program order; whether its log density is wanted."""
        if name not in self.order:
            self.order.append(name)
        return self.only is None or name in self.only

    def value(self, name: str) -> Any:
        """The given value of a site at the current position of the loops."""
        self.used.add(name)
        value = self.given[name]
        for index in self.index:
            value = jax.tree.map(lambda leaf, i=index: leaf[i], value)
        return value


@dataclasses.dataclass(eq=False)
class Frame:
    """One run of an objective, or of a block inside it.

    Attributes:
        key: where the keys of the sites come from; None where nothing may be drawn.
        gradient: what `simulate` defaults to.
        scope: prefix of the full names of the sites.
        run: shared by all frames of the run.
        loop: flattened index and number of iterations of the enclosing random loops.
        looped: whether there is such a loop.
        position: index in each of the enclosing random loops, outermost first.
        sizes: their lengths.
        sequential: which of them are scans.
        totals: running sums, each present only once something was added: `score` (of the sites
            visited so far), `loo`, `ema` (parts of it), `cost`, `control`, `log_weight`,
            `base_weight`, `lane_weight`, `fit_linear`, `fit_square`; and of programs being recorded
            `log_drawn`, `log_given` and `log_given/<site>`.
        records: values of the sites, where there is a recorder.
        exports: what the path rule keeps aside, by full name.
        plates: the random subsamples of NumPyro plates, by name.
        supports: id of a drawn value -> (the value, the support it was drawn from).
    """

    key: PRNGKeyArray | None
    gradient: str = "total"
    scope: str = ""
    run: Run = dataclasses.field(default_factory=Run)
    loop: tuple[Any, int] = (0, 1)
    looped: bool = False
    position: tuple[Any, ...] = ()
    sizes: tuple[int, ...] = ()
    sequential: tuple[bool, ...] = ()
    recorder: Recorder | None = None
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    totals: dict[str, Any] = dataclasses.field(default_factory=dict)
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    exports: dict[str, Any] = dataclasses.field(default_factory=dict)
    plates: dict[str, Any] = dataclasses.field(default_factory=dict)
    supports: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    trace_state: Any = dataclasses.field(default_factory=get_opaque_trace_state)

    def check_trace(self, name: str) -> None:
        """A site inside a raw JAX transformation would be frozen or lose its score: refuse it."""
        if get_opaque_trace_state() != self.trace_state:
            raise ProgramError(leak_message(name))

    def gradient_of(self, gradient: str | None) -> str:
        """What a `simulate` call is to use: its own wish, or what the objective was given."""
        gradient = self.gradient if gradient is None else gradient
        if gradient not in GRADIENTS:
            raise ProgramError(f"gradient must be one of {GRADIENTS}, got {gradient!r}.")
        return gradient

    def label(self, kind: str) -> str:
        """A name for an unnamed block: numbered in program order."""
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return f"{kind} #{number}"

    def key_for(self, name: str | None, kind: str) -> PRNGKeyArray:
        """A key folded from the site's name; unnamed ones are numbered in program order."""
        if name is None:
            name = self.label(kind)
        self.check_trace(name)
        if self.key is None:
            raise ProgramError(
                f"site {name!r} wants to draw where only given values are scored: it has no value."
            )
        full = self.scope + name
        code = zlib.crc32(full.encode())
        if code in self.names:
            other = self.names[code]
            if other == full:
                raise ProgramError(f"two sites are named {name!r}: rename one of them.")
            raise ProgramError(
                f"site {full!r} would share its noise with site {other!r} (equal hash): "
                "rename one of them."
            )
        self.names[code] = full
        return jax.random.fold_in(self.key, code)

    def add(self, total: str, value: Any) -> None:
        """Add to a running sum."""
        self.totals[total] = self.totals[total] + value if total in self.totals else value

    def add_cost(self, value: Any) -> None:
        """A cost depends on the sites visited so far only: multiply by their score."""
        if "score" in self.totals:
            value = value * self._box(self.totals["score"])
        self.add("cost", value)

    def _box(self, score: Any) -> Any:
        """`magic`, known as such where the program is analysed."""
        traced = getattr(self.run.path, "kind", None) == "trace"
        return tag("score", "-", magic(score)) if traced else magic(score)

    def add_given(self, name: str, log_prob: Any) -> None:
        """Count the log density of a given or observed site."""
        if self.recorder is not None and self.recorder.meet(name):
            self.add("log_given", log_prob)
            if self.recorder.by_site:
                self.add(f"log_given/{name}", log_prob)

    def record(self, name: str, value: Any) -> None:
        """Keep the value of a site for the recorder, if there is one."""
        if self.recorder is None:
            return
        if name in self.records:
            raise ProgramError(f"two sites are named {name!r}: rename one of them.")
        self.records[name] = value

    def child(
        self,
        block: str,
        key: PRNGKeyArray | None,
        step: tuple[Any, int] | None = None,
        *,
        sequential: bool = False,
    ) -> "Frame":
        """The frame of a block; `step` is the index and length of a random loop."""
        loop, recorder = self.loop, self.recorder
        position, sizes, kinds = self.position, self.sizes, self.sequential
        if step is not None:
            loop = (loop[0] * step[1] + step[0], loop[1] * step[1])
            position, sizes = (*position, step[0]), (*sizes, step[1])
            kinds = (*kinds, sequential)
            if recorder is not None:
                recorder = dataclasses.replace(recorder, index=(*recorder.index, step[0]))
        return Frame(
            key,
            self.gradient,
            f"{self.scope}{block}/",
            self.run,
            loop,
            self.looped or step is not None,
            position,
            sizes,
            kinds,
            recorder,
        )

    def absorb(
        self, totals: dict[str, Any], records: dict[str, Any], *, sequential: bool = False
    ) -> None:
        """Take over what blocks have summed up; stacked along a leading axis for loops.

        In a sequential loop a cost depends on the sites of the earlier iterations too.
        """
        totals = dict(totals)
        cost = totals.pop("cost", None)
        if cost is not None:
            if sequential and "score" in totals:
                cost = cost * self._box(jnp.cumsum(totals["score"]) - totals["score"])
            self.add_cost(jnp.sum(cost))
        for name, value in totals.items():
            self.add(name, jnp.sum(value))
        for name, value in records.items():
            self.record(name, value)

    def star(self, name: str, size: int) -> tuple[Any, Any] | None:
        """The place of a site with `size` alternatives on the shared axis of lanes.

        Returns:
            (the alternative of this lane, whether this lane is one of the site's), or None in the
            abstract pass.
        """
        run, full = self.run, self.scope + name
        if run.plan is None:
            raise NeedsLanes
        if run.discovering:
            run.plan.stars[full] = (size, self.loop[1])
            return None
        local = run.lane - (run.plan.offset(full) + size * self.loop[0])
        return jnp.clip(local, 0, size - 1), (local >= 0) & (local < size)

    def enum_index(self, name: str, size: int) -> Any:
        """The position in the support of an enumerated site; 0 in the abstract pass."""
        run, full = self.run, self.scope + name
        if run.plan is None:
            raise NeedsLanes
        if run.discovering:
            run.plan.enums[full] = size
            return 0
        if full not in run.indices:
            raise ProgramError(f"site {name!r} was not met in the abstract pass.")
        return run.indices[full]


@dataclasses.dataclass
class Mixing:
    """The coefficient of `gradient="auto"`, given from outside.

    Attributes:
        share: of the path gradient; the rest is the total one. It must not depend on the draws.
        used: whether an estimate asked for it.
    """

    share: Any
    used: bool = False


class _Stack(threading.local):
    def __init__(self):
        self.frames: list[Frame] = []
        self.override: Callable[[str, Any], Any] | None = None
        self.mixing: Mixing | None = None
        self.placing: Callable[[Any], Any] | None = None


_STACK = _Stack()


def current_frame(what: str) -> Frame:
    """The innermost running frame; `what` names the caller in the error."""
    if not _STACK.frames:
        raise ProgramError(
            f"{what} was called outside an objective program: wrap the objective, "
            "`vf.expect(objective)(key, ...)`, or draw directly with "
            "`vf.sample_and_log_prob(key, ...)`."
        )
    return _STACK.frames[-1]


def enclosing_run() -> Run | None:
    """The run of the objective that is being evaluated, if one is."""
    return _STACK.frames[-1].run if _STACK.frames else None


def support_of(value: Any) -> Any:
    """The support that a value, unchanged, was drawn from in a running program; None if unknown."""
    for frame in reversed(_STACK.frames):
        if id(value) in frame.supports:
            return frame.supports[id(value)][1]
    return None


def plate_indices(name: str, size: int, count: int) -> Any:
    """A random subsample of a plate, the same for guide and model; None outside an objective."""
    state, owner = get_opaque_trace_state(), None
    for frame in reversed(_STACK.frames):
        if frame.trace_state != state:
            break
        owner = frame if frame.key is not None else owner
    if owner is None:
        return None
    if name not in owner.plates:
        key = owner.key_for(f"plate {name}", "plate")
        owner.plates[name] = jax.random.choice(key, size, (count,), replace=False)
    return owner.plates[name]


@contextlib.contextmanager
def override(choose: Callable[[str, Any], Any]) -> Iterator[None]:
    """Let `choose(name, strategy)` replace the strategies of sites while the block runs."""
    previous, _STACK.override = _STACK.override, choose
    try:
        yield
    finally:
        _STACK.override = previous


@contextlib.contextmanager
def placing(place: Callable[[Any], Any] | None) -> Iterator[None]:
    """Let `place` say, while the block runs, on which devices the keys of the samples live."""
    previous, _STACK.placing = _STACK.placing, place
    try:
        yield
    finally:
        _STACK.placing = previous


def placed(keys: Any) -> Any:
    """The keys of the samples of an estimate, spread over devices where that is asked for."""
    return keys if _STACK.placing is None else _STACK.placing(keys)


@contextlib.contextmanager
def mixing(share: Any) -> Iterator[Mixing]:
    """Let estimates with `gradient="auto"` use this coefficient while the block runs."""
    previous, _STACK.mixing = _STACK.mixing, Mixing(share)
    try:
        yield _STACK.mixing
    finally:
        _STACK.mixing = previous


def current_mixing() -> Mixing | None:
    """What `mixing` has set."""
    return _STACK.mixing


def strategy_of(name: str, strategy: Any) -> Any:
    """The strategy of a site, unless it is overridden."""
    return strategy if _STACK.override is None else _STACK.override(name, strategy)


@contextlib.contextmanager
def running(frame: Frame) -> Iterator[Frame]:
    """Make `frame` the innermost one while the block runs."""
    _STACK.frames.append(frame)
    try:
        yield frame
    finally:
        _STACK.frames.pop()
