"""Independent Student-t coordinates, each with its own degrees of freedom."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from vflow_kernels import standard_normal_log_density, student_t_log_density

from vflow._core import Frozen
from vflow._core._numerics import as_float
from vflow.distributions._distribution import AbstractDistribution

# Below this, draws leave the range of float32 (the Cauchy has df = 1).
_MIN_DF = 0.2


def _inverse_softplus(y: Array) -> Array:
    return y + jnp.log(-jnp.expm1(-y))


class StudentT(AbstractDistribution):
    r"""Independent Student-t coordinates, $x_i \sim t_{\nu_i}$; $\nu_i = \infty$ is normal.

    Draws are reparameterised, $x = n\,(\gamma/(\nu/2))^{-1/2}$ with $n$ standard normal and
    $\gamma \sim \mathrm{Gamma}(\nu/2)$, differentiated implicitly in $\nu$. A trainable $\nu$ is
    stored as $\nu = \tfrac15 + \operatorname{softplus}(r)$, so it never falls below 0.2; infinite
    entries are normal for good and have no leaf. If every entry is infinite there is nothing to
    train at all.

    Args:
        df: degrees of freedom, one per coordinate, above 0.2; the event has its shape.
        trainable: whether `vf.params` contains the finite degrees of freedom.

    Raises:
        ValueError: a df that is not above 0.2 (NaN included), or no df at all.
        TypeError: df is traced: its infinite entries decide the structure.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> base = vf.distributions.StudentT(jnp.array([3.0, jnp.inf]), trainable=True)
        >>> print(base.df, len(jax.tree.leaves(vf.params(base))))
        [ 3. inf] 1

    Source:
        Jaini, Kobyzev, Yu & Brubaker 2020 (arXiv 1907.04481) for heavy-tailed bases; Figurnov,
        Mohamed & Mnih 2018 (arXiv 1805.08498) for the implicit derivative.
    """

    raw_df: Array | Frozen
    heavy: tuple[int, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, df: ArrayLike, *, trainable: bool = False):
        if isinstance(df, Tracer):
            raise TypeError("StudentT: df must be a concrete array; build it outside jit and grad.")
        df = as_float(df)
        values = np.asarray(df)
        if values.size == 0 or not np.all(values > _MIN_DF):
            raise ValueError(
                f"StudentT: df must have at least one entry, all above {_MIN_DF}, got {values}."
            )
        self.heavy = tuple(int(i) for i in np.flatnonzero(np.isfinite(values)))
        raw = _inverse_softplus(df.reshape(-1)[np.array(self.heavy, dtype=int)] - _MIN_DF)
        self.raw_df = raw if trainable and self.heavy else Frozen(raw)
        self.shape = values.shape
        self.condition_shape = None

    def _heavy_df(self) -> Array:
        raw = self.raw_df.value if isinstance(self.raw_df, Frozen) else self.raw_df
        return _MIN_DF + jax.nn.softplus(raw)

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the light and of the heavy coordinates in the flattened event."""
        heavy = np.array(self.heavy, dtype=int)
        size = int(np.prod(self.shape, dtype=int))
        return np.setdiff1d(np.arange(size), heavy), heavy

    def _spread(self, heavy: Array, light: float) -> Array:
        """An event with the given values at heavy coordinates, and `light` elsewhere."""
        flat = jnp.full((int(np.prod(self.shape, dtype=int)),), light, heavy.dtype)
        return flat.at[self._split()[1]].set(heavy, unique_indices=True).reshape(self.shape)

    @property
    def df(self) -> Array:
        """The degrees of freedom, shape `shape`."""
        return self._spread(self._heavy_df(), jnp.inf)

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density: shapes `shape` and `()`."""
        df = self._heavy_df()
        key_normal, key_gamma = jax.random.split(key)
        x = jax.random.normal(key_normal, self.shape, df.dtype)
        # In logs: a gamma draw with a small shape underflows long before x overflows.
        log_gamma = jax.random.loggamma(key_gamma, df / 2)
        x = x * self._spread(jnp.exp(0.5 * (jnp.log(df / 2) - log_gamma)), 1.0)
        return x, self.log_prob(x)

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x` of shape `shape`; shape `()`."""
        light, heavy = self._split()
        flat = x.reshape(-1)
        log_prob = jnp.sum(standard_normal_log_density(flat[light]))
        df = self._heavy_df().astype(flat.dtype)
        return log_prob + jnp.sum(student_t_log_density(flat[heavy], df))
