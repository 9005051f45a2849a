"""Radial layer."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import radial_constrain, radial_forward, radial_inverse, radial_push_score

from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim

# alpha = 1 and beta = 0 in `radial_constrain`: both are log(exp(0.999) - 1).
_NEUTRAL = math.log(math.expm1(0.999))


class Radial(AbstractBijection):
    r"""A radial layer: space expands or contracts around a point.

    $$y = x + \frac{\beta}{\alpha + r}\,(x - x_0), \qquad r = \|x - x_0\|, \qquad
      \alpha > 0, \quad \beta > -\alpha$$

    $\alpha = \varepsilon + \log(1 + e^{\hat\alpha})$ and
    $\beta = -(1 - \varepsilon)\,\alpha + \log(1 + e^{\hat\beta})$ make it invertible for all
    parameters; the inverse is closed-form. The layer starts at the identity, $\beta = 0$, around a
    random point; the gradient for $\hat\beta$ is not zero there. The trained leaves are `centre`
    ($x_0$), `raw_alpha` and `raw_beta`.

    Args:
        key: PRNG key of the centre, a draw of $N(0, I)$.
        dim: number of coordinates $d$.

    Raises:
        ValueError: a dim below 1.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Radial(jax.random.key(0), 2)
        >>> print(layer.forward_and_log_det(jnp.ones(2))[0])
        [1. 1.]

    Source:
        Rezende & Mohamed 2015 (arXiv 1505.05770), equation 14 and appendix A.2.
    """

    centre: Array
    raw_alpha: Array
    raw_beta: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: None = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, dim: int):
        check_dim("Radial", dim)
        self.centre = jax.random.normal(key, (dim,))
        self.raw_alpha = jnp.full((), _NEUTRAL)
        self.raw_beta = jnp.full((), _NEUTRAL)
        self.shape = (dim,)
        self.condition_shape = None

    def _params(self) -> tuple[Array, Array, Array]:
        return self.centre, *radial_constrain(self.raw_alpha, self.raw_beta)

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One distance."""
        return radial_forward(x, *self._params())

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One distance and a quadratic equation."""
        return radial_inverse(y, *self._params())

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """By the Sherman-Morrison formula: one product with the unit vector, no inverse."""
        return radial_push_score(x, score, *self._params())
