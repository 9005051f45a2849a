"""What a strategy sees: the distribution of a site, and the ways to estimate its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import ProgramError
from vflow.programs._frame import Frame, magic

_SHELLS = {"ExpandedDistribution": "base_dist", "MaskedDistribution": "base_dist"}
# The distributions of other libraries broadcast freely.
_BROADCASTS = functools.partial(jax.numpy_rank_promotion, "allow")
_DISTRAX_DISCRETE = ("Bernoulli", "Categorical", "Multinomial", "OneHotCategorical")


class View:
    """One face for NumPyro, distrax and vflow distributions; none of them is imported.

    Args:
        dist: the distribution.
        name: of the site, for messages.
    """

    def __init__(self, dist: Any, name: str):
        self.dist, self.name = dist, name
        if hasattr(dist, "sample_and_log_prob") and hasattr(dist, "condition_shape"):
            self.kind = "vflow"
        elif hasattr(dist, "has_rsample") and hasattr(dist, "log_prob"):
            self.kind = "numpyro"
        elif hasattr(dist, "_sample_n") and hasattr(dist, "log_prob"):
            self.kind = "distrax"
        else:
            raise ProgramError(
                f"site {name!r}: expected a NumPyro, distrax or vflow distribution, got "
                f"{type(dist).__name__}."
            )

    @property
    def masked(self) -> bool:
        """Whether the log density leaves out terms of the sampler's."""
        dist = self.dist
        while hasattr(dist, "base_dist"):
            if type(dist).__name__ == "MaskedDistribution":
                return True
            dist = dist.base_dist
        return False

    @property
    def reparameterised(self) -> bool:
        """Whether a draw carries the derivative in the parameters."""
        if self.kind == "vflow":
            return True
        if self.kind == "numpyro":
            return bool(self.dist.has_rsample)
        return not any(word in type(self.base()).__name__ for word in _DISTRAX_DISCRETE)

    def draw(self, key: PRNGKeyArray) -> tuple[Any, Any]:
        """A draw, with its log density where that comes for free (else None)."""
        if self.kind == "vflow":
            return self.dist.sample_and_log_prob(key)
        with _BROADCASTS():
            if self.kind == "numpyro":
                return self.dist(rng_key=key), None
            return self.dist.sample(seed=key), None

    def log_prob(self, value: Any) -> Array:
        """The log density of all entries together; shape ()."""
        with _BROADCASTS():
            return jnp.sum(self.dist.log_prob(value))

    def sampling_log_prob(self, value: Any) -> Array:
        """The log density of the sampler: a mask drops terms of the density, not of the draw."""
        dist = self.dist
        while type(dist).__name__ == "MaskedDistribution":
            dist = dist.base_dist
        with _BROADCASTS():
            return jnp.sum(dist.log_prob(value))

    def base(self) -> Any:
        """The distribution without the shells that expand, mask or reinterpret it."""
        dist = self.dist
        while True:
            name = type(dist).__name__
            if name in _SHELLS:
                dist = dist.base_dist
            elif name == "Independent":
                dist = dist.base_dist if self.kind == "numpyro" else dist.distribution
            else:
                return dist

    def family(self) -> str:
        """The name of the family: "Bernoulli", "Normal", ..."""
        return type(self.base()).__name__.removesuffix("Probs").removesuffix("Logits")

    def parameter(self, name: str, value: Any, *trailing: int) -> Array:
        """A parameter, broadcast to the shape of a draw (and `trailing` axes)."""
        return jnp.broadcast_to(getattr(self.base(), name), jnp.shape(value) + trailing)

    @property
    def domain(self) -> Any:
        """The support as a NumPyro constraint; None where the distribution does not tell."""
        if self.kind != "numpyro" or self.family() == "Delta":
            return None
        return self.dist.support

    def support(self, value: Any) -> Array:
        """The values of a discrete site with few of them, along a new leading axis."""
        shape = jnp.shape(value)
        if self.family() == "Bernoulli":
            size = 2
        elif self.family() == "Categorical":
            size = self.base().probs.shape[-1]
        elif self.kind == "numpyro" and getattr(self.dist, "has_enumerate_support", False):
            support = self.dist.enumerate_support(expand=False)
            return support.reshape((support.shape[0], *shape))
        else:
            raise ProgramError(
                f"site {self.name!r}: enum() wants a finite support, which {self.family()} does "
                "not have: use vf.measure_valued() or vf.reinforce()."
            )
        ones = jnp.ones((size, *shape), jnp.result_type(value))
        return ones * jnp.arange(size, dtype=ones.dtype).reshape((size,) + (1,) * len(shape))


class Site:
    """A random choice, as its strategy sees it.

    Attributes:
        name: of the site.
        dist: the distribution as written.
        view: one face for the distributions of all libraries.
        key: this site's own.
    """

    def __init__(self, name: str, dist: Any, frame: Frame, key: PRNGKeyArray):
        self.name, self.dist, self.key, self._frame = name, dist, key, frame
        self.view = View(dist, name)
        self.drawn_log_prob: Any = None
        self.path = False

    @property
    def num_samples(self) -> int:
        """How many runs `vf.expect` averages."""
        return self._frame.run.num_samples

    @property
    def looped(self) -> bool:
        """Whether the site is inside `vf.vmap` or `vf.scan`."""
        return self._frame.looped

    def error(self, message: str) -> ProgramError:
        """A ProgramError that names the site."""
        return ProgramError(f"site {self.name!r}: {message}")

    def draw(self) -> Any:
        """A draw that carries the derivative in the parameters where the sampler does."""
        value, self.drawn_log_prob = self.view.draw(self.key)
        return value

    def draw_detached(self, key: PRNGKeyArray | None = None) -> Any:
        """A draw without derivative."""
        value, _ = self.view.draw(self.key if key is None else key)
        return jax.lax.stop_gradient(value)

    def log_prob(self, value: Any) -> Array:
        """The log density of all entries of the site together; shape ()."""
        return self.view.sampling_log_prob(value)

    def add_score(self, log_prob: Array, *, baseline: str | None = None) -> None:
        """Multiply everything that comes later by `exp(log_prob - stop(log_prob))`.

        `baseline` "loo" or "ema" subtracts what the other samples of `vf.expect` earned.
        """
        self._frame.add("score", log_prob)
        if baseline is not None:
            self._frame.add(baseline, log_prob)

    def add_control(self, baseline: Any, log_prob: Array) -> None:
        """Subtract a baseline, which must not depend on the value; it is worth nothing."""
        self._frame.add("control", -jax.lax.stop_gradient(baseline) * (magic(log_prob) - 1.0))

    def fit(self, prediction: Array) -> None:
        """Train `prediction` (shape ()) by least squares on the objective's value."""
        self._frame.add("fit_linear", prediction)
        self._frame.add("fit_square", prediction**2)

    def star(
        self, base: Any, values: Array, weights: Array, base_weight: Array | float = 0.0
    ) -> Any:
        """Run the rest of the program once more for each alternative value.

        The gradient gets sum(weights_a * F(values_a)) + base_weight * F(base), F the objective.

        Args:
            base: the value in the base lane, without derivative.
            values: (A, *shape) alternatives.
            weights: (A,), each zero in value, its derivative the weight (see `first_order`).
            base_weight: shape (), of the same kind.

        Returns:
            The value in this lane.
        """
        place = self._frame.star(self.name, values.shape[0])
        if place is None:
            return base
        index, here = place
        self._frame.add("lane_weight", jnp.where(here, weights[index], 0.0))
        self._frame.add("base_weight", jnp.asarray(base_weight))
        return jnp.where(here, values[index], base)

    def enumerate(self, values: Array) -> Any:
        """Run the rest of the program for every value, weighted by its probability.

        Args:
            values: (A, *shape), all of the support.
        """
        value = values[self._frame.enum_index(self.name, values.shape[0])]
        self._frame.add("log_weight", self.log_prob(value))
        return value


def first_order(x: Array, name: str) -> Array:
    """Zero with the derivative of `x`; its second derivative is refused.

    Args:
        x: a parameter.
        name: of the site, for the message.
    """

    @jax.custom_jvp
    def one(x):
        return jnp.ones_like(x)

    @one.defjvp
    def _(primals, tangents):
        raise ProgramError(
            f"site {name!r}: a measure-valued or antithetic strategy is right in the first "
            "derivative only; use vf.enum(), vf.reinforce() or vf.reparam() for the second."
        )

    @jax.custom_jvp
    def zero(x):
        return jnp.zeros_like(x)

    @zero.defjvp
    def _(primals, tangents):
        return jnp.zeros_like(primals[0]), tangents[0] * one(primals[0])

    return zero(jnp.asarray(x))


def no_derivative(x: Array, message: ProgramError) -> Array:
    """`x`, whose derivative raises."""

    @jax.custom_jvp
    def same(x):
        return x

    @same.defjvp
    def _(primals, tangents):
        raise message

    return same(jnp.asarray(x))
