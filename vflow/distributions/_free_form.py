"""Free-form and injective flows: any encoder, any decoder."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import standard_normal_log_density

from vflow._core._numerics import as_float


class FreeForm(eqx.Module):
    r"""An encoder $f: \mathbb{R}^D \to \mathbb{R}^d$ and a decoder $g$ without any constraint.

    Trained by `vf.objectives.free_form` until $g(f(x)) \approx x$, it is a normalizing flow with
    $d = D$ and a density on a d-dimensional manifold with $d < D$: draws are $g(z)$ with z standard
    normal. `vf.flows.injective` builds one.

    It is no Program: its density is with respect to the manifold's own volume where $d < D$, and
    as exact as the reconstruction where $d = D$, so it has no importance weights and cannot
    be fitted to a model.

    Args:
        encoder: f, a module that maps `(D,)` to `(d,)`.
        decoder: g, a module that maps `(d,)` to `(D,)`.
        dim: D, number of coordinates of the data.
        latent_dim: d, at most D.

    Raises:
        ValueError: dimensions out of range, or modules of other shapes.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.injective(jax.random.key(0), 5, 2)
        >>> print(flow.encode(jnp.ones(5)).shape, flow.sample(jax.random.key(1)).shape)
        (2,) (5,)

    Source:
        Sorrenson, Draxler, Rousselot, Hummerich, Zimmermann & Koethe 2024, Lifting Architectural
        Constraints of Injective Flows (arXiv 2306.01843).
    """

    encoder: Callable[[Array], Array]
    decoder: Callable[[Array], Array]
    shape: tuple[int, ...] = eqx.field(static=True)
    latent_dim: int = eqx.field(static=True)

    def __init__(
        self,
        encoder: Callable[[Array], Array],
        decoder: Callable[[Array], Array],
        dim: int,
        latent_dim: int,
    ):
        if not 1 <= latent_dim <= dim:
            raise ValueError(
                f"FreeForm: latent_dim must be between 1 and dim = {dim}, got {latent_dim}."
            )
        for name, module, size, expected in (
            ("encoder", encoder, dim, latent_dim),
            ("decoder", decoder, latent_dim, dim),
        ):
            try:
                found = eqx.filter_eval_shape(module, jnp.zeros(size)).shape
            except (TypeError, ValueError) as error:
                raise ValueError(f"FreeForm: {name} does not take ({size},): {error}") from error
            if found != (expected,):
                raise ValueError(
                    f"FreeForm: {name} must map ({size},) to ({expected},), got {found}."
                )
        self.encoder, self.decoder = encoder, decoder
        self.shape = (dim,)
        self.latent_dim = latent_dim

    def encode(self, x: Array) -> Array:
        """The latent vector of one point: `(D,)` to `(d,)`."""
        return self.encoder(as_float(x))

    def decode(self, z: Array) -> Array:
        """The point of one latent vector: `(d,)` to `(D,)`."""
        return self.decoder(as_float(z))

    def sample(self, key: PRNGKeyArray) -> Array:
        """One draw, shape `(D,)`."""
        return self.decode(jax.random.normal(key, (self.latent_dim,)))

    def log_prob(self, x: Array) -> Array:
        r"""The log density at $g(f(x))$, for reporting: one Jacobian and one determinant per point.

        $$\log p_Z(z) - \tfrac12 \log\det(J^\top J), \qquad z = f(x),\; J = \partial g/\partial z$$

        Exact for the decoder's distribution at the reconstruction of x, with respect to the volume
        of the manifold (Lebesgue measure where d = D).

        Args:
            x: a point, shape `(D,)`.

        Returns:
            The log density in nats, shape `()`.
        """
        z = self.encode(x)
        triangle = jnp.linalg.qr(jax.jacfwd(self.decode)(z), mode="r")
        volume = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(triangle))))
        return jnp.sum(standard_normal_log_density(z)) - volume
