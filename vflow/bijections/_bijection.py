"""The contract of a bijection."""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core import stop_gradient
from vflow._core._numerics import as_float

# Above this many coordinates a dense Jacobian solve per sample is no longer a sensible default.
_DENSE_SCORE_LIMIT = 64

_CONTRACT = (
    "forward_and_log_det",
    "inverse_and_log_det",
    "push_score",
    "forward_with_score",
    "inverse_with_score",
)


def _check(bijection: Any, method: str, name: str, value: Any, shape: tuple[int, ...]) -> Array:
    value = as_float(value)
    if value.shape != shape:
        raise ValueError(
            f"{type(bijection).__name__}.{method}: {name} has shape {value.shape}, expected "
            f"{shape}. Bijections act on one event; use jax.vmap for a batch."
        )
    return value


def _check_condition(bijection: Any, method: str, condition: Any) -> Array | None:
    shape = bijection.condition_shape
    if shape is None:
        if condition is None:
            return None
        raise ValueError(
            f"{type(bijection).__name__}.{method}: got a condition, but the bijection takes none "
            "(condition_shape is None)."
        )
    if condition is None:
        raise ValueError(
            f"{type(bijection).__name__}.{method}: condition is missing, expected an array of "
            f"shape {shape}."
        )
    return _check(bijection, method, "condition", condition, shape)


def _checked(method: Callable) -> Callable:
    """Check shapes while tracing, and give the outputs the dtype of the point."""
    name = method.__name__

    point = "y" if name.startswith("inverse") else "x"

    @ft.wraps(method)
    def map_point(self, x, condition=None):
        x = _check(self, name, point, x, self.shape)
        condition = _check_condition(self, name, condition)
        return tuple(out.astype(x.dtype) for out in method(self, x, condition))

    @ft.wraps(method)
    def map_both(self, x, score, condition=None, **options):
        x = _check(self, name, point, x, self.shape)
        score = _check(self, name, "score", score, self.shape)
        condition = _check_condition(self, name, condition)
        return tuple(out.astype(x.dtype) for out in method(self, x, score, condition, **options))

    return map_both if name.endswith("score") else map_point


class AbstractBijection(eqx.Module):
    r"""A smooth invertible map $T$ from base to target space, on one event (no batch axes).

    Batching is `jax.vmap`, done once, at the distribution. A subclass is final: it sets
    `shape` and `condition_shape` (static) and implements

    * `forward_and_log_det(x, condition=None) -> (y, log_det)` with $y = T(x)$ and
      $\log|\det \partial T/\partial x|$, the base -> target direction;
    * `inverse_and_log_det(y, condition=None) -> (x, log_det)` with $x = T^{-1}(y)$ and
      $\log|\det \partial T^{-1}/\partial y|$ (minus the forward one); a map without a usable
      inverse raises NotImplementedError that names the alternative;
    * optionally `push_score`, where a cheaper rule than the default exists;
    * `forward_with_score` and `inverse_with_score` only if it is made of other bijections (Chain,
      Scan): it then calls theirs, so that each layer's two evaluations stand side by side and XLA
      merges them.

    * `estimated` and `forward_and_estimate` only if it has a cheaper, random log-det, or is made of
      other bijections.

    All survive jit, vmap, grad and `jax.jacfwd` and never use private randomness. `condition` is
    an array of `condition_shape`, or None. This class wraps the methods of every subclass: shapes
    are checked while tracing (a ValueError names the bijection and the argument), and the outputs
    take the dtype of the point. Fields are arrays, other modules, or static and hashable; never a
    function, so that every bijection can be written to a file.

    Args:
        shape: shape of one event.
        condition_shape: shape of the condition, or None for an unconditional map.
    """

    shape: eqx.AbstractVar[tuple[int, ...]]
    condition_shape: eqx.AbstractVar[tuple[int, ...] | None]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name in _CONTRACT:
            if name in cls.__dict__:
                setattr(cls, name, _checked(cls.__dict__[name]))

    @abc.abstractmethod
    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """Base to target: `(T(x), log|det dT/dx|)`; shapes `shape` and `()`."""

    @abc.abstractmethod
    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """Target to base: `(T^-1(y), log|det dT^-1/dy|)`; shapes `shape` and `()`."""

    @_checked
    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""Carry the score of a density through the map.

        With $x \sim q$ and $s = \nabla_x \log q(x)$, the push-forward $q_T$ has
        $\nabla_y \log q_T(y) = J^{-\top}(s - \nabla_x \log|\det J|)$ at $y = T(x)$.

        The default pulls $(s, 1)$ back through $y \mapsto (T^{-1}(y), \log|\det J^{-1}|)$: one
        inverse and one vector-Jacobian product. A map without an inverse solves the dense
        system up to 64 coordinates and raises above that; it never falls back to a biased rule.

        Args:
            x: a point of the base space, shape `shape`.
            score: $\nabla_x \log q(x)$, shape `shape`.
            condition: array of `condition_shape`, or None.

        Returns:
            `(y, log_det, score_y)`.

        Raises:
            NotImplementedError: no inverse and more than 64 coordinates.

        Source:
            Vaitl, Winkler, Richter & Kessel 2024 (arXiv 2403.15881), Proposition 3.2.
        """
        y, log_det = self.forward_and_log_det(x, condition)
        try:
            _, pull = jax.vjp(lambda y: self.inverse_and_log_det(y, condition), y)
        except NotImplementedError:
            return y, log_det, self._dense_push_score(x, score, condition)
        (score_y,) = pull((score, jnp.ones_like(log_det)))
        return y, log_det, score_y

    @_checked
    def forward_with_score(
        self, x: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        r"""The step of a path gradient: `y` is differentiable, the score is not.

        Two tracks: `forward_and_log_det` with live parameters, and `push_score` with parameters,
        point, score and condition behind `stop_gradient`. XLA merges what they have in common,
        provided both stand in the same (scan body of a) computation: hence this method.

        Args:
            x: a point of the base space, shape `shape`.
            score: $\nabla_x \log q(x)$, shape `shape`.
            condition: array of `condition_shape`, or None.
            live: whether the log-det is differentiable, as mixtures of path and total gradient
                need it; a path gradient does not, and skips its backward pass.

        Returns:
            `(y, log_det, score_y)`.

        Raises:
            NotImplementedError: the map has no score rule; the message says what to do.
        """
        y, log_det = self.forward_and_log_det(x, condition)
        frozen, point, score, condition = stop_gradient((self, x, score, condition))
        _, _, score_y = frozen.push_score(point, score, condition)
        return y, log_det if live else jax.lax.stop_gradient(log_det), score_y

    @_checked
    def inverse_with_score(
        self, y: Array, score: Array, condition: Array | None = None, *, live: bool = False
    ) -> tuple[Array, Array, Array]:
        r"""`forward_with_score` of the inverse map, $s_x = J^\top s_y + \nabla_x \log|\det J|$.

        One inverse, and one forward pass at its result with a vector-Jacobian product.

        Args:
            y: a point of the target space, shape `shape`.
            score: the score of a density there, shape `shape`.
            condition: array of `condition_shape`, or None.
            live: whether the log-det is differentiable.

        Returns:
            `(x, log_det, score_x)`, the log-det of the inverse.

        Raises:
            NotImplementedError: the map has no inverse.
        """
        x, log_det = self.inverse_and_log_det(y, condition)
        frozen, point, score, condition = stop_gradient((self, x, score, condition))
        (_, back), pull = jax.vjp(lambda x: frozen.forward_and_log_det(x, condition), point)
        (score_x,) = pull((score, jnp.ones_like(back)))
        return x, log_det if live else jax.lax.stop_gradient(log_det), score_x

    @property
    def estimated(self) -> bool:
        """Whether `forward_and_estimate` estimates the log-det; it is exact by default."""
        return False

    def forward_and_estimate(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        r"""Base to target with an unbiased estimate of the log-det: cheaper, where there is one.

        Unbiased for $\log|\det J|$ and its first derivative, not for their nonlinear functions.
        `Flow.simulate` uses it in objectives that are linear in $\log q$; all else is exact.

        Args:
            key: PRNG key of the estimate.
            x: a point of the base space, shape `shape`.
            condition: array of `condition_shape`, or None.

        Returns:
            `(T(x), estimate)`; shapes `shape` and `()`.
        """
        return self.forward_and_log_det(x, condition)

    def _dense_push_score(self, x: Array, score: Array, condition: Array | None) -> Array:
        size = x.size
        if size > _DENSE_SCORE_LIMIT:
            raise NotImplementedError(
                f"{type(self).__name__} has neither an inverse nor a push_score rule of its own, "
                f"and {size} coordinates are too many for a dense solve (limit "
                f"{_DENSE_SCORE_LIMIT}): use gradient='total', or give the layer a push_score."
            )

        def forward(flat):
            y, log_det = self.forward_and_log_det(flat.reshape(x.shape), condition)
            return y.reshape(-1), log_det

        jacobian, grad_log_det = jax.jacfwd(forward)(x.reshape(-1))
        rest = score.reshape(-1) - grad_log_det
        return jnp.linalg.solve(jacobian.T, rest).reshape(x.shape)
