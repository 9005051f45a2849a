"""Flows of kernelised coupling layers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._numerics import as_float
from vflow.bijections import (
    AbstractBijection,
    Chain,
    KernelisedCoupling,
    Permute,
)
from vflow.bijections._place_centres import place_centres
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_common, check_count
from vflow.flows._splits import swaps
from vflow.flows._stack import stack, unit_affine

# Base draws per centre among which the centres of a layer are chosen.
_SPARE = 4


def kernelised(
    key: PRNGKeyArray,
    dim: int,
    *,
    num_layers: int = 6,
    num_centres: int = 50,
    kernel: str = "rbf",
    lengthscale: float = 2.0,
    linear_mean: bool = False,
    min_log_scale: float = -2.0,
    max_log_scale: float = 2.0,
    condition_dim: int | None = None,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
    data: Any = None,
    condition: Any = None,
) -> Flow:
    r"""A stack of kernelised coupling layers ("Ferumal flow"), started at the identity.

    Shift and log-scale of each layer are sums of kernels around learned centres
    (`vf.bijections.KernelisedCoupling`), a parametrisation with few and local parameters:
    with $k = \lfloor d/2 \rfloor$ and condition length c, L layers of n centres have
    $L\,[n\,(k + c) + 2n\,(d - k) + k + c] + 2d$, the last from a free elementwise affine map behind the
    layers, which by themselves move nothing far from their centres.

    Where the centres start: among `data`, if given (standardise them first); else among draws of the
    base, right for variational inference. `vf.fit_density` places the centres of an untrained flow
    among its training data by itself.

    Args:
        key: PRNG key of the centres; the splits do not depend on it.
        dim: number of coordinates; 1 needs a condition, the flow is then affine given it.
        num_layers: number of coupling layers; 2 transform every coordinate once.
        num_centres: centres of each layer, at least 2.
        kernel: "rbf" (squared exponential), "matern12", "matern32" or "matern52".
        lengthscale: the starting lengthscale in units of the median heuristic.
        linear_mean: whether the shifts have a linear part.
        min_log_scale: lower bound of each layer's log-scale, negative.
        max_log_scale: upper bound of each layer's log-scale, positive.
        condition_dim: length of the condition vector, or None.
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.
        data: points (n, dim) among which the centres start, or None.
        condition: the conditions (n, condition_dim) of the data, or None.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.kernelised(jax.random.key(0), 3, num_layers=4, num_centres=20)
        >>> print(f"{flow.log_prob(jnp.zeros(3)):.4f}")
        -2.7568

    Source:
        English, Kirchler & Lippert 2024 (arXiv 2307.14839).
    """
    base, last = check_common(
        "kernelised",
        dim,
        num_layers=num_layers,
        condition_dim=condition_dim,
        base=base,
        tails=tails,
    )
    check_count("kernelised", "num_centres", num_centres)
    if dim == 1 and condition_dim is None:
        raise ValueError(
            "kernelised: dim = 1 without a condition leaves the kernel nothing to depend on; use "
            "vf.flows.coupling."
        )
    points, conditions = _check_data(data, condition, dim, condition_dim)

    layer_key, point_key, condition_key = jax.random.split(key, 3)
    if points is None:
        count = _SPARE * num_centres
        some = None if base.condition_shape is None else jnp.zeros(base.condition_shape)
        keys = jax.random.split(point_key, count)
        points = jax.vmap(lambda key: base.sample(key, some))(keys)
        if condition_dim is not None:
            conditions = jax.random.normal(condition_key, (count, condition_dim))
    else:
        for layer in last:
            points, _ = jax.vmap(layer.inverse_and_log_det)(points)
    options = {
        "num_centres": num_centres,
        "kernel": kernel,
        "lengthscale": lengthscale,
        "linear_mean": linear_mean,
        "min_log_scale": min_log_scale,
        "max_log_scale": max_log_scale,
        "condition_dim": condition_dim,
    }
    layers = _make_layers(
        layer_key, jnp.asarray(swaps(dim, num_layers)), options, points, conditions
    )
    return Flow(base, Chain([layers, unit_affine(dim), *last]))


@eqx.filter_jit  # one compilation for each shape, not one for each of a hundred small steps
def _make_layers(
    key: PRNGKeyArray,
    permutations: Array,
    options: dict[str, Any],
    points: Array,
    conditions: Array | None,
) -> AbstractBijection:
    """The scanned layers, their centres among given points."""

    def make_layer(key: PRNGKeyArray, permutation: Array) -> AbstractBijection:
        layer = KernelisedCoupling(key, permutation.size, **options)
        return Chain([layer, Permute(permutation)])

    layer_key, choice_key = jax.random.split(key)
    layers = stack(make_layer, layer_key, len(permutations), permutations)
    return place_centres(layers, choice_key, points, conditions)[0]


def _check_data(
    data: Any, condition: Any, dim: int, condition_dim: int | None
) -> tuple[Array | None, Array | None]:
    """Data and their conditions as arrays; a ValueError unless they fit the flow."""
    if data is None:
        if condition is not None:
            raise ValueError("kernelised: condition is for the rows of data, and data is None.")
        return None, None
    data = as_float(data)
    if data.ndim != 2 or data.shape[1] != dim or len(data) < 2:
        raise ValueError(
            f"kernelised: data must have shape (n, {dim}) with n >= 2, got {data.shape}."
        )
    if (condition is None) != (condition_dim is None):
        raise ValueError(
            "kernelised: data of a conditional flow (condition_dim) come with their condition, those "
            "of an unconditional one without."
        )
    if condition is not None:
        condition = as_float(condition)
        if condition.shape != (len(data), condition_dim):
            raise ValueError(
                f"kernelised: condition must have shape {(len(data), condition_dim)}, got "
                f"{condition.shape}."
            )
    for name, value in (("data", data), ("condition", condition)):
        if value is not None and not bool(jnp.all(jnp.isfinite(value))):
            raise ValueError(f"kernelised: {name} must be finite.")
    return data, condition
