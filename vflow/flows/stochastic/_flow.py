"""The variational family made of stochastic layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Frozen, ProgramError, stop_gradient
from vflow._core._numerics import as_float
from vflow.bijections import AbstractBijection
from vflow.distributions import AbstractDistribution
from vflow.flows.stochastic._langevin import ControlledLangevin, Langevin
from vflow.flows.stochastic._metropolis import AbstractMetropolis
from vflow.flows.stochastic._segment import Segment
from vflow.flows.stochastic._transition import AbstractTransition, LogDensity, Tempered, noise
from vflow.programs._frame import Frame, current_frame
from vflow.programs._linearity import tag
from vflow.programs._site import no_derivative

_NO_DENSITY = (
    "a stochastic flow has no log density at a point, only an unbiased estimate of the density: use "
    "q.estimate_log_q(key, y, log_density)."
)
_NO_PATH = (
    "a stochastic flow has no path gradient and no DReG: both need the score of q at a point. Use "
    "gradient='total'"
)

_NOT_ALONG = (
    "layer {}, whose derivative along the draw is not its gradient (reparameterised = False), was "
    "differentiated: train the bijections before it with vf.objectives.craft."
)


class Trajectory(NamedTuple):
    """A path through the layers.

    Attributes:
        positions: before the first layer and after each, shape (layers + 1, *shape).
        increments: dS of each layer, shape (layers,).
        log_base: log density of the base at the first position.
    """

    positions: Array
    increments: Array
    log_base: Array


class StochasticFlow(eqx.Module):
    r"""A base distribution followed by deterministic and stochastic layers.

    $$\log\hat q = \log q_0(x_0) - \sum_k \Delta S_k, \qquad
    \mathbb{E}\,[1/\hat q \mid x_K] = 1/q(x_K), \quad \mathbb{E}\,[p(x_K)/\hat q] = Z$$

    whether trained or not. Layers with a temperature $\lambda$ move towards
    $(1-\lambda)\log q_0 + \lambda\log p$; the family depends on the target, which is an argument of
    every method, never a field. `vf.flows.stochastic_flow` builds one.

    What needs $\log q$ at a point of its choice (`log_prob`, path gradients, DReG) is not defined and raises.
    A draw at which a layer is not finite counts with weight zero ($\log\hat q = \infty$): the target
    must be finite and differentiable on all of $R^d$ for $\mathbb{E}[w] = Z$.

    Args:
        base: distribution of $x_0$.
        segments: the layers, grouped.
        logits: of the temperatures, one per tempered layer; `Frozen` if they are not trained.
        temperatures: per layer, its fixed temperature (0 or 1), None for a trained one, and "none"
            for a layer without.
        outer: a bijection behind it all, or None: the layers then see the target pulled back.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> S = vf.flows.stochastic
        >>> blocks = [S.Langevin(num_steps=5, step_size=0.1)]
        >>> snf = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks)
        >>> log_density = lambda x: -0.5 * jnp.sum(x**2)
        >>> x, log_q = vf.sample_and_log_prob(
        ...     jax.random.key(1), snf, 1000, log_density=log_density
        ... )
        >>> log_w = jax.vmap(log_density)(x) - log_q
        >>> print(f"{float(vf.diagnostics.log_evidence(log_w)):.1f}")
        1.8

    Source:
        Wu, Koehler & Noe 2020, Stochastic Normalizing Flows (arXiv 2002.06707), equations 6 to 12.
    """

    base: AbstractDistribution
    segments: tuple[Segment, ...]
    logits: Array | Frozen
    temperatures: tuple[float | str | None, ...] = eqx.field(static=True)
    outer: AbstractBijection | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The event shape."""
        return self.base.shape

    @property
    def condition_shape(self) -> None:
        """None: a stochastic flow takes no condition."""
        return None

    @property
    def layers(self) -> list[AbstractTransition]:
        """The layers one by one, in order."""
        return [layer for segment in self.segments for layer in segment.unstacked()]

    @property
    def schedule(self) -> Array:
        """The temperature of each layer; that of the layer before for one without; (layers,)."""
        kinds = [kind for kind in self.temperatures if kind != "none"]
        tempered = np.array([kind != "none" for kind in self.temperatures])
        logits = self.logits.value if isinstance(self.logits, Frozen) else self.logits
        if not kinds:
            return jnp.zeros_like(logits, shape=tempered.shape)
        fixed = np.array([kind is not None for kind in kinds])
        given = np.array([0.0 if kind is None else float(kind) for kind in kinds])
        found = jnp.where(fixed, given.astype(logits.dtype), jax.nn.sigmoid(logits))
        if tempered.all():
            return found
        latest = np.cumsum(tempered)  # tempered layers so far; the base is at zero
        return jnp.concatenate([jnp.zeros_like(found[:1]), found])[latest]

    def through(self, bijection: AbstractBijection) -> "StochasticFlow":
        """The family behind one more bijection, in whose coordinates the layers stay."""
        from vflow.bijections import Chain

        outer = bijection if self.outer is None else Chain([self.outer, bijection])
        return StochasticFlow(self.base, self.segments, self.logits, self.temperatures, outer)

    def sample_and_log_prob(
        self,
        key: PRNGKeyArray,
        condition: None = None,
        gradient: str = "total",
        log_density: LogDensity | None = None,
    ) -> tuple[Array, Array]:
        r"""One draw and $\log\hat q$, differentiable as far as the layers are.

        Args:
            key: PRNG key.
            condition: must be None.
            gradient: "total".
            log_density: the target, unnormalised.

        Returns:
            `(x, log_q)`: shapes `shape` and `()`.

        Raises:
            ValueError: no log density, or a condition.
            ProgramError: another gradient, or a derivative that would be biased.
        """
        if condition is not None:
            raise ValueError("StochasticFlow: a condition was given, but it is unconditional.")
        if gradient != "total":
            raise ProgramError(_NO_PATH + ".")
        return self._draw(key, _wanted(log_density), None)[:2]

    def sample(
        self,
        key: PRNGKeyArray,
        condition: None = None,
        log_density: LogDensity | None = None,
    ) -> Array:
        """One draw, shape `shape`; arguments as in `sample_and_log_prob`."""
        return self.sample_and_log_prob(key, condition, log_density=log_density)[0]

    def log_prob(self, x: Array, condition: None = None) -> Array:
        """Refused: there is no density at a point, only `estimate_log_q`."""
        raise ProgramError(_NO_DENSITY)

    def path_refusal(self) -> str:
        """Why `gradient="path"` is not defined."""
        return _NO_PATH

    def simulate(
        self,
        *,
        gradient: str | None = None,
        condition: None = None,
        log_density: LogDensity | None = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        r"""One draw and $\log\hat q$ inside an objective program.

        The gradient of the objective is unbiased where the layers' is: always for bijections and
        Langevin layers, with `grad="score"` for those with an accept/reject step; what would be
        biased raises.

        Args:
            gradient: "total"; None is the default of the running objective.
            condition: must be None.
            log_density: the target; built-in objectives pass it.
            name: the site's name, from which its key is folded; None numbers it.

        Returns:
            `(x, log_q)`: shapes `shape` and `()`.

        Raises:
            ProgramError: outside an objective program, no log density, a path gradient.
        """
        frame = current_frame("StochasticFlow.simulate")
        if condition is not None:
            raise ProgramError("a stochastic flow takes no condition.")
        if frame.gradient_of(gradient) != "total":
            raise ProgramError(_NO_PATH + ".")
        if log_density is None:
            raise ProgramError(
                "a stochastic flow depends on the target: q.simulate(log_density=log_density)."
            )
        run = frame.run.path
        if run is not None and run.kind in ("stop", "move"):
            raise ProgramError(
                "a stochastic flow beside a path gradient in an objective that is not linear in log "
                "q has no rule: use gradient='total' throughout."
            )
        name = frame.label("simulate") if name is None else name
        key = frame.key_for(name, "simulate")
        x, log_q, log_prob = self._draw(key, log_density, _Choices(frame, name))
        if any(
            getattr(layer, "grad", None) == "score" for s in self.segments for layer in s.layers
        ):
            frame.add("score", log_prob)
            if frame.run.num_samples > 1:
                frame.add("loo", log_prob)
        if run is not None and run.kind == "trace":
            label = frame.scope + name
            return tag("value", label, x), tag("draw", label, log_q)
        return x, log_q

    def estimate_log_q(
        self, key: PRNGKeyArray, y: Array, log_density: LogDensity, num_paths: int = 1
    ) -> Array:
        r"""The log of an unbiased estimate of the density at a point, by reversed paths.

        $\hat q(y) = \frac1M \sum_m q_0(x_0^m) \exp(\sum_k \Delta S^m_k)$ with increments of the
        reversed steps, $\mathbb{E}[\hat q(y)] = q(y)$; its logarithm is low on average. Where steps are
        coarse for the target's tails, the estimate has tails of its own that its standard error does
        not show: look at both directions.

        Args:
            key: PRNG key.
            y: a point, shape `shape`.
            log_density: the target, unnormalised.
            num_paths: M.

        Returns:
            In nats, shape `()`.

        Raises:
            ValueError: a wrong shape, or num_paths not positive.
        """
        y = as_float(y)
        if y.shape != self.shape:
            raise ValueError(
                f"estimate_log_q: y has shape {y.shape}, the event shape is {self.shape}; use "
                "jax.vmap for a batch."
            )
        if isinstance(num_paths, bool) or not isinstance(num_paths, int) or num_paths < 1:
            raise ValueError(f"num_paths must be a positive integer, got {num_paths!r}.")
        target, log_det = _wanted(log_density), jnp.zeros_like(y, shape=())
        if self.outer is not None:
            y, log_det = self.outer.inverse_and_log_det(y)
            target = _pulled_back(target, self.outer)
        one = lambda key: self._reversed(key, y, target)
        if num_paths == 1:
            return one(key) + log_det
        values = jax.vmap(one)(jax.random.split(key, num_paths))
        return jax.nn.logsumexp(values) - jnp.log(num_paths) + log_det

    def trajectory(self, key: PRNGKeyArray, log_density: LogDensity) -> Trajectory:
        """A path with all positions, in the coordinates of the layers (before `outer`).

        Args:
            key: PRNG key; the path is that of `sample_and_log_prob`.
            log_density: the target, unnormalised.
        """
        target = _wanted(log_density)
        target = target if self.outer is None else _pulled_back(target, self.outer)
        x, log_base, keys = self._start(key)
        _, (positions, increments) = self._thread(x, keys, target, None)
        return Trajectory(jnp.concatenate([x[None], positions]), increments, log_base)

    def simulate_trajectory(
        self, *, log_density: LogDensity, fixed: bool = False, name: str | None = None
    ) -> Trajectory:
        """`trajectory` inside an objective program, for objectives that train on given paths.

        Args:
            log_density: the target, unnormalised.
            fixed: whether the increments and the base keep their derivatives at the given path,
                as the log ratio of the two path densities; no derivative at all otherwise.
            name: the site's name, from which its key is folded; None numbers it.

        Raises:
            ProgramError: `fixed` with layers other than Langevin ones: the law of a path through a
                bijection or a leapfrog step has no density that their parameters could change.
        """
        frame = current_frame("StochasticFlow.simulate_trajectory")
        name = frame.label("simulate") if name is None else name
        key = frame.key_for(name, "simulate")
        if not fixed:
            return jax.lax.stop_gradient(stop_gradient(self).trajectory(key, log_density))
        kinds = {type(layer) for segment in self.segments for layer in segment.layers}
        other = kinds - {Langevin, ControlledLangevin}
        if other:
            raise ProgramError(
                "a path has a density that parameters change at fixed positions for Langevin and "
                f"ControlledLangevin only; here is {sorted(kind.__name__ for kind in other)}: use "
                "vf.objectives.elbo()."
            )
        outer = stop_gradient(self.outer)
        target = log_density if outer is None else _pulled_back(log_density, outer)
        x, _, keys = self._start(key)
        x = jax.lax.stop_gradient(x)
        _, (positions, increments) = self._thread(x, keys, target, None, fixed=True)
        return Trajectory(jnp.concatenate([x[None], positions]), increments, self.base.log_prob(x))

    def stage(self, position: int, log_density: LogDensity) -> LogDensity:
        """The log density that paths are heading for after `position` layers.

        That of the layer, or of the next one with a temperature; the target itself after all layers.
        Temperatures and base are constants in it.
        """
        target = log_density if self.outer is None else _pulled_back(log_density, self.outer)
        if position == len(self.temperatures):
            return target
        return self._stage(self.stages[position], target)

    @property
    def stages(self) -> Array:
        """The temperatures of `stage`, shape (layers + 1,): 0 before the first layer."""
        tempered = np.array([kind != "none" for kind in self.temperatures])
        ahead = np.cumsum(tempered) - tempered  # tempered layers before each
        found = self.schedule[np.flatnonzero(tempered)]
        found = jnp.concatenate([found, jnp.ones_like(self.schedule[:1])])[ahead]
        return jax.lax.stop_gradient(jnp.concatenate([jnp.zeros_like(found[:1]), found]))

    def _stage(self, temperature: Array, target: LogDensity) -> LogDensity:
        base = stop_gradient(self.base).log_prob
        return Tempered(base, target, temperature, temperature)

    def _start(self, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        keys = jax.random.split(key, 1 + len(self.temperatures))
        x, log_base = self.base.sample_and_log_prob(keys[0])
        return x, log_base, keys[1:]

    def _draw(
        self, key: PRNGKeyArray, target: LogDensity, choices: "_Choices | None"
    ) -> tuple[Array, Array, Array]:
        pulled = target if self.outer is None else _pulled_back(target, self.outer)
        first, log_base, keys = self._start(key)
        (x, total, log_prob), _ = self._thread(first, keys, pulled, choices)
        log_q = log_base - total
        finite = jnp.isfinite(log_q) & jnp.all(jnp.isfinite(x))
        x = jnp.where(finite, x, jax.lax.stop_gradient(first))
        log_q = jnp.where(finite, log_q, jnp.inf)
        if self.outer is not None:
            x, log_det = self.outer.forward_and_log_det(x)
            log_q = log_q - log_det
        return x, log_q, log_prob

    def _thread(
        self,
        x: Array,
        keys: Array,
        target: LogDensity,
        choices: "_Choices | None",
        *,
        fixed: bool = False,
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        """All layers: ((end, sum of dS, log prob of decisions), (positions, increments))."""
        number = iter(range(len(self.segments)))

        def step(layer, cancels, carry, inputs):
            x, total, log_prob = carry
            key, start, stop = inputs
            density = self._density(layer, target, start, stop, cancels=cancels)
            if isinstance(layer, AbstractMetropolis):
                decide = None if choices is None else choices.of(layer, here)
                y, dS, scores = layer.advance(
                    key, x, density, cancels=cancels, scored=choices is not None, decide=decide
                )
                if decide is None or choices is None:
                    log_prob = log_prob + scores
                else:
                    choices.weigh(scores)
            elif fixed:
                eps = noise(key, layer.num_steps, x)
                y, dS, _ = layer.forward_along(eps, x, density, fixed=True)
            else:
                y, dS = layer.forward(key, x, density)
                if not layer.reparameterised:
                    refusal = ProgramError(_NOT_ALONG.format(type(layer).__name__))
                    y, dS = no_derivative(y, refusal), no_derivative(dS, refusal)
            return (y, total + dS, log_prob), (y, dS)

        zero = jnp.zeros_like(x, shape=())
        carry, kept = (x, zero, zero), []
        for segment, inputs in self._inputs(keys, x):
            here = next(number)
            carry, outputs = segment.run(step, carry, inputs, reverse=False)
            kept.append(outputs)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)

    def _reversed(self, key: PRNGKeyArray, y: Array, target: LogDensity) -> Array:
        def step(layer, cancels, carry, inputs):
            y, total = carry
            key, start, stop = inputs
            density = self._density(layer, target, start, stop, cancels=cancels)
            x, dS = layer.reverse(key, y, density)
            return (x, total + dS), jnp.zeros_like(dS)

        keys = jax.random.split(key, len(self.temperatures))
        carry = (y, jnp.zeros_like(y, shape=()))
        for segment, inputs in reversed(list(self._inputs(keys, y))):
            carry, _ = segment.run(step, carry, inputs, reverse=True)
        x, total = carry
        value = self.base.log_prob(x) + total
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def _inputs(self, keys: Array, x: Array):
        """Each segment with the keys and temperatures of its layers."""
        stops = self.schedule.astype(x.dtype)
        starts = jnp.concatenate([jnp.zeros_like(stops[:1]), stops[:-1]])
        first = 0
        for segment in self.segments:
            part = slice(first, first + segment.size)
            yield segment, (keys[part], starts[part], stops[part])
            first += segment.size

    def _density(
        self,
        layer: AbstractTransition,
        target: LogDensity,
        start: Array,
        stop: Array,
        *,
        cancels: bool,
    ) -> Tempered:
        if cancels:
            return Tempered(self.base.log_prob, target, 1.0, 1.0)
        if getattr(layer, "grad", None) == "detach":
            start, stop = jax.lax.stop_gradient((start, stop))
        return Tempered(self.base.log_prob, target, start, stop)


class _Choices:
    """The decisions that are summed over both outcomes, as sites of the running program."""

    def __init__(self, frame: Frame, name: str):
        self.frame, self.name = frame, name

    def of(self, layer: AbstractMetropolis, segment: int) -> Callable | None:
        """What decides in place of chance: the outcome of this lane; None leaves it to chance."""
        if layer.grad != "score" or layer.num_steps > 1 or self.frame.looped:
            return None
        index = self.frame.enum_index(f"{self.name}/decision {segment}", 2)
        return lambda key, log_accept: jnp.asarray(index == 1)

    def weigh(self, log_prob: Array) -> None:
        """The probability of the outcome of this lane."""
        self.frame.add("log_weight", log_prob)


def _pulled_back(log_density: LogDensity, bijection: AbstractBijection) -> LogDensity:
    def pulled(z: Array) -> Array:
        x, log_det = bijection.forward_and_log_det(z)
        return log_density(x) + log_det

    return pulled


def _wanted(log_density: Any) -> Any:
    if not callable(log_density):
        raise ValueError(
            "log_density: a stochastic flow depends on the target: pass its log density, "
            f"log_density=..., got {log_density!r}."
        )
    return log_density
