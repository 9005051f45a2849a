"""Is the log density usable where a fit would start? If not, which site is to blame."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from vflow._core import ProgramError
from vflow._core._compile import jit_once
from vflow.targets._target import Target


def preflight(target: Target, x: ArrayLike) -> np.ndarray:
    """Which starting points have a finite log density with a finite gradient.

    Args:
        target: the target.
        x: one point, shape `(dim,)`, or several, shape `(n, dim)`.

    Returns:
        Booleans of shape `()` or `(n,)`; at least one is True.

    Raises:
        ValueError: `x` has another shape.
        ProgramError: no point is usable; the message has a table by site at the first point.
    """
    x = jnp.asarray(x)
    if x.ndim not in (1, 2) or x.shape[-1] != target.dim or x.shape[0] == 0:
        raise ValueError(f"x must have shape ({target.dim},) or (n, {target.dim}), got {x.shape}.")

    points = x.reshape(-1, target.dim)
    value, grad = jit_once(jax.vmap(jax.value_and_grad(target.log_prob)))(points)
    usable = np.isfinite(value) & np.isfinite(grad).all(axis=-1)
    if not usable.any():
        number = len(points)
        where = "at the start" if number == 1 else f"at any of {number} starting points"
        raise ProgramError(diagnosis(target, points[0], where))
    return usable.reshape(x.shape[:-1])


def site_table(target: Target, x: ArrayLike) -> str:
    """The log density at `x`, shape `(dim,)`, by site, and where its gradient is not finite.

    A term "jacobian of s" is the log-Jacobian of the map onto the support of site s.
    """
    x = jnp.asarray(x)

    def terms_and_gradients(x):  # one gradient a term: a shared pass would spread 0 * nan
        terms = target.terms(x)
        return terms, {k: jax.grad(lambda x, k=k: target.terms(x)[k])(x) for k in terms}

    terms, gradients = jit_once(terms_and_gradients)(x)
    rows = [("site", "log density", "gradient")]
    for name, value in terms.items():
        bad = [s.name for s in target.sites if not np.isfinite(gradients[name][s.slice]).all()]
        verdict = f"not finite for {', '.join(bad)}" if bad else "ok"
        rows.append((name, f"{float(value):.6g}", verdict))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)


def diagnosis(target: Target, x: ArrayLike, where: str) -> str:
    """What is not finite at `x`, shape `(dim,)`, by site, and what to look at.

    Args:
        target: the target.
        x: the point.
        where: what it is, as "at the start".
    """
    x = jnp.asarray(x)
    parts = {name: np.asarray(v) for name, v in jit_once(target.terms)(x).items()}
    culprits = [name for name, term in parts.items() if not np.isfinite(term)]
    what = (
        f"the log density of {', '.join(map(repr, culprits))}"
        if culprits
        else "the gradient of the log density"
    )
    lines = [f"{what} is not finite {where}. By site, at the first point:", site_table(target, x)]
    if x.dtype == np.float32 and _finite_in_float64(target, x):
        lines.append("In float64 it is finite: it is a matter of precision; use dtype='float64'.")
    elif -np.inf in parts.values():
        lines.append(
            "A log density of -inf means a value outside its support: check the data and the "
            "supports of the sites that observe it."
        )
    else:
        lines.append(
            "Check the data for NaN, the model for log, sqrt or division at 0, and its scales for "
            "values that are not positive."
        )
    return "\n".join(lines)


def _finite_in_float64(target: Target, x: Array) -> bool:
    with jax.enable_x64(True):
        value, grad = jit_once(jax.value_and_grad(target.log_prob))(np.asarray(x, np.float64))
        return bool(np.isfinite(value) & np.isfinite(grad).all())
