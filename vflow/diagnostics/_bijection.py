"""An audit of one bijection: its log-determinant, its inverse and its score rule."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow.bijections import AbstractBijection


class BijectionErrors(NamedTuple):
    """The largest relative errors found by `check_bijection`; nan where there is no inverse.

    Attributes:
        log_det: forward log-determinant against automatic differentiation.
        round_trip: the forward map of the inverse of `y`, against `y`.
        inverse_log_det: log-determinant of the inverse, against minus the forward one there.
        score: `push_score` against its definition, the transposed Jacobian applied to its result,
            relative to the terms of that product.
    """

    log_det: float
    round_trip: float
    inverse_log_det: float
    score: float


_MEANING = {
    "log_det": "log_det of forward_and_log_det differs from slogdet of the Jacobian",
    "round_trip": "the inverse does not undo the forward map",
    "inverse_log_det": "log_det of inverse_and_log_det is not minus the forward one",
    "score": "push_score differs from J^-T (score - grad log_det)",
}


def _relative(value: Array, reference: Array) -> Array:
    """Largest error, relative to the largest reference entry where that exceeds one."""
    return jnp.max(jnp.abs(value - reference)) / jnp.maximum(1.0, jnp.max(jnp.abs(reference)))


def _errors_at(
    bijection: AbstractBijection, x: Array, score: Array, condition: Array | None
) -> Array:
    def forward(flat):
        y, log_det = bijection.forward_and_log_det(flat.reshape(x.shape), condition)
        return y.reshape(-1), log_det

    y, log_det = bijection.forward_and_log_det(x, condition)
    jacobian, slope = jax.jacfwd(forward)(x.reshape(-1))
    pushed_y, pushed_log_det, score_y = bijection.push_score(x, score, condition)
    # Relative to the terms of the sum: a stiff Jacobian has large ones that cancel.
    terms = jnp.abs(jacobian).T @ jnp.abs(score_y.reshape(-1))
    residual = jacobian.T @ score_y.reshape(-1) - (score.reshape(-1) - slope)
    residual = jnp.max(jnp.abs(residual) / (1 + terms))
    same = jnp.maximum(_relative(pushed_y, y), _relative(pushed_log_det, log_det))
    try:
        back, inverse_log_det = bijection.inverse_and_log_det(y, condition)
        # Where the map is stiff, `back` may be far from x although it is mapped to y.
        again, log_det_again = bijection.forward_and_log_det(back, condition)
        round_trip = _relative(again, y)
        # To first order the way from x to `back` must be no way at all: else two points share a y.
        apart = jnp.max(jnp.abs(jacobian @ (back - x).reshape(-1))) / (1 + jnp.max(jnp.abs(y)))
        round_trip = jnp.where(apart > 0.01, apart, round_trip)
        inverse = _relative(-inverse_log_det, log_det_again)
    except NotImplementedError:
        round_trip = inverse = jnp.full_like(log_det, jnp.nan)
    forward_error = _relative(log_det, jnp.linalg.slogdet(jacobian)[1])
    return jnp.stack([forward_error, round_trip, inverse, jnp.maximum(residual, same)])


@eqx.filter_jit
def _errors(bijection: AbstractBijection, points: tuple[Array, Array, Array | None]) -> Array:
    return jax.vmap(lambda args: _errors_at(bijection, *args))(points)


def check_bijection(
    bijection: AbstractBijection,
    key: PRNGKeyArray,
    *,
    num_points: int = 16,
    tolerance: float | None = None,
) -> BijectionErrors:
    r"""Audit a bijection at random points: log-determinant, round trip and score.

    At $x \sim N(0, I)$ (the condition too) with Jacobian $J$ by automatic differentiation:
    $\log|\det J|$ by a dense factorisation, $T(T^{-1}(y)) = y$, the two log-determinants add up to
    zero, and $J^\top s_y = s - \nabla\log|\det J|$ for a random score $s$. Costs one dense
    $d \times d$ Jacobian per point.

    Args:
        bijection: the map to audit.
        key: PRNG key for the points.
        num_points: how many points.
        tolerance: largest relative error allowed (absolute below one); by default 1e-8 in float64
            and 1e-3 in float32.

    Returns:
        The largest errors; those of the inverse are nan if the map has none.

    Raises:
        ValueError: some error is above the tolerance or not a number; the message has all numbers.

    Example:
        >>> import jax, vflow as vf
        >>> layer = vf.bijections.Coupling(jax.random.key(0), 2)
        >>> errors = vf.diagnostics.check_bijection(layer, jax.random.key(1))
        >>> errors.log_det < 1e-3
        True
    """
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (num_points, *bijection.shape))
    score = jax.random.normal(keys[1], x.shape)
    shape = bijection.condition_shape
    condition = None if shape is None else jax.random.normal(keys[2], (num_points, *shape))
    if tolerance is None:
        tolerance = 1e-8 if x.dtype == jnp.float64 else 1e-3
    errors = _errors(bijection, (x, score, condition))
    result = BijectionErrors(*(float(e) for e in jnp.max(errors, axis=0)))
    optional = {"round_trip", "inverse_log_det"} if _has_no_inverse(bijection) else set()
    failures = [
        f"{meaning}: relative error {getattr(result, name):.3g}"
        for name, meaning in _MEANING.items()
        if name not in optional and not getattr(result, name) <= tolerance
    ]
    if failures:
        raise ValueError(
            f"{type(bijection).__name__} is wrong (tolerance {tolerance:.3g}, {num_points} "
            f"points): {'; '.join(failures)}."
        )
    return result


def _has_no_inverse(bijection: AbstractBijection) -> bool:
    def inverse(y, condition):
        return bijection.inverse_and_log_det(y, condition)

    shape = bijection.condition_shape
    condition = None if shape is None else jnp.zeros(shape)
    try:
        jax.eval_shape(inverse, jnp.zeros(bijection.shape), condition)
    except NotImplementedError:
        return True
    return False
