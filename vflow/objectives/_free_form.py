"""Maximum likelihood for free-form and injective flows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from vflow_kernels import standard_normal_log_density

from vflow.objectives._forward_kl import minibatches


def free_form(
    data: Array,
    batch_size: int | None = None,
    *,
    beta: float = 10.0,
    num_probes: int = 1,
    noise: float = 0.0,
) -> Callable[..., Array]:
    r"""Maximum likelihood of a `FreeForm` flow, with a surrogate for the change of volume.

    $$\log p_Z(f(x)) - \beta\,\|x - g(f(x))\|^2 + \mathbb{E}_v\big[v^\top f'(x)\,
      \mathrm{stop}(g'(z)\, v)\big]$$

    The last term enters by its gradient alone: that is the gradient of
    $\tfrac12 \log\det(f' f'^\top)$ where g inverts f, unbiased over the probes there and only an
    approximation elsewhere: the reconstruction term keeps it good. **The value leaves the
    change of volume out**: report `FreeForm.log_prob`.

    Args:
        data: (n, D) points.
        batch_size: number of points in a minibatch; None takes all.
        beta: weight of the reconstruction error.
        num_probes: orthogonal probes $v$ per point, at most d; d of them make the trace exact.
        noise: standard deviation of Gaussian noise added to the points, in units of the data:
            it thickens the manifold, without which the likelihood is unbounded where d < D.

    Returns:
        An estimate `S(key, q) -> scalar` for a `vf.distributions.FreeForm` q, to be maximised.

    Raises:
        ValueError: empty data, more probes than latent coordinates, or an option out of range.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> flow = vf.flows.injective(jax.random.key(0), 3, 2)
        >>> estimate = vf.objectives.free_form(jnp.ones((10, 3)), batch_size=4)
        >>> print(f"{estimate(jax.random.key(1), flow):.4f}")
        -21.7703

    Source: Sorrenson et al. 2024 (arXiv 2306.01843), equations 6 and 11.
    """
    take = minibatches(data, batch_size)
    if not (beta >= 0 and noise >= 0):
        raise ValueError(f"beta and noise must not be negative, got {beta} and {noise}.")

    def estimate(key: PRNGKeyArray, q: Any) -> Array:
        if not 1 <= num_probes <= q.latent_dim:
            raise ValueError(
                f"num_probes must be between 1 and latent_dim = {q.latent_dim}, got {num_probes}."
            )
        key_data, key_noise, key_probes = jax.random.split(key, 3)
        x = take(key_data)
        x = x + noise * jax.random.normal(key_noise, x.shape, x.dtype)

        def one(key: PRNGKeyArray, x: Array) -> Array:
            z, pull = jax.vjp(q.encode, x)
            probes = jnp.linalg.qr(jax.random.normal(key, (q.latent_dim, num_probes), z.dtype))[0]
            # v = sqrt(d) times an orthonormal column: the mean of v v' is the identity.
            scale = q.latent_dim / num_probes

            def volume(v: Array) -> Array:
                _, tangent = jax.jvp(q.decode, (jax.lax.stop_gradient(z),), (v,))
                (row,) = pull(v)
                return scale * jnp.vdot(row, jax.lax.stop_gradient(tangent))

            surrogate = jnp.sum(jax.vmap(volume, in_axes=1)(probes))
            error = jnp.sum((x - q.decode(z)) ** 2)
            bound = jnp.sum(standard_normal_log_density(z)) - beta * error
            return bound + surrogate - jax.lax.stop_gradient(surrogate)

        return jnp.mean(jax.vmap(one)(jax.random.split(key_probes, len(x)), x))

    return estimate
