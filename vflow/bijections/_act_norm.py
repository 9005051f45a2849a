"""Normalisation of what reaches a layer, fixed by draws at the start and trained from there."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._chain import Chain, Scan
from vflow.bijections._checks import check_dim


class ActNorm(AbstractBijection):
    r"""The elementwise map $y = (x - m)\,e^{\lambda}$ that `whiten` sets by draws.

    In Glow the first minibatch of data sets $m$ and $\lambda$. Variational inference has no data;
    draws of the base, pushed through the layers before, do the same. Location and spread are
    the median and the distance of the quartiles over that of a standard normal, so that heavy tails
    do no harm. Until `whiten` the map is the identity; $m$ and $\lambda$ are trained.

    Args:
        dim: number of coordinates.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> norm, x = vf.bijections.ActNorm(1), jnp.array([[1.0], [3.0], [5.0]])
        >>> norm = vf.bijections.ActNorm.whiten(norm, x)
        >>> print(norm.forward_and_log_det(x[1])[0])
        [0.]

    Source:
        Kingma & Dhariwal 2018 (arXiv 1807.03039), section 3.1.
    """

    loc: Array
    log_scale: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, dim: int):
        check_dim("ActNorm", dim)
        self.loc = jnp.zeros((dim,))
        self.log_scale = jnp.zeros((dim,))
        self.shape = (dim,)
        self.condition_shape = None

    @staticmethod
    def whiten(bijection: Any, draws: Float[Array, "n d"], condition: Array | None = None) -> Any:
        """Set every `ActNorm` so that the draws, when they leave it, have location 0 and spread 1.

        The draws pass through the layers of `Chain` and `Scan`, in order; an `ActNorm` inside
        another wrapper stays as it is, a coordinate without spread too.

        Args:
            bijection: the layers, for example the bijection of a flow.
            draws: points of the base space, shape (n, d); some hundreds suffice.
            condition: the condition of all of them, or None.

        Returns:
            The bijection with new `ActNorm` parameters.

        Example:
            >>> import jax.numpy as jnp, vflow as vf
            >>> shift = vf.bijections.Affine(jnp.ones(1))
            >>> chain = vf.bijections.Chain([shift, vf.bijections.ActNorm(1)])
            >>> chain = vf.bijections.ActNorm.whiten(chain, jnp.array([[1.0], [3.0], [5.0]]))
            >>> print(chain.layers[1].loc)
            [4.]
        """
        return _whiten(bijection, draws, condition)[0]

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$((x - m)\,e^{\lambda}, \sum_i\lambda_i)$."""
        return (x - self.loc) * jnp.exp(self.log_scale), jnp.sum(self.log_scale)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$(y\,e^{-\lambda} + m, -\sum_i\lambda_i)$."""
        return y * jnp.exp(-self.log_scale) + self.loc, -jnp.sum(self.log_scale)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $s\,e^{-\lambda}$."""
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score * jnp.exp(-self.log_scale)


_QUARTILES = 1.3489795003921634  # distance of the quartiles of a standard normal


def _whiten(bijection: Any, x: Array, condition: Array | None) -> tuple[Any, Array]:
    """The bijection with its normalisations set, and the draws behind it."""
    if isinstance(bijection, Chain):
        layers = []
        for layer in bijection.layers:
            layer, x = _whiten(layer, x, condition)
            layers.append(layer)
        return Chain(layers), x
    if isinstance(bijection, Scan):
        arrays, static = eqx.partition(bijection.layers, eqx.is_array)

        def step(x, arrays):
            layer, x = _whiten(eqx.combine(arrays, static), x, condition)
            return x, eqx.filter(layer, eqx.is_array)

        x, arrays = jax.lax.scan(step, x, arrays)
        return Scan(eqx.combine(arrays, static)), x
    if isinstance(bijection, ActNorm):
        low, loc, high = jnp.quantile(x, jnp.array([0.25, 0.5, 0.75]), axis=0)
        spread = (high - low) / _QUARTILES
        rounding = 8 * jnp.finfo(x.dtype).eps * jnp.abs(loc)
        log_scale = -jnp.log(jnp.where(spread > rounding, spread, 1))
        leaves = lambda norm: (norm.loc, norm.log_scale)
        new = (loc.astype(bijection.loc.dtype), log_scale.astype(bijection.log_scale.dtype))
        bijection = eqx.tree_at(leaves, bijection, new)
    forward = lambda x: bijection.forward_and_log_det(
        x, None if bijection.condition_shape is None else condition
    )[0]
    return bijection, jax.vmap(forward)(x)
