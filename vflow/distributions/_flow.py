"""A base distribution pushed through a bijection."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import stop_gradient
from vflow._core._numerics import as_float
from vflow.bijections import AbstractBijection
from vflow.distributions._distribution import AbstractDistribution
from vflow.programs._frame import current_frame
from vflow.programs._path_run import along, draw_scored

_ESTIMATE = 0x6C6F6764  # folded into the key of a draw for the noise of an estimate
_GRADIENTS = ("total", "path")  # outside a program; inside there is "auto" too


class Flow(AbstractDistribution):
    r"""The push-forward of a base distribution: $y = T(x)$, $x \sim q_0$.

    $$\log q(y) = \log q_0(x) - \log|\det \partial T/\partial x|$$

    A flow is a Program: `simulate` draws inside an objective, `log_prob` scores a point.

    `gradient="path"` returns a log density whose value is exact (for one key the draw and the value
    are those of "total") and whose derivative flows through the draw alone,
    $\nabla_\theta \log q = (\partial y/\partial\theta)^\top \nabla_y \log q(y)$; without the dropped
    term the gradient of $\log p - \log q$ vanishes draw by draw at $q = p$. That term has expectation
    zero as long as the objective is linear in $\log q$. Inside an objective program, `simulate`
    leaves the gradient of any objective unbiased, linear or not; `sample_and_log_prob` cannot know
    how its result is used. The score is a constant to JAX: a second derivative is refused.

    A bijection with an estimated log-det (`Residual` and `Continuous` have the option) is estimated in
    one place: by `simulate`, with `gradient="total"`, in an objective that is linear in $\log q$, where
    value and gradient stay unbiased. All else has the exact density.

    Args:
        base: the distribution of $x$.
        bijection: the map $T$, of the same event shape.

    Raises:
        ValueError: event shapes or condition shapes that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> scale = vf.bijections.Affine(jnp.zeros(2), jnp.array([1.0, 2.0]))
        >>> flow = vf.distributions.Flow(vf.distributions.Normal(2), scale)
        >>> x, log_q = flow.sample_and_log_prob(jax.random.key(0), gradient="path")
        >>> bool(jnp.allclose(log_q, flow.log_prob(x), atol=1e-5))
        True

    Source:
        Roeder, Wu & Duvenaud 2017 (arXiv 1703.09194); the recursion for the score: Vaitl, Winkler,
        Richter & Kessel 2024 (arXiv 2403.15881), Proposition 3.2.
    """

    base: AbstractDistribution
    bijection: AbstractBijection
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, base: AbstractDistribution, bijection: AbstractBijection):
        for name, value, kind in (
            ("base", base, AbstractDistribution),
            ("bijection", bijection, AbstractBijection),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"Flow: {name} must be an {kind.__name__}, got {value!r}.")
        if base.shape != bijection.shape:
            raise ValueError(
                f"Flow: base has event shape {base.shape}, bijection {bijection.shape}."
            )
        conditions = {base.condition_shape, bijection.condition_shape} - {None}
        if len(conditions) > 1:
            raise ValueError(
                f"Flow: base takes a condition of shape {base.condition_shape}, "
                f"bijection one of shape {bijection.condition_shape}."
            )
        self.base, self.bijection = base, bijection
        self.shape = base.shape
        self.condition_shape = conditions.pop() if conditions else None

    def _conditions(self, condition: Any) -> tuple[Array | None, Array | None]:
        """The condition as base and bijection want it, checked."""
        condition = check_condition("Flow", condition, self.condition_shape)
        return (
            None if self.base.condition_shape is None else condition,
            None if self.bijection.condition_shape is None else condition,
        )

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None, gradient: str = "total"
    ) -> tuple[Array, Array]:
        """One draw and its log density, both differentiable in the parameters.

        Args:
            key: PRNG key.
            condition: array of `condition_shape`, or None.
            gradient: "total", or "path" for a log density that depends on the parameters through
                the draw alone.

        Returns:
            `(y, log_q)`: shapes `shape` and `()`.

        Raises:
            ValueError: an unknown gradient, or a condition that does not fit.
            NotImplementedError: gradient="path" through a layer without a rule for the score.
        """
        if gradient not in _GRADIENTS:
            raise ValueError(f"Flow: gradient must be one of {_GRADIENTS}, got {gradient!r}.")
        if gradient == "path":
            y, log_q, score = self.sample_with_score(key, condition)
            return y, log_q + along(score, y)
        for_base, for_map = self._conditions(condition)
        x, log_q = self.base.sample_and_log_prob(key, for_base)
        y, log_det = self.bijection.forward_and_log_det(x, for_map)
        return y, log_q - log_det

    def _sample_and_estimate(
        self, key: PRNGKeyArray, condition: Array | None
    ) -> tuple[Array, Array]:
        """The draw of `sample_and_log_prob` and an unbiased estimate of its log density."""
        for_base, for_map = self._conditions(condition)
        x, log_q = self.base.sample_and_log_prob(key, for_base)
        noise = jax.random.fold_in(key, _ESTIMATE)
        y, log_det = self.bijection.forward_and_estimate(noise, x, for_map)
        return y, log_q - log_det

    def sample_with_score(
        self, key: PRNGKeyArray, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        r"""One draw with $\log q$ and $\nabla_y \log q$ there; the draw alone has derivatives.

        Args:
            key: PRNG key; the draw is that of `sample_and_log_prob`.
            condition: array of `condition_shape`, or None.
            live: whether $\log q$ has its total derivative, too.

        Returns:
            `(y, log_q, score)`: shapes `shape`, `()` and `shape`.

        Raises:
            NotImplementedError: a layer has no rule for the score.
        """
        for_base, for_map = self._conditions(condition)
        x, log_q = self.base.sample_and_log_prob(key, for_base)
        base, point, context = stop_gradient((self.base, x, for_base))
        score = base.score(point, context)
        y, log_det, score = self.bijection.forward_with_score(x, score, for_map, live=live)
        log_q = log_q - log_det
        return y, log_q if live else jax.lax.stop_gradient(log_q), jax.lax.stop_gradient(score)

    def path_refusal(self) -> str | None:
        """Why `gradient="path"` is not defined for this flow, or None where it is.

        Nothing is computed: the shapes are traced.

        Returns:
            The message that `sample_and_log_prob` would raise, or None.
        """
        condition = None if self.condition_shape is None else jnp.zeros(self.condition_shape)
        try:
            jax.eval_shape(
                lambda key: self.sample_and_log_prob(key, condition, "path"), jax.random.key(0)
            )
        except NotImplementedError as error:
            return str(error)
        return None

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x`, by the inverse of the bijection.

        Args:
            x: a point, shape `shape`.
            condition: array of `condition_shape`, or None.

        Returns:
            The log density in nats, shape `()`.

        Raises:
            ValueError: shapes that do not fit.
            NotImplementedError: the bijection has no inverse.
        """
        x = as_float(x)
        if x.shape != self.shape:
            raise ValueError(
                f"Flow.log_prob: x has shape {x.shape}, the event shape is {self.shape}; "
                "use jax.vmap for a batch."
            )
        for_base, for_map = self._conditions(condition)
        z, log_det = self.bijection.inverse_and_log_det(x, for_map)
        return self.base.log_prob(z, for_base) + log_det

    def simulate(
        self,
        *,
        gradient: str | None = None,
        condition: Array | None = None,
        log_density: Any = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        """One draw and its log density inside an objective program.

        Args:
            gradient: "total", "path" or "auto", the gradient of the objective being unbiased with
                each; None is the default of the running objective.
            condition: array of `condition_shape`, or None.
            log_density: ignored: the density of a flow does not depend on the target.
            name: the site's name, from which its key is folded; None numbers it.

        Returns:
            `(x, log_q)`: shapes `shape` and `()`.

        Raises:
            ProgramError: called outside an objective program.

        Example:
            >>> import jax, vflow as vf
            >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
            >>> entropy = vf.expect(lambda q: -q.simulate()[1], num_samples=100)
            >>> print(entropy(jax.random.key(1), flow).shape)
            ()
        """
        frame = current_frame("Flow.simulate")
        name = frame.label("simulate") if name is None else name
        key = frame.key_for(name, "simulate")
        return draw_scored(
            frame,
            frame.scope + name,
            frame.gradient_of(gradient),
            lambda: self.sample_and_log_prob(key, condition),
            lambda *, live: self.sample_with_score(key, condition, live=live),
            estimated=(
                (lambda: self._sample_and_estimate(key, condition))
                if self.bijection.estimated
                else None
            ),
        )


def check_condition(owner: str, condition: Any, shape: tuple[int, ...] | None) -> Array | None:
    """The condition as an array of `shape`, or a ValueError that says what is wrong."""
    if condition is None and shape is None:
        return None
    if condition is None:
        raise ValueError(f"{owner}: condition is missing; it takes one of shape {shape}.")
    if shape is None:
        raise ValueError(f"{owner}: a condition was given, but it is unconditional.")
    condition = as_float(condition)
    if condition.shape != shape:
        raise ValueError(f"{owner}: condition has shape {condition.shape}, expected {shape}.")
    return condition
