"""The elliptical Student-t distribution: one degree of freedom for all coordinates."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from vflow_kernels import student_t_log_density

from vflow._core import Frozen
from vflow._core._numerics import as_float
from vflow.distributions._distribution import AbstractDistribution
from vflow.distributions._student_t import _MIN_DF, _inverse_softplus


class EllipticalStudentT(AbstractDistribution):
    r"""The standard multivariate Student-t: heavy in every direction, with one $\nu$.

    $$\log q(x) = \log\frac{\Gamma(\frac{\nu+d}2)}{\Gamma(\frac\nu2)\,(\nu\pi)^{d/2}}
      - \frac{\nu+d}2 \log\Big(1 + \frac{|x|^2}\nu\Big)$$

    A normal vector over the square root of one gamma draw, so that large values come together: its
    marginals are $t_\nu$ but not independent, and a linear map gives every elliptical Student-t.
    `StudentT` has independent coordinates, each with its own $\nu$. Draws are reparameterised, in
    $\nu$ by implicit differentiation; a trainable $\nu$ is stored as
    $\nu = \tfrac15 + \operatorname{softplus}(r)$.

    Args:
        dim: number of coordinates $d$.
        df: degrees of freedom $\nu$, finite and above 0.2.
        trainable: whether `vf.params` contains $\nu$.

    Raises:
        ValueError: a dim or df out of range.
        TypeError: df is traced.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> base = vf.distributions.EllipticalStudentT(3, 5.0, trainable=True)
        >>> print(f"{base.df:.1f} {base.log_prob(jnp.zeros(3)):.4f}")
        5.0 -2.6242

    Source:
        Kotz & Nadarajah 2004, Multivariate t distributions and their applications, equation 1.1; as
        the base of a flow: Jaini, Kobyzev, Yu & Brubaker 2020 (arXiv 1907.04481).
    """

    raw_df: Array | Frozen
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, dim: int, df: ArrayLike, *, trainable: bool = False):
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise ValueError(f"EllipticalStudentT: dim must be a positive integer, got {dim!r}.")
        if isinstance(df, Tracer):
            raise TypeError(
                "EllipticalStudentT: df must be a concrete number; build it outside jit and grad."
            )
        df = as_float(df)
        if df.shape != () or not _MIN_DF < float(df) < float("inf"):
            raise ValueError(
                f"EllipticalStudentT: df must be one finite number above {_MIN_DF}, got {df}; "
                "vf.distributions.Normal is the limit of large df."
            )
        raw = _inverse_softplus(df - _MIN_DF)
        self.raw_df = raw if trainable else Frozen(raw)
        self.shape = (dim,)
        self.condition_shape = None

    @property
    def df(self) -> Array:
        r"""$\nu$, shape ()."""
        raw = self.raw_df.value if isinstance(self.raw_df, Frozen) else self.raw_df
        return _MIN_DF + jax.nn.softplus(raw)

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density: shapes `(dim,)` and `()`."""
        df = self.df
        key_normal, key_gamma = jax.random.split(key)
        x = jax.random.normal(key_normal, self.shape, df.dtype)
        # In logs: a gamma draw with a small shape underflows long before x overflows.
        log_gamma = jax.random.loggamma(key_gamma, df / 2)
        x = x * jnp.exp(0.5 * (jnp.log(df / 2) - log_gamma))
        return x, self.log_prob(x)

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x` of shape `(dim,)`; shape `()`."""
        df = self.df.astype(x.dtype)
        # The ratio of gamma functions by d steps of one half: no log-gammas are subtracted.
        step = jnp.arange(self.shape[0], dtype=x.dtype)
        log_steps = student_t_log_density(jnp.zeros_like(step), df + step)
        log_normaliser = jnp.sum(log_steps + 0.5 * jnp.log1p(step / df))
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
        far = largest > 1e6  # where squares might overflow
        scale = jnp.where(far, largest, 1)
        square = jnp.sum((x / scale) ** 2) / df
        log_far = 2 * jnp.log(scale) + jnp.log(jnp.where(far, square, 1))
        return log_normaliser - (df + self.shape[0]) / 2 * jnp.where(
            far, log_far, jnp.log1p(square)
        )
