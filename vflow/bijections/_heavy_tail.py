"""The output layer of the tail transform flow."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, ArrayLike
from vflow_kernels import heavy_tail_forward, heavy_tail_inverse

from vflow.bijections._tail_layer import AbstractTailLayer, start_loc_scale, start_tails


class HeavyTail(AbstractTailLayer):
    r"""The tail transform flow's output layer: normal in, generalised Pareto tails out.

    $$y = m + \sigma\,\frac{s}{\lambda_s}\left(\operatorname{erfc}(|z|/\sqrt2)^{-\lambda_s} - 1\right),
      \qquad s = \operatorname{sign} z, \qquad \nu_\pm = 1/\lambda_\pm$$

    coordinate by coordinate, with trainable $m$, $\sigma$ and $\lambda_-, \lambda_+$: the network
    in front sees light tails only, which it handles well. For $Z \sim N(0, 1)$, $m = 0$ and
    $\sigma = 1$ each side of $y$ is generalised Pareto exactly,
    $\log q(y) = -\log 2 - (1 + 1/\lambda)\log(1 + \lambda|y|)$. The density has a kink at $m$; see
    `SmoothHeavyTail` for the map without one. The layer is never the identity: for $\nu \to \infty$ its
    output is Laplace. Inputs of any size are fine: where $\sigma^{-1}|y|$ nears the power 0.7 of the
    largest float (in float32 about $10^{27}$), the map goes on as a straight line.

    Args:
        dim: number of coordinates.
        df: degrees of freedom $\nu = 1/\lambda$ to start at, in (0, 1000): a number, one a
            coordinate, or shape (2, dim) for the sides below and above. A coordinate with infinite
            df on both sides is light: it passes as $m + \sigma z$. Start too heavy rather than too
            light, or from `vf.diagnostics.tails`.
        loc: $m$ to start at, a number or shape (dim,).
        scale: $\sigma$ to start at, positive, likewise. None: slope one at $m$, which is
            $\sqrt{\pi/2}$ for heavy coordinates and 1 for light ones.
        trainable_df: whether $\lambda$ is trained; location and scale always are.

    Raises:
        ValueError: a df out of range or infinite on one side only, or a scale that is not positive.
        TypeError: df is traced: its infinite entries decide the structure.

    Example:
        >>> import jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.HeavyTail(2, df=jnp.array([1.0, jnp.inf]))
        >>> print(layer.forward_and_log_det(3.0 * jnp.ones(2))[0].round())
        [463.   3.]

    Source:
        Hickling & Prangle 2025, Flexible tails for normalizing flows (arXiv 2406.16971).
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        df: ArrayLike = 3.0,
        loc: ArrayLike = 0.0,
        scale: ArrayLike | None = None,
        trainable_df: bool = True,
    ):
        self.heavy, self.raw_tail = start_tails("HeavyTail", dim, df, trainable=trainable_df)
        if scale is None:
            slope_one = np.ones(dim)
            slope_one[list(self.heavy)] = math.sqrt(math.pi / 2)
            scale = slope_one
        self.loc, self.log_scale = start_loc_scale("HeavyTail", dim, loc, scale)
        self.shape = (dim,)
        self.condition_shape = None

    def _forward(self, z: Array) -> tuple[Array, Array]:
        return heavy_tail_forward(z, *self._tail().astype(z.dtype))

    def _inverse(self, x: Array) -> tuple[Array, Array]:
        return heavy_tail_inverse(x, *self._tail().astype(x.dtype))
