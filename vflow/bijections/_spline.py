"""The rational-quadratic spline transformer."""

from typing import ClassVar

import equinox as eqx
from jaxtyping import Array
from vflow_kernels import spline_forward, spline_inverse

from vflow.bijections._transformer import AbstractTransformer


class Spline(AbstractTransformer):
    r"""A monotone rational-quadratic spline on $[-B, B]$; the identity outside.

    $\phi$ holds the raw widths and heights of K bins and the raw slopes at the K - 1 knots between
    them; zeros give the identity. More flexible than an affine map (several modes, skewness) at K
    times the parameters. The tails stay those of the base: $B$ has to cover the bulk of the
    standardised target, location and scale belong into an affine layer outside.

    Args:
        num_bins: K, from 2 to 500.
        bound: $B$, positive.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> spline = vf.bijections.Spline(num_bins=4)
        >>> y, log_derivative = spline.forward(jnp.ones(()), jnp.arange(11.0))
        >>> print(f"{y:.4f} {log_derivative:.4f}")
        3.7660 -0.8046

    Source:
        Durkan, Bekasov, Murray & Papamakarios 2019 (arXiv 1906.04032).
    """

    num_bins: int = eqx.field(static=True, default=8)
    bound: float = eqx.field(static=True, default=5.0)
    elementwise: ClassVar[bool] = True

    def __check_init__(self):
        if not isinstance(self.num_bins, int) or not 2 <= self.num_bins <= 500:
            raise ValueError(
                f"Spline: num_bins must be an integer from 2 to 500, got {self.num_bins!r}."
            )
        if not 0 < self.bound < float("inf"):
            raise ValueError(f"Spline: bound must be positive and finite, got {self.bound!r}.")

    @property
    def num_params(self) -> int:
        """3K - 1: widths, heights and inner slopes."""
        return 3 * self.num_bins - 1

    def forward(self, x: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau(x; \phi), \log\tau'(x; \phi))$; shapes () and ()."""
        return spline_forward(x, params, self.bound)

    def inverse(self, y: Array, params: Array) -> tuple[Array, Array]:
        r"""$(\tau^{-1}(y; \phi), \log(\tau^{-1})'(y; \phi))$; shapes () and ()."""
        return spline_inverse(y, params, self.bound)
