"""Stochastic normalizing flows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vflow._core import Frozen
from vflow.bijections import AbstractBijection
from vflow.distributions import AbstractDistribution
from vflow.flows._checks import check_base, check_count
from vflow.flows.stochastic import AbstractTransition, StochasticFlow
from vflow.flows.stochastic._couplings import Deterministic
from vflow.flows.stochastic._metropolis import AbstractMetropolis
from vflow.flows.stochastic._segment import segments_of


def stochastic_flow(
    key: PRNGKeyArray,
    dim: int,
    blocks: Sequence[Any],
    *,
    base: AbstractDistribution | None = None,
    temperatures: Sequence[float] | None = None,
    train_temperatures: bool = True,
) -> StochasticFlow:
    r"""A stochastic normalizing flow: bijections and sampling steps, one after the other.

    The i-th of m sampling blocks moves towards $(1-\lambda_i)\log q_0 + \lambda_i\log p$, by default with
    $\lambda_i = i/m$, so that the last one is at the target. Blocks that repeat are compiled once
    (`jax.lax.scan`), so that compile time does not grow with their number.

    Args:
        key: PRNG key of the networks' weights.
        dim: number of coordinates.
        blocks: layers from `vf.flows.stochastic`, in order, and bijections on `(dim,)`. A block may be
            listed repeatedly: each place has parameters of its own.
        base: distribution on `(dim,)`; standard normal by default.
        temperatures: one for each sampling block, in [0, 1].
        train_temperatures: whether they are trained; 0 and 1 never are.

    Returns:
        The family. It depends on the target: `vf.sample_and_log_prob(key, q, n, log_density=p)`;
        objectives and `vf.fit` pass it by themselves.

    Raises:
        TypeError: a block that is none.
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, vflow as vf
        >>> S = vf.flows.stochastic
        >>> blocks = [S.couplings(num_layers=2), S.Langevin(num_steps=5, step_size=0.1)]
        >>> snf = vf.flows.stochastic_flow(jax.random.key(0), 2, blocks * 2)
        >>> print(snf.schedule)
        [0.  0.5 0.5 1. ]

    Source:
        Wu, Koehler & Noe 2020 (arXiv 2002.06707).
    """
    check_count("stochastic_flow", "dim", dim)
    base = check_base("stochastic_flow", base, dim)
    if not isinstance(blocks, tuple | list) or not blocks:
        raise ValueError("stochastic_flow: blocks must be a list with at least one block.")
    layers = [
        _layer(position, block, jax.random.fold_in(key, position), dim)
        for position, block in enumerate(blocks)
    ]
    tempered = [position for position, layer in enumerate(layers) if layer.tempered]
    given = _temperatures(temperatures, len(tempered))
    kinds: list[float | str | None] = ["none"] * len(layers)
    for position, value in zip(tempered, given, strict=True):
        kinds[position] = value if value in (0.0, 1.0) else None
    inner = jnp.asarray([value if 0 < value < 1 else 0.5 for value in given] or [0.5])
    logits = jnp.log(inner) - jnp.log1p(-inner)
    trained = train_temperatures and any(kinds[position] is None for position in tempered)

    cancels = [False] * len(layers)
    for position in reversed(range(len(layers))):
        if not isinstance(layers[position], AbstractMetropolis) or kinds[position] != 1.0:
            break
        cancels[position] = True
    alone = [_summed(layer) for layer in layers]
    segments = segments_of(layers, cancels, alone)
    return StochasticFlow(base, segments, logits if trained else Frozen(logits), tuple(kinds))


def _layer(position: int, block: Any, key: PRNGKeyArray, dim: int) -> AbstractTransition:
    if isinstance(block, AbstractBijection):
        if block.shape != (dim,) or block.condition_shape is not None:
            raise ValueError(
                f"stochastic_flow: block {position} ({type(block).__name__}) must be an "
                f"unconditional bijection on ({dim},), it is on {block.shape}."
            )
        return Deterministic(block)
    if not hasattr(block, "build"):
        raise TypeError(
            f"stochastic_flow: block {position} must be one of vf.flows.stochastic or a bijection, "
            f"got {block!r}."
        )
    return block.build(key, dim)


def _summed(layer: AbstractTransition) -> bool:
    """Whether the decision of a layer is summed over: a site of its own, outside of scans."""
    return isinstance(layer, AbstractMetropolis) and layer.grad == "score" and layer.num_steps == 1


def _temperatures(given: Sequence[float] | None, count: int) -> list[float]:
    if given is None:
        return [(i + 1) / count for i in range(count)]
    values = [float(value) for value in given]
    if len(values) != count or not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"stochastic_flow: temperatures must be {count} numbers in [0, 1], one for each "
            f"sampling block, got {given!r}."
        )
    return values
