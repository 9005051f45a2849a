"""Invertible residual flows."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vflow.bijections import AbstractBijection, Affine, Chain, Residual, Scan
from vflow.distributions import AbstractDistribution, Flow
from vflow.flows._checks import check_base, check_count, check_tails, check_widths


def residual(
    key: PRNGKeyArray,
    dim: int,
    *,
    num_layers: int = 8,
    hidden: tuple[int, ...] = (32, 32),
    activation: str = "silu",
    condition_dim: int | None = None,
    lipschitz: float = 0.9,
    base: AbstractDistribution | None = None,
    tails: AbstractBijection | None = None,
) -> Flow:
    r"""An invertible residual flow, $y = x + g(x)$ with $\operatorname{Lip}(g) < 1$. Identity start.

    Dense maps without masks or splits. Log-determinants are exact, by the dense Jacobian: for small
    `dim`. A free elementwise affine map follows the layers.

    Args:
        key: PRNG key of the networks.
        dim: number of coordinates.
        num_layers: number of residual layers.
        hidden: widths of each network's hidden layers.
        activation: their activation, as in "silu", "tanh", "elu".
        condition_dim: length of the condition vector, or None.
        lipschitz: bound of the Lipschitz constant of each $g$, in (0, 1).
        base: distribution on `(dim,)`; standard normal by default.
        tails: a bijection on `(dim,)` applied last, for example one that changes the tails.

    Returns:
        The flow, with event shape `(dim,)`.

    Raises:
        ValueError: an argument out of range; it is named.
        TypeError: base or tails of a wrong type.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.residual(jax.random.key(0), 2, num_layers=2, hidden=(8,))
        >>> print(f"{flow.log_prob(jnp.zeros(2)):.4f}")
        -1.8379

    Source:
        Behrmann et al. 2019 (arXiv 1811.00995); Chen et al. 2019 (arXiv 1906.02735).
    """
    check_count("residual", "dim", dim)
    check_count("residual", "num_layers", num_layers)
    if condition_dim is not None:
        check_count("residual", "condition_dim", condition_dim)
    hidden = check_widths("residual", "hidden", hidden)
    base = check_base("residual", base, dim)
    last = check_tails("residual", tails, dim)

    def make_layer(key: PRNGKeyArray) -> AbstractBijection:
        return Residual(
            key,
            dim,
            hidden=hidden,
            activation=activation,
            condition_dim=condition_dim,
            lipschitz=lipschitz,
        )

    layers = Scan(eqx.filter_vmap(make_layer)(jax.random.split(key, num_layers)))
    affine = Affine(jnp.zeros((dim,)), jnp.ones((dim,)))
    return Flow(base, Chain([layers, affine, *last]))
