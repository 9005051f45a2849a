"""A flow for rows that are not independent of each other."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from vflow._core import Frozen
from vflow._core._numerics import as_float
from vflow.distributions._distribution import AbstractDistribution
from vflow.distributions._flow import Flow
from vflow.distributions._normal import Normal


class RowCorrelated(AbstractDistribution):
    r"""A matrix whose rows have one law, that of a flow, but depend on each other.

    Row i is $x_i = T(u_i)$, and the columns of $U \in \mathbb{R}^{n \times p}$ are independent
    $\mathcal{N}(0, C)$ with $C = \lambda I + (1 - \lambda) G$, where $G$ says how similar rows are
    (kinship, groups, time):

    $$\log p(X) = -\tfrac{np}{2}\log 2\pi - \tfrac{p}{2}\log\det C
      - \tfrac12\operatorname{tr}(U^\top C^{-1} U)
      + \sum_i \log|\det \partial T^{-1}(x_i)/\partial x_i|$$

    G has a unit diagonal, so each row alone is a draw of `flow`. Train with
    `vf.objectives.dependent_likelihood`: to treat such rows as independent counts the same evidence
    many times. G is decomposed once, $O(n^3)$; a value costs $O(n^2 p)$.

    Args:
        flow: the law of one row: an unconditional `Flow` on `(p,)` with a standard `Normal` base.
        similarity: G, (n, n): symmetric, positive semi-definite, with ones on its diagonal.
        mixing: $\lambda$, the independent part of the noise, in (0, 1).
        trainable: whether `vf.params` contains $\lambda$ (as its logit).

    Raises:
        ValueError: a G or a mixing that is not of this kind.
        TypeError: a flow of another kind, or a traced G.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.gaussian(jax.random.key(0), 2)
        >>> twins = jnp.kron(jnp.eye(2), jnp.ones((2, 2)))
        >>> rows = vf.distributions.RowCorrelated(flow, twins, 0.1)
        >>> print(rows.sample(jax.random.key(1)).shape, f"{rows.log_prob(jnp.zeros((4, 2))):.3f}")
        (4, 2) -4.030

    Source:
        Kirchler, Lippert & Kloft 2023, Training Normalizing Flows from Dependent Data
        (arXiv 2209.14933), section 3.
    """

    flow: Flow
    eigenvalues: Frozen
    eigenvectors: Frozen
    raw_mixing: Array | Frozen
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(
        self,
        flow: Flow,
        similarity: ArrayLike,
        mixing: float = 0.5,
        *,
        trainable: bool = True,
    ):
        if not (
            isinstance(flow, Flow) and isinstance(flow.base, Normal) and len(flow.shape) == 1
        ) or (flow.condition_shape is not None):
            raise TypeError(
                "RowCorrelated: flow must be an unconditional Flow on (p,) with a standard Normal "
                f"base, got {type(flow).__name__}."
            )
        if isinstance(similarity, Tracer):
            raise TypeError("RowCorrelated: similarity must be concrete; build it outside jit.")
        if not 0 < mixing < 1:
            raise ValueError(f"RowCorrelated: mixing must lie in (0, 1), got {mixing}.")
        dtype = as_float(similarity).dtype
        matrix = np.asarray(similarity, np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
            raise ValueError(
                f"RowCorrelated: similarity must be a square matrix, got shape {matrix.shape}."
            )
        tolerance = 1e-5
        if not (np.abs(matrix - matrix.T) <= tolerance).all():
            raise ValueError("RowCorrelated: similarity must be finite and symmetric.")
        if not (np.abs(np.diagonal(matrix) - 1) <= tolerance).all():
            raise ValueError(
                "RowCorrelated: similarity must have ones on its diagonal (rescale it to a "
                "correlation matrix), or a row alone would not be a draw of the flow."
            )
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        if values[0] < -tolerance * len(matrix):
            raise ValueError(
                "RowCorrelated: similarity must be positive semi-definite, its least eigenvalue "
                f"is {values[0]:.3g}."
            )
        self.flow = flow
        self.eigenvalues = Frozen(jnp.asarray(np.maximum(values, 0), dtype))
        self.eigenvectors = Frozen(jnp.asarray(vectors, dtype))
        raw = jnp.asarray(math.log(mixing / (1 - mixing)), dtype)
        self.raw_mixing = raw if trainable else Frozen(raw)
        self.shape = (len(matrix), *flow.shape)
        self.condition_shape = None

    @property
    def mixing(self) -> Array:
        r"""$\lambda$, shape `()`."""
        raw = self.raw_mixing
        return jax.nn.sigmoid(raw.value if isinstance(raw, Frozen) else raw)

    def _spectrum(self) -> Array:
        """The eigenvalues of C."""
        return self.mixing + (1 - self.mixing) * self.eigenvalues.value

    def _log_normaliser(self) -> Array:
        n, p = self.shape
        return -0.5 * p * (n * math.log(2 * math.pi) + jnp.sum(jnp.log(self._spectrum())))

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One matrix and its log density: shapes `(n, p)` and `()`."""
        vectors = self.eigenvectors.value
        noise = jax.random.normal(key, self.shape, vectors.dtype)
        u = vectors @ (jnp.sqrt(self._spectrum())[:, None] * noise)
        x, log_det = jax.vmap(self.flow.bijection.forward_and_log_det)(u)
        return x, self._log_normaliser() - 0.5 * jnp.sum(noise**2) - jnp.sum(log_det)

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density of all rows, `(n, p)`; shape `()`."""
        x = self._check("log_prob", x, self.shape[0])
        u, log_det = jax.vmap(self.flow.bijection.inverse_and_log_det)(x)
        rotated = self.eigenvectors.value.T @ u
        quadratic = jnp.sum(rotated**2 / self._spectrum()[:, None])
        return self._log_normaliser() - 0.5 * quadratic + jnp.sum(log_det)

    def log_prob_batch(self, x: Array, indices: Array) -> Array:
        r"""An unbiased estimate of `log_prob` from b of the n rows.

        Diagonal and off-diagonal terms of the quadratic form, with the entries of the inverse of
        the whole of C, are scaled by n/b and n(n-1)/(b(b-1)); the determinant is exact.
        Unbiased for the log density and its gradient over uniform batches without replacement.

        Args:
            x: the rows, (b, p), b at least 2.
            indices: which rows they are, (b,), all different.

        Returns:
            The estimate, shape `()`.

        Raises:
            ValueError: shapes that do not fit, or fewer than two rows.
        """
        indices = jnp.asarray(indices)
        if indices.ndim != 1 or len(indices) < 2:
            raise ValueError(
                "RowCorrelated.log_prob_batch: indices must name at least two rows, got shape "
                f"{indices.shape}."
            )
        n, b = self.shape[0], len(indices)
        x = self._check("log_prob_batch", x, b)
        u, log_det = jax.vmap(self.flow.bijection.inverse_and_log_det)(x)
        vectors = self.eigenvectors.value[indices]
        precision = (vectors / self._spectrum()[None]) @ vectors.T
        products = precision * (u @ u.T)
        diagonal = jnp.trace(products)
        rest = jnp.sum(products) - diagonal
        quadratic = n / b * diagonal + n * (n - 1) / (b * (b - 1)) * rest
        return self._log_normaliser() - 0.5 * quadratic + n / b * jnp.sum(log_det)

    def _check(self, method: str, x: Array, rows: int) -> Array:
        x = as_float(x)
        expected = (rows, self.shape[1])
        if x.shape != expected:
            raise ValueError(f"RowCorrelated.{method}: x has shape {x.shape}, expected {expected}.")
        return x
