"""Is a gradient estimator unbiased? An audit with its power stated."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow.programs import value_and_grad

_THRESHOLD = 4.5  # two-sided false alarm 7e-6 per parameter
_POWER = _THRESHOLD + 1.2816  # a bias of so many standard errors is found with probability 0.9
_BATCH = 4096


class UnbiasedReport(NamedTuple):
    """What `vf.check_unbiased` found.

    Attributes:
        unbiased: whether every |z| is below 4.5.
        z: z-score per parameter, (mean - reference) / standard error, shaped like the gradient.
        value_z: the same for the value; NaN where the reference is a gradient only.
        standard_error: of the difference, shaped like the gradient.
        detectable: the relative bias that would be found with probability 0.9, of the parameter
            where that is largest; relative to its gradient, or to a tenth of the largest one.
        num_draws: how many draws were compared.
    """

    unbiased: bool
    z: Any
    value_z: float
    standard_error: Any
    detectable: float
    num_draws: int

    def __str__(self) -> str:
        worst = max((float(np.max(np.abs(z))) for z in jax.tree.leaves(self.z)), default=0.0)
        verdict = "unbiased" if self.unbiased else "BIASED"
        return (
            f"{verdict}: largest |z| {worst:.2f} of the gradient, z {self.value_z:.2f} of the value, "
            f"{self.num_draws} draws; a bias of {100 * self.detectable:.2g} % would be found with "
            "probability 0.9"
        )


def check_unbiased(
    estimate: Callable[..., Array],
    key: PRNGKeyArray,
    *args: Any,
    reference: Any,
    detectable: float = 0.01,
    most: int = 2**20,
) -> UnbiasedReport:
    r"""Compare the mean gradient of an estimate with a reference, with draws enough to tell.

    Draws are added until a relative bias of `detectable` would be found with probability 0.9, or
    there are `most`; the report says what was reached.

    Args:
        estimate: `S(key, *args)`, as `vf.expect` returns it.
        key: PRNG key.
        *args: the arguments; the gradient is that of the trainable leaves of the first.
        reference: another estimate of the same expectation (exact, by `vf.enum()`, or noisy), or
            the true gradient, a tree shaped like `vf.params(args[0])`.
        detectable: the relative bias to be found.
        most: bound on the number of draws.

    Returns:
        An `UnbiasedReport`.

    Raises:
        ValueError: the gradient is not finite, or the reference has another structure.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> def objective(t, strategy):
        ...     return 1.0 + vf.sample("b", dist.Bernoulli(probs=t), strategy)
        >>> report = vf.check_unbiased(
        ...     vf.expect(lambda t: objective(t, vf.reinforce())), jax.random.key(0),
        ...     jax.numpy.array(0.3), reference=vf.expect(lambda t: objective(t, vf.enum())),
        ...     detectable=0.2,
        ... )
        >>> report.unbiased
        True
    """
    structure = jax.tree.structure(
        jax.eval_shape(lambda key: value_and_grad(estimate)(key, *args)[1], key)
    )
    noisy = callable(reference)
    if not noisy and jax.tree.structure(reference) != structure:
        raise ValueError(
            f"check_unbiased: the reference gradient has structure {jax.tree.structure(reference)}, "
            f"the gradient {structure}."
        )
    estimates = [estimate, reference] if noisy else [estimate]
    sums = jax.jit(lambda key: _sums(estimates, key, args))
    totals, n = 0.0, 0
    while True:
        totals = totals + np.asarray(sums(jax.random.fold_in(key, n)), np.float64)
        n += _BATCH
        means, variances = (
            totals[:, 0] / n,
            np.maximum(totals[:, 1] / n - (totals[:, 0] / n) ** 2, 0),
        )
        if noisy:
            truth, variance = means[1], variances.sum(axis=0)
        else:
            truth = np.concatenate([[np.nan], *[np.ravel(x) for x in jax.tree.leaves(reference)]])
            variance = variances[0]
        error = np.sqrt(variance / n)
        if not np.all(np.isfinite(means)):
            raise ValueError("check_unbiased: some draws of the value or gradient are not finite.")
        size = np.abs(truth[1:])
        scale = np.maximum(size, 0.1 * size.max(initial=0.0))
        found = float(np.max(_POWER * error[1:] / np.maximum(scale, 1e-300), initial=0.0))
        if found <= detectable or n >= most:
            break
    # Two exact numbers differ by rounding only: that is no bias.
    floor = 1e-5 * np.where(
        np.isnan(truth), 0.0, np.maximum(np.abs(truth), np.max(size, initial=0))
    )
    z = (means[0] - truth) / np.maximum(error, floor / _THRESHOLD + 1e-300)
    leaves = jax.tree.leaves(
        jax.eval_shape(lambda key: value_and_grad(estimate)(key, *args)[1], key)
    )
    return UnbiasedReport(
        bool(np.all(np.abs(z[~np.isnan(z)]) < _THRESHOLD)),
        _unravel(z[1:], leaves, structure),
        float(z[0]),
        _unravel(error[1:], leaves, structure),
        found,
        n,
    )


def _sums(estimates: list, key: PRNGKeyArray, args: tuple) -> Array:
    """Sums and sums of squares over a batch of draws: (estimates, 2, 1 + parameters)."""

    def one(estimate, key):
        value, grad = value_and_grad(estimate)(key, *args)
        return jnp.concatenate([jnp.ravel(x) for x in (value, *jax.tree.leaves(grad))])

    rows = []
    for i, estimate in enumerate(estimates):
        keys = jax.random.split(jax.random.fold_in(key, i), _BATCH)
        draws = jax.vmap(lambda key, estimate=estimate: one(estimate, key))(keys)
        rows.append(jnp.stack([draws.sum(axis=0), (draws**2).sum(axis=0)]))
    return jnp.stack(rows)


def _unravel(flat: np.ndarray, leaves: list, structure: Any) -> Any:
    parts, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        parts.append(flat[start : start + size].reshape(leaf.shape))
        start += size
    return jax.tree.unflatten(structure, parts)
