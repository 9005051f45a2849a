"""Layers with an accept/reject step: random walk, MALA and HMC."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import ProgramError, stop_gradient
from vflow.flows.stochastic._transition import (
    AbstractTransition,
    LogDensity,
    check_steps,
    log_of,
    square,
)
from vflow.flows.stochastic._underdamped import leapfrog
from vflow.programs._site import no_derivative

GRADS = ("detach", "score", "straight_through")

_CUT = (
    'a layer with an accept/reject step and grad="detach" was differentiated: it passes no '
    "derivative on, and the gradient of what comes before it (trainable layers, the base, the "
    'model\'s own parameters) would be biased. Use grad="score", which is unbiased; '
    "vf.objectives.craft, whose gradients stop there by design; or put the layer last, where it "
    "cancels out of the weight."
)
_SCORE = (
    'a layer with grad="score" was differentiated outside an objective program, where the score of '
    "its decisions is lost: use q.simulate() inside vf.expect(objective)."
)
# Decides on a proposal: (key, log acceptance probability) -> whether it is taken.
Decide = Callable[[PRNGKeyArray, Array], Array]


class AbstractMetropolis(AbstractTransition):
    r"""Steps of a Markov chain that is reversible with respect to $p_\lambda$, by accept/reject.

    Both kernels are the same, and $\Delta S = \log p_\lambda(x) - \log p_\lambda(y)$. The decisions are
    discrete choices, so that the derivative along the draw is not the gradient; `grad` says what
    happens instead:

    * "detach": nothing is differentiated. Where something trainable comes before the layer, a
      derivative raises, unless the layer cancels out of the weight: at the end of the flow, at the
      target's own temperature. Its own step size is not trained.
    * "score": the decisions get the score function, with the mean over the other samples of
      `vf.expect` as baseline; a single step is summed over both outcomes instead. Unbiased, at about ten
      times the standard deviation for 20 steps. Only inside objective programs.
    * "straight_through": the derivative along the draw with the decisions as constants. Biased: by 20
      to 29 % on the step size and up to 26 % on the scale of a flow before the layer, in one
      dimension.

    A subclass is final and implements `look` and `propose`.
    """

    log_step: eqx.AbstractVar[Array]
    num_steps: eqx.AbstractVar[int]
    grad: eqx.AbstractVar[str]

    @abc.abstractmethod
    def look(self, x: Array, log_density: LogDensity) -> tuple[Array, ...]:
        """The log density at `x`, and what else `propose` needs there."""

    @abc.abstractmethod
    def propose(
        self, key: PRNGKeyArray, x: Array, seen: tuple[Array, ...], log_density: LogDensity
    ) -> tuple[Array, tuple[Array, ...], Array]:
        """`(y, what is seen there, log r(x|y) - log q(y|x) of the proposal)`."""

    def forward(self, key: PRNGKeyArray, x: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(y, dS)`: shapes of `x` and `()`."""
        return self.advance(key, x, log_density, cancels=False, scored=False)[:2]

    def reverse(self, key: PRNGKeyArray, y: Array, log_density: LogDensity) -> tuple[Array, Array]:
        """`(x, dS)` of the reversed step: the same code, for the chain is reversible."""
        return self.forward(key, y, log_density)

    def advance(
        self,
        key: PRNGKeyArray,
        x: Array,
        log_density: LogDensity,
        *,
        cancels: bool,
        scored: bool,
        decide: Decide | None = None,
    ) -> tuple[Array, Array, Array]:
        """`(y, dS, log probability of the decisions)`, with the derivatives that `grad` allows.

        Args:
            key: PRNG key.
            x: where to start.
            log_density: at the temperature of the layer.
            cancels: whether the layer cancels out of the weight.
            scored: whether the caller uses the log probability.
            decide: in place of random decisions.
        """
        if self.grad == "straight_through":
            y, dS, _ = self._steps(key, x, log_density, decide)
            return y, dS, jnp.zeros_like(dS)
        if self.grad == "score":
            y, dS, log_prob = self._steps(key, x, log_density, decide)
            if not scored:
                y, dS = (no_derivative(out, ProgramError(_SCORE)) for out in (y, dS))
            return y, dS, log_prob
        y, dS, log_prob = stop_gradient(self)._steps(key, x, log_density, decide)
        if cancels:
            y = jax.lax.stop_gradient(y)
            dS = log_density(x) - log_density(y)
        else:
            y, dS = (no_derivative(out, ProgramError(_CUT)) for out in (y, dS))
        return y, dS, jnp.zeros_like(log_prob)

    def _steps(
        self, key: PRNGKeyArray, x: Array, log_density: LogDensity, decide: Decide | None
    ) -> tuple[Array, Array, Array]:
        decide = _at_random if decide is None else decide

        def step(carry, key):
            x, seen, total = carry
            key_propose, key_decide = jax.random.split(key)
            y, new, ratio = self.propose(key_propose, x, seen, log_density)
            log_accept = new[0] - seen[0] + ratio
            log_accept = jnp.where(jnp.isnan(log_accept), -jnp.inf, log_accept)
            taken = decide(key_decide, log_accept)
            total = total + _log_prob_of_decision(taken, log_accept)
            pick = lambda a, b: jnp.where(taken & (log_accept > -jnp.inf), a, b)
            return (pick(y, x), jax.tree.map(pick, new, seen), total), None

        seen = self.look(x, log_density)
        start = (x, seen, jnp.zeros_like(x, shape=()))
        (y, last, total), _ = jax.lax.scan(step, start, jax.random.split(key, self.num_steps))
        # Unchanged where every proposal was refused, also at a point of density zero.
        dS = jnp.where(last[0] == seen[0], 0.0, seen[0] - last[0])
        return y, dS, total


def _at_random(key: PRNGKeyArray, log_accept: Array) -> Array:
    return jnp.log(jax.random.uniform(key, dtype=log_accept.dtype)) < log_accept


def _log_prob_of_decision(taken: Array, log_accept: Array) -> Array:
    r"""$\log\alpha$ or $\log(1-\alpha)$, safe where alpha is 0 or 1, for derivatives too."""
    certain = log_accept >= 0
    open_ = ~certain & (log_accept > -jnp.inf)
    safe = jnp.where(open_, log_accept, -1.0)
    yes = jnp.where(open_, safe, jnp.where(certain, 0.0, -jnp.inf))
    no = jnp.where(open_, jnp.log(-jnp.expm1(safe)), jnp.where(certain, -jnp.inf, 0.0))
    return jnp.where(taken, yes, no)


def _check(owner: str, grad: Any, **counts: Any) -> None:
    check_steps(owner, **counts)
    if grad not in GRADS:
        raise ValueError(f"{owner}: grad must be one of {GRADS}, got {grad!r}.")


class Metropolis(AbstractMetropolis):
    r"""Random-walk Metropolis: $y = x + s\,\varepsilon$, accepted with $\min(1, p_\lambda(y)/p_\lambda(x))$.

    Args:
        num_steps: number of steps.
        step_size: s, the standard deviation of a proposal, at the start.
        grad: "detach", "score" or "straight_through"; what they mean is told in the guide.

    Raises:
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.flows.stochastic.Metropolis(num_steps=20, step_size=0.25)
        >>> y, dS = layer.forward(jax.random.key(0), jnp.zeros(2), lambda x: -jnp.sum(x**2))
        >>> print(bool(jnp.isclose(dS, jnp.sum(y**2))))
        True

    Source:
        Metropolis et al. 1953; the weight: Neal 2001, Annealed importance sampling.
    """

    log_step: Array
    num_steps: int = eqx.field(static=True)
    grad: str = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False
    tempered: ClassVar[bool] = True

    def __init__(self, *, num_steps: int, step_size: float, grad: str = "detach"):
        _check("Metropolis", grad, num_steps=num_steps)
        self.num_steps, self.grad = num_steps, grad
        self.log_step = log_of("Metropolis", "step_size", step_size)

    def look(self, x: Array, log_density: LogDensity) -> tuple[Array, ...]:
        """The log density."""
        return (log_density(x),)

    def propose(
        self, key: PRNGKeyArray, x: Array, seen: tuple[Array, ...], log_density: LogDensity
    ) -> tuple[Array, tuple[Array, ...], Array]:
        """A symmetric step."""
        step = jnp.exp(self.log_step).astype(x.dtype)
        y = x + step * jax.random.normal(key, x.shape, x.dtype)
        return y, self.look(y, log_density), jnp.zeros_like(x, shape=())


class MALA(AbstractMetropolis):
    r"""Metropolis-adjusted Langevin: the step of `Langevin` as a proposal.

    Args:
        num_steps: number of steps.
        step_size: $\eta$ of $y = x + \eta \nabla\log p_\lambda(x) + \sqrt{2\eta}\,\varepsilon$, at the start.
        grad: "detach", "score" or "straight_through"; what they mean is told in the guide.

    Raises:
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.flows.stochastic.MALA(num_steps=3, step_size=0.03)
        >>> y, dS = layer.forward(jax.random.key(0), jnp.zeros(2), lambda x: -jnp.sum(x**2))
        >>> print(bool(jnp.isclose(dS, jnp.sum(y**2))))
        True

    Source:
        Roberts & Tweedie 1996; the weight: Neal 2001, Annealed importance sampling.
    """

    log_step: Array
    num_steps: int = eqx.field(static=True)
    grad: str = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False
    tempered: ClassVar[bool] = True

    def __init__(self, *, num_steps: int, step_size: float, grad: str = "detach"):
        _check("MALA", grad, num_steps=num_steps)
        self.num_steps, self.grad = num_steps, grad
        self.log_step = log_of("MALA", "step_size", step_size)

    def look(self, x: Array, log_density: LogDensity) -> tuple[Array, ...]:
        """The log density and its gradient."""
        return jax.value_and_grad(log_density)(x)

    def propose(
        self, key: PRNGKeyArray, x: Array, seen: tuple[Array, ...], log_density: LogDensity
    ) -> tuple[Array, tuple[Array, ...], Array]:
        """One Langevin step."""
        step = jnp.exp(self.log_step).astype(x.dtype)
        eps = jax.random.normal(key, x.shape, x.dtype)
        y = x + step * seen[1] + jnp.sqrt(2 * step) * eps
        new = self.look(y, log_density)
        a = jnp.sqrt(0.5 * step) * (seen[1] + new[1])
        return y, new, -jnp.sum(a * eps) - 0.5 * square(a)


class HMC(AbstractMetropolis):
    r"""Hamiltonian Monte Carlo with a fixed number of leapfrog steps and unit mass.

    Args:
        num_steps: number of proposals.
        num_leapfrog: leapfrog steps behind each of them.
        step_size: of a leapfrog step, at the start.
        grad: "detach", "score" or "straight_through"; what they mean is told in the guide.

    Raises:
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.flows.stochastic.HMC(num_steps=3, num_leapfrog=5, step_size=0.15)
        >>> y, dS = layer.forward(jax.random.key(0), jnp.zeros(2), lambda x: -jnp.sum(x**2))
        >>> print(bool(jnp.isclose(dS, jnp.sum(y**2))))
        True

    Source:
        Duane, Kennedy, Pendleton & Roweth 1987; the weight: Neal 2001, Annealed importance sampling.
    """

    log_step: Array
    num_steps: int = eqx.field(static=True)
    num_leapfrog: int = eqx.field(static=True)
    grad: str = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False
    tempered: ClassVar[bool] = True

    def __init__(
        self, *, num_steps: int, num_leapfrog: int, step_size: float, grad: str = "detach"
    ):
        _check("HMC", grad, num_steps=num_steps, num_leapfrog=num_leapfrog)
        self.num_steps, self.num_leapfrog, self.grad = num_steps, num_leapfrog, grad
        self.log_step = log_of("HMC", "step_size", step_size)

    def look(self, x: Array, log_density: LogDensity) -> tuple[Array, ...]:
        """The log density and its gradient."""
        return jax.value_and_grad(log_density)(x)

    def propose(
        self, key: PRNGKeyArray, x: Array, seen: tuple[Array, ...], log_density: LogDensity
    ) -> tuple[Array, tuple[Array, ...], Array]:
        """A trajectory with a fresh momentum."""
        step = jnp.exp(self.log_step).astype(x.dtype)
        first = jax.random.normal(key, x.shape, x.dtype)
        slope = jax.grad(log_density)

        def move(carry, _):
            x, m, g = carry
            return leapfrog(x, m, g, step, slope), None

        (y, m, g), _ = jax.lax.scan(move, (x, first, seen[1]), length=self.num_leapfrog)
        return y, (log_density(y), g), 0.5 * (square(first) - square(m))
