"""Injective flows: unconstrained networks, on a manifold or in full dimension."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._mlp import MLP
from vflow.distributions import FreeForm
from vflow.flows._checks import check_count, check_widths


class _Skip(eqx.Module):
    """A linear map with a network beside it that starts at zero."""

    linear: Array
    network: MLP

    def __call__(self, x: Array) -> Array:
        return self.linear @ x + self.network(x)


def injective(
    key: PRNGKeyArray,
    dim: int,
    latent_dim: int,
    *,
    hidden: tuple[int, ...] = (128, 128),
    activation: str = "silu",
) -> FreeForm:
    r"""An unconstrained encoder and decoder, for data on a manifold of `latent_dim` dimensions.

    $$f(x) = A x + N_f(x), \qquad g(z) = A^\top z + N_g(z), \qquad A A^\top = I$$

    at the start, with networks that are zero there: $g \circ f$ is then a random projection, and
    the identity where `latent_dim` is `dim` (a free-form flow). All of A, its transpose and the networks are
    free. Train with `vf.objectives.free_form`.

    Args:
        key: PRNG key.
        dim: number of coordinates of the data.
        latent_dim: dimension of the manifold, at most `dim`.
        hidden: widths of the hidden layers of both networks.
        activation: their activation, as in "silu", "tanh".

    Returns:
        The pair, as a `vf.distributions.FreeForm`.

    Raises:
        ValueError: an argument out of range; it is named.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.injective(jax.random.key(0), 3, 3)
        >>> print(bool(jnp.allclose(flow.decode(flow.encode(jnp.ones(3))), 1.0, atol=1e-5)))
        True

    Source:
        Sorrenson et al. 2024 (arXiv 2306.01843).
    """
    check_count("injective", "dim", dim)
    check_count("injective", "latent_dim", latent_dim)
    hidden = check_widths("injective", "hidden", hidden)
    if latent_dim > dim:
        raise ValueError(f"injective: latent_dim must be at most dim = {dim}, got {latent_dim}.")
    key_linear, key_encoder, key_decoder = jax.random.split(key, 3)
    columns = jnp.linalg.qr(jax.random.normal(key_linear, (dim, latent_dim)))[0]
    encoder = _Skip(columns.T, MLP(key_encoder, dim, latent_dim, hidden, activation))
    decoder = _Skip(columns, MLP(key_decoder, latent_dim, dim, hidden, activation))
    return FreeForm(encoder, decoder, dim, latent_dim)
