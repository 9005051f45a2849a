"""Coupling flows with heavy-tailed outputs."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, PRNGKeyArray

from vflow.bijections import (
    AbstractBijection,
    AbstractTransformer,
    Chain,
    Freeze,
    SmoothHeavyTail,
    TriangularAffine,
)
from vflow.distributions import Flow
from vflow.flows._checks import check_count
from vflow.flows._coupling import coupling


def heavy_tail(
    key: PRNGKeyArray,
    dim: int,
    *,
    df: ArrayLike,
    loc: ArrayLike | None = None,
    tril: ArrayLike | None = None,
    trainable_df: bool = False,
    transformer: str | AbstractTransformer = "affine",
    num_layers: int = 4,
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
    condition_dim: int | None = None,
) -> Flow:
    r"""Couplings on a normal base, then power tails, then a fixed affine map.

    $$x = \mu + L\,R_\nu(T(z)), \qquad z \sim N(0, I)$$

    with $T$ the layers of `coupling` and $R_\nu$ a `SmoothHeavyTail`, whose coordinates with
    infinite df are light. $\mu$ and $L$, the Gaussian at the mode of the target, are not trained; they
    take out linear dependence between heavy coordinates, which no layer inside the tails can follow
    far out, and whose least error would add heavy coordinates to each other if it were trained. A
    report of `vf.diagnostics.tails(target, whiten=True)` has all three, with df in the coordinates of
    that Gaussian. The flow starts at $\mu + L\,R_\nu(z)$. To `vf.fit` pass it with `precondition=None`:
    $\mu$ and $L$ are its preconditioner.

    Args:
        key: PRNG key of the conditioners' weights; the splits do not depend on it.
        dim: number of coordinates.
        df: degrees of freedom of each coordinate of $L^{-1}(x - \mu)$, in (0, 1000), infinite for a
            light one: a number, shape `(dim,)`, or `(2, dim)` for the sides below and above.
        loc: $\mu$, shape `(dim,)`; zero by default.
        tril: $L$, lower triangular with a positive diagonal, shape `(dim, dim)`; the identity by
            default.
        trainable_df: whether the finite df are trained. The gradient of an ELBO hardly sees them.
        transformer: "affine", "spline", or a transformer object.
        num_layers: number of coupling layers; 2 transform every coordinate once.
        hidden: widths of each conditioner's hidden layers.
        activation: their activation, as in "silu", "tanh", "relu".
        condition_dim: length of the condition vector, or None.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range or of a wrong shape; it is named.
        TypeError: df is traced.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> df, tril = jnp.array([1.0, jnp.inf]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> flow = vf.flows.heavy_tail(jax.random.key(0), 2, df=df, tril=tril)
        >>> x, _ = flow.bijection.forward_and_log_det(3.0 * jnp.ones(2))
        >>> print(x.round())  # a heavy coordinate, and one that is normal around it
        [117. 120.]

    Source:
        Hickling & Prangle 2025 (arXiv 2406.16971) for power tails in the last layer.
    """
    check_count("heavy_tail", "dim", dim)
    layers: list[AbstractBijection] = [SmoothHeavyTail(dim, df=df, trainable_df=trainable_df)]
    if loc is not None or tril is not None:
        loc = jnp.zeros((dim,)) if loc is None else jnp.asarray(loc, float)
        tril = jnp.eye(dim) if tril is None else jnp.asarray(tril, float)
        for name, array, shape in (("loc", loc, (dim,)), ("tril", tril, (dim, dim))):
            if array.shape != shape:
                raise ValueError(f"heavy_tail: {name} has shape {array.shape}, expected {shape}.")
            if not isinstance(array, Tracer) and not np.isfinite(array).all():
                raise ValueError(f"heavy_tail: {name} must be finite, got {array}.")
        if not isinstance(tril, Tracer) and np.triu(tril, 1).any():
            raise ValueError(
                "heavy_tail: tril has entries above its diagonal; pass the lower Cholesky factor of a "
                "covariance, not the covariance."
            )
        layers.append(Freeze(TriangularAffine.from_loc_tril(loc, tril)))
    return coupling(
        key,
        dim,
        transformer=transformer,
        num_layers=num_layers,
        hidden=hidden,
        activation=activation,
        condition_dim=condition_dim,
        tails=Chain(layers),
    )
