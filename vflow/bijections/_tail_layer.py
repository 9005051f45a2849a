"""What the output layers with power tails share."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from vflow._core import Frozen
from vflow._core._numerics import as_float
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim

_MIN_TAIL = 1e-3  # a tail parameter below it is light for every purpose; df is at most 1000


class AbstractTailLayer(AbstractBijection):
    r"""What the tail layers share: $y = m + \sigma R(z)$, with $R$ the identity on light coordinates.

    A trainable tail parameter is stored as $\lambda = 0.001 + \operatorname{softplus}(r)$, one each
    for the sides below and above, of the heavy coordinates only.
    """

    loc: Array
    log_scale: Array
    raw_tail: Array | Frozen
    heavy: tuple[int, ...] = eqx.field(static=True)
    shape: eqx.AbstractVar[tuple[int, ...]]
    condition_shape: eqx.AbstractVar[None]

    @property
    def tail(self) -> Array:
        r"""$\lambda = 1/\nu$, shape (2, dim): below and above; 0 for light coordinates."""
        return jnp.zeros((2, *self.shape), self.loc.dtype).at[:, self._index()].set(self._tail())

    @property
    def df(self) -> Array:
        r"""$\nu$ of the two sides, shape (2, dim); infinite for light coordinates."""
        return 1 / self.tail

    def _index(self) -> np.ndarray:
        return np.array(self.heavy, dtype=int)

    def _tail(self) -> Array:
        raw = self.raw_tail.value if isinstance(self.raw_tail, Frozen) else self.raw_tail
        return _MIN_TAIL + jax.nn.softplus(raw)

    @abc.abstractmethod
    def _forward(self, z: Array) -> tuple[Array, Array]:
        """The map of the heavy coordinates, elementwise, and its log derivative."""

    @abc.abstractmethod
    def _inverse(self, x: Array) -> tuple[Array, Array]:
        """The inverse of `_forward` and its log derivative."""

    def _elementwise(self, x: Array) -> tuple[Array, Array]:
        log_slope = self.log_scale.astype(x.dtype)
        if self.heavy:
            y, log_heavy = self._forward(x[self._index()])
            x = x.at[self._index()].set(y.astype(x.dtype))
            log_slope = log_slope.at[self._index()].add(log_heavy)
        return self.loc + jnp.exp(self.log_scale) * x, log_slope

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$m + \sigma R(x)$, elementwise."""
        y, log_slope = self._elementwise(x)
        return y, jnp.sum(log_slope)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        r"""$R^{-1}((y - m)/\sigma)$, elementwise."""
        x = (y - self.loc) * jnp.exp(-self.log_scale)
        log_det = -jnp.sum(self.log_scale)
        if self.heavy:
            z, log_heavy = self._inverse(x[self._index()])
            x = x.at[self._index()].set(z.astype(x.dtype))
            log_det = log_det + jnp.sum(log_heavy)
        return x, log_det

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        r"""The score becomes $(s - \partial_x\log y')/y'$: one forward derivative, no inverse."""
        (y, log_slope), (slope, curvature) = jax.jvp(self._elementwise, (x,), (jnp.ones_like(x),))
        return y, jnp.sum(log_slope), (score - curvature) / slope


def start_tails(
    owner: str, dim: int, df: ArrayLike, *, trainable: bool
) -> tuple[tuple[int, ...], Array | Frozen]:
    """The heavy coordinates, and the raw tail parameters of their two sides."""
    check_dim(owner, dim)
    if isinstance(df, Tracer):
        raise TypeError(f"{owner}: df must be a concrete array; build it outside jit and grad.")
    with jax.ensure_compile_time_eval():  # concrete under jit too
        df = as_float(df)
    if df.shape not in ((), (dim,), (2, dim)):
        raise ValueError(
            f"{owner}: df has shape {df.shape}, expected (), ({dim},) or (2, {dim}): the sides "
            "below and above."
        )
    values = np.broadcast_to(np.asarray(df), (2, dim))
    light = np.isposinf(values)
    if not np.all(light | ((values > 0) & (values < 1 / _MIN_TAIL))):
        raise ValueError(
            f"{owner}: df must be in (0, {1 / _MIN_TAIL:g}), or infinite for a light coordinate, "
            f"got {np.asarray(df)}."
        )
    if np.any(light[0] != light[1]):
        raise ValueError(
            f"{owner}: df is infinite on one side only, got {np.asarray(df)}; give that side a "
            "large finite df."
        )
    heavy = np.flatnonzero(~light[0])
    excess = 1 / jnp.asarray(values[:, heavy], df.dtype) - _MIN_TAIL
    raw = excess + jnp.log(-jnp.expm1(-excess))
    indices = tuple(int(i) for i in heavy)
    return indices, raw if trainable and indices else Frozen(raw)


def start_loc_scale(owner: str, dim: int, loc: ArrayLike, scale: ArrayLike) -> tuple[Array, Array]:
    """Location and log scale, shape (dim,)."""
    result = []
    for name, value in (("loc", loc), ("scale", scale)):
        array = jnp.asarray(value, float)
        if array.shape not in ((), (dim,)):
            raise ValueError(f"{owner}: {name} has shape {array.shape}, expected () or ({dim},).")
        result.append(jnp.broadcast_to(array, (dim,)))
    if not isinstance(result[1], Tracer) and not np.all(np.asarray(result[1]) > 0):
        raise ValueError(f"{owner}: scale must be positive, got {scale}.")
    return result[0], jnp.log(result[1])
