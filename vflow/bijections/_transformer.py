"""Transformers: the scalar maps inside coupling and elementwise layers."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from vflow_kernels import affine_coupling_forward, affine_coupling_inverse, soft_clamp

# A matrix with a row for each parameter, or its rows.
Params = Array | tuple[Array, ...]


class AbstractTransformer(eqx.Module):
    r"""A strictly increasing scalar map $y = \tau(x; \phi)$, its parameters from a conditioner.

    A subclass has only static, hashable fields (its options), sets `num_params`, and implements
    `forward` and `inverse` for one coordinate; layers vectorise them with `jax.vmap`. Where both
    also take x of any shape s with params of shape (num_params, *s), `elementwise = True` in the
    class says so, and layers call them with whole arrays, which compile to faster loops. At
    $\phi = 0$ the map is the identity, so that a layer with a fresh conditioner starts there.
    """

    num_params: eqx.AbstractVar[int]
    elementwise: ClassVar[bool] = False

    @abc.abstractmethod
    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau(x; \phi), \log \tau'(x; \phi))$; shapes () and ()."""

    @abc.abstractmethod
    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau^{-1}(y; \phi), \log (\tau^{-1})'(y; \phi))$; shapes () and ()."""


def _rows(params: Params) -> tuple[Array, ...]:
    if isinstance(params, tuple):
        return params
    return tuple(row[0] for row in jax.lax.split(params, (1,) * len(params)))


class AffineTransformer(AbstractTransformer):
    r"""The affine transformer $y = x e^{\sigma} + m$ with a bounded log-scale $\sigma$.

    $\phi = (m, s)$ and $\sigma$ is the soft clamp of $s$ to (`min_log_scale`, `max_log_scale`):
    without a bound, deep stacks of couplings produce single huge samples that ruin the gradient.

    Args:
        min_log_scale: lower bound of $\sigma$, negative.
        max_log_scale: upper bound of $\sigma$, positive. Andrade recommends (-2, 0.1) for stacks of
            dozens of layers, followed by a trainable `Affine`.

    Raises:
        ValueError: bounds that do not enclose zero.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> transformer = vf.bijections.AffineTransformer()
        >>> y, log_derivative = transformer.forward(jnp.ones(()), jnp.zeros(2))
        >>> print(y, log_derivative)
        1.0 0.0

    Source:
        Dinh, Sohl-Dickstein & Bengio 2017 (arXiv 1605.08803), equation 8; Andrade 2024 (arXiv
        2402.16408) for the bound.
    """

    min_log_scale: float = eqx.field(static=True, default=-2.0)
    max_log_scale: float = eqx.field(static=True, default=2.0)
    num_params: int = eqx.field(static=True, default=2, init=False)
    elementwise: ClassVar[bool] = True

    def __check_init__(self):
        if not self.min_log_scale < 0 < self.max_log_scale:
            raise ValueError(
                "AffineTransformer: need min_log_scale < 0 < max_log_scale, got "
                f"{self.min_log_scale} and {self.max_log_scale}."
            )

    def forward(self, x: Array, params: Params) -> tuple[Array, Array]:
        r"""$(x e^{\sigma} + m, \sigma)$."""
        shift, raw = _rows(params)
        log_scale = soft_clamp(raw, self.min_log_scale, self.max_log_scale)
        return affine_coupling_forward(x, shift, log_scale)

    def inverse(self, y: Array, params: Params) -> tuple[Array, Array]:
        r"""$((y - m) e^{-\sigma}, -\sigma)$."""
        shift, raw = _rows(params)
        log_scale = soft_clamp(raw, self.min_log_scale, self.max_log_scale)
        return affine_coupling_inverse(y, shift, log_scale)


def as_transformer(transformer: AbstractTransformer | str) -> AbstractTransformer:
    """A transformer by its name, or the given object."""
    if isinstance(transformer, AbstractTransformer):
        return transformer
    from vflow.bijections._spline import Spline  # which builds on this module

    named = {"affine": AffineTransformer, "spline": Spline}
    if transformer not in named:
        raise ValueError(
            f"transformer must be one of {', '.join(map(repr, named))} or an AbstractTransformer "
            f"object, got {transformer!r}."
        )
    return named[transformer]()


def over_coordinates(transformer: AbstractTransformer, run: Callable) -> Callable:
    """One of its two methods for x of shape (n,) and params of shape (num_params, n)."""
    return run if transformer.elementwise else jax.vmap(run, in_axes=(0, 1))


def transform(transformer: AbstractTransformer, x: Array, params: Params) -> tuple[Array, Array]:
    """All coordinates at once: x of shape (n,), params of shape (num_params, n)."""
    y, log_derivative = over_coordinates(transformer, transformer.forward)(x, params)
    return y, jnp.sum(log_derivative)


def transform_inverse(
    transformer: AbstractTransformer, y: Array, params: Params
) -> tuple[Array, Array]:
    """The inverse of `transform` and the log-det of the inverse."""
    x, log_derivative = over_coordinates(transformer, transformer.inverse)(y, params)
    return x, jnp.sum(log_derivative)


def transform_push_score(
    transformer: AbstractTransformer, x: Array, params: Params, score: Array
) -> tuple[Array, Array, Array, Params]:
    r"""`(y, log_det, score_y, cotangent of params)`.

    $s_y = (s - \partial_x\log\tau')/\tau'$, and the cotangent
    $u = (\partial\tau/\partial\phi)^\top s_y + \partial_\phi\sum\log\tau'$ is what a conditioner
    pulls back.
    """
    # One evaluation and three pulls: a jvp beside a vjp would evaluate the transformer twice, and
    # XLA does not always merge the two.
    run = over_coordinates(transformer, transformer.forward)
    (y, log_derivative), pull = jax.vjp(run, x, params)
    one, zero = jnp.ones_like(y), jnp.zeros_like(y)
    slope, curvature = pull((one, zero))[0], pull((zero, one))[0]
    score_y = (score - curvature) / slope
    _, cotangent = pull((score_y, one))
    return y, jnp.sum(log_derivative), score_y, cotangent
