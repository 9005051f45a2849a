"""Coupling layer with a kernel expansion in place of a network."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import (
    affine_coupling_forward,
    affine_coupling_inverse,
    affine_coupling_push_score,
    kernel_expansion,
    median_lengthscale,
    radial_kernel,
    soft_clamp,
)

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape

# Points that stand in twice because there are fewer of them than centres are set apart by this much.
_APART = 0.1


class KernelisedCoupling(AbstractBijection):
    r"""A coupling layer whose shift and log-scale are kernel expansions (a "Ferumal" layer).

    $$y_{1:k} = x_{1:k}, \qquad y_{k+1:d} = x_{k+1:d}\, e^{\sigma(u)} + m(u), \qquad
      \log|\det J| = \sum_j \sigma_j(u), \qquad u = (x_{1:k}, c)$$
    $$\sigma(u) = \operatorname{clamp}\Big(\sum_{i=1}^n \kappa(u, w_i) A^\sigma_i\Big), \qquad
      m(u) = \sum_{i=1}^n \kappa(u, w_i) A^m_i \;[\,+\, t_0 + B u\,], \qquad
      \kappa(u, w) = \kappa(\|(u - w)/\ell\|)$$

    All of the centres $w$, the lengthscales $\ell$ and the coefficients $A$ are trained:
    $n\,(2(d-k) + \dim u) + \dim u$ numbers, and $(d-k)(1 + \dim u)$ more with `linear_mean`. The
    coefficients start at zero, the map then at the identity. Far from all centres an expansion is
    zero: the layer is the identity there (with `linear_mean`, a shear), so it neither changes the
    tails of the base nor moves or scales everything at once: put an `Affine` behind the layers.

    Args:
        key: PRNG key of the centres, which start as standard normal draws; `place_centres` moves
            them to where the layer's inputs are.
        dim: number of coordinates; 1 is possible with a condition.
        num_centres: n, at least 2.
        kernel: "rbf" (squared exponential), "matern12", "matern32" or "matern52".
        lengthscale: the starting lengthscale, in units of the median heuristic
            $\sqrt{\operatorname{median}\|w_a - w_b\|^2 / 2}$. Long ones are smooth and hard to
            overfit; short ones bend more.
        linear_mean: whether the shift has a linear part $t_0 + B u$.
        min_log_scale: lower bound of $\sigma$, negative.
        max_log_scale: upper bound of $\sigma$, positive.
        condition_dim: length of the condition vector $c$, which joins the kernel's input, or None.
        num_identity: $k$, from 1 (0 with a condition) to dim - 1; dim // 2 by default.

    Raises:
        ValueError: an argument out of range, or nothing for the kernel to depend on.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.KernelisedCoupling(jax.random.key(0), 3, num_centres=10)
        >>> print(layer.forward_and_log_det(jnp.ones(3))[0])
        [1. 1. 1.]

    Source:
        English, Kirchler & Lippert 2024 (arXiv 2307.14839); the bound of the log-scale: Andrade 2024
        (arXiv 2402.16408).
    """

    centres: Array
    log_lengthscale: Array
    scale_coefficients: Array
    shift_coefficients: Array
    mean: tuple[Array, Array] | None
    kernel: str = eqx.field(static=True)
    lengthscale: float = eqx.field(static=True)
    bounds: tuple[float, float] = eqx.field(static=True)
    num_identity: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        num_centres: int = 50,
        kernel: str = "rbf",
        lengthscale: float = 2.0,
        linear_mean: bool = False,
        min_log_scale: float = -2.0,
        max_log_scale: float = 2.0,
        condition_dim: int | None = None,
        num_identity: int | None = None,
    ):
        owner = "KernelisedCoupling"
        self.condition_shape = condition_shape(owner, condition_dim)
        if dim == 1 and condition_dim is None:
            raise ValueError(
                f"{owner}: dim = 1 without a condition leaves the kernel nothing to depend on; use "
                "Elementwise."
            )
        check_dim(owner, dim)
        num_identity = dim // 2 if num_identity is None else num_identity
        least = 1 if condition_dim is None else 0
        if not least <= num_identity < dim:
            raise ValueError(
                f"{owner}: num_identity must be between {least} and dim - 1 = {dim - 1}, got "
                f"{num_identity}."
            )
        if not isinstance(num_centres, int) or isinstance(num_centres, bool) or num_centres < 2:
            raise ValueError(
                f"{owner}: num_centres must be an integer of at least 2, got {num_centres!r}."
            )
        if not 0 < lengthscale < float("inf"):
            raise ValueError(f"{owner}: lengthscale must be positive, got {lengthscale!r}.")
        if not min_log_scale < 0 < max_log_scale:
            raise ValueError(
                f"{owner}: need min_log_scale < 0 < max_log_scale, got {min_log_scale} and "
                f"{max_log_scale}."
            )
        radial_kernel(jnp.zeros(()), kernel)  # raises for an unknown kernel
        num_inputs, num_active = num_identity + (condition_dim or 0), dim - num_identity
        self.kernel, self.lengthscale = kernel, float(lengthscale)
        self.bounds = (float(min_log_scale), float(max_log_scale))
        self.num_identity, self.shape = num_identity, (dim,)
        self.centres = jax.random.normal(key, (num_centres, num_inputs))
        self.log_lengthscale = jnp.log(lengthscale * jax.jit(median_lengthscale)(self.centres))
        self.scale_coefficients = jnp.zeros((num_centres, num_active))
        self.shift_coefficients = jnp.zeros((num_centres, num_active))
        self.mean = None
        if linear_mean:
            self.mean = (jnp.zeros((num_active,)), jnp.zeros((num_inputs, num_active)))

    def place_centres(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> "KernelisedCoupling":
        """The layer with its centres among given inputs, and lengthscales to match.

        The initialisation for data (`x` are the data, pulled back to this layer) or for variational
        inference (`x` are base draws, pushed to it).

        Args:
            key: PRNG key of the choice of rows.
            x: points (n, dim); rows are chosen without replacement. With fewer rows than centres, all
                are taken as often as needed, the repetitions moved by a tenth of the spread.
            condition: (n, condition_dim), or None.

        Returns:
            The layer with new `centres` and `log_lengthscale`; its coefficients are kept.

        Example:
            >>> import jax, jax.numpy as jnp, vflow as vf
            >>> layer = vf.bijections.KernelisedCoupling(jax.random.key(0), 2, num_centres=3)
            >>> x = jnp.arange(8.0).reshape(4, 2)
            >>> print(layer.place_centres(jax.random.key(1), x).centres.shape)
            (3, 1)
        """
        inputs = x[:, : self.num_identity]
        if condition is not None:
            inputs = jnp.concatenate([inputs, condition.astype(x.dtype)], axis=1)
        n, (count, width) = len(inputs), self.centres.shape
        row_key, noise_key = jax.random.split(key)
        index = jnp.arange(count)
        chosen = inputs[jax.random.permutation(row_key, n)[index % n]]
        moved = _APART * jax.random.normal(noise_key, (count, width), chosen.dtype)
        moved = jnp.where((index >= n)[:, None], moved, 0) * jnp.std(inputs, axis=0)[None]
        centres = (chosen + moved).astype(self.centres.dtype)
        log_lengthscale = jnp.log(self.lengthscale * median_lengthscale(centres))
        return eqx.tree_at(
            lambda layer: (layer.centres, layer.log_lengthscale), self, (centres, log_lengthscale)
        )

    def _shift_and_log_scale(self, passive: Array, condition: Array | None) -> tuple[Array, Array]:
        u = passive if condition is None else jnp.concatenate([passive, condition])
        coefficients = jnp.concatenate([self.shift_coefficients, self.scale_coefficients], axis=1)
        out = kernel_expansion(u, self.centres, self.log_lengthscale, coefficients, self.kernel)
        shift, raw = jnp.split(out, 2)
        if self.mean is not None:
            shift = shift + self.mean[0] + u @ self.mean[1]
        return shift, soft_clamp(raw, *self.bounds)

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One kernel expansion."""
        k = self.num_identity
        active, log_derivative = affine_coupling_forward(
            x[k:], *self._shift_and_log_scale(x[:k], condition)
        )
        return jnp.concatenate([x[:k], active]), jnp.sum(log_derivative)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One kernel expansion."""
        k = self.num_identity
        active, log_derivative = affine_coupling_inverse(
            y[k:], *self._shift_and_log_scale(y[:k], condition)
        )
        return jnp.concatenate([y[:k], active]), jnp.sum(log_derivative)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """One kernel expansion and one product with its transposed input Jacobian."""
        k = self.num_identity
        (shift, log_scale), pull = jax.vjp(
            lambda passive: self._shift_and_log_scale(passive, condition), x[:k]
        )
        active, _ = affine_coupling_forward(x[k:], shift, log_scale)
        score_active, *cotangent = affine_coupling_push_score(x[k:], score[k:], log_scale)
        score_passive = score[:k] - pull(tuple(cotangent))[0]
        y = jnp.concatenate([x[:k], active])
        return y, jnp.sum(log_scale), jnp.concatenate([score_passive, score_active])
