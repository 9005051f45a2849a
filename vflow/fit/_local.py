"""A family for globals and one vector of locals a row: a flow, and conditional Gaussians given it."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Frozen, stop_gradient
from vflow._core._mlp import MLP
from vflow.distributions import AbstractDistribution
from vflow.fit._local_start import Start

_HIDDEN = (32, 32)
# Corrections move at a tenth of the optimiser's rate: rows add up, and a tilt that is the same for N of them
# counts once it is as large as 1 / sqrt(N).
_GENTLY = 0.1
_REACH = 4.0  # standardised inputs of the networks saturate there


class Locals(eqx.Module):
    r"""$q(l_i \mid g) = N(m_i(g), C_i(g) C_i(g)^\top)$, the conditional of one row's locals.

    $$m_i(g) = a_i + J_i z + T_i \delta(z, f_i), \quad C_i(g) = T_i \operatorname{diag} e^{s_i + s(z, f_i)}$$

    with $z = L^{-1}(g - \mu)$ the whitened globals, $f_i$ features of row i and $(\delta, s)$ a network
    shared by all rows, zero at first. "per-datum": $a_i, J_i, T_i$ start at the Laplace approximation
    of $p(l_i \mid g, y_i)$ along $g$, with trained corrections for each row, and are the features.
    "amortised": a second network makes them of the row's data, the features then.

    Args:
        key: PRNG key of the networks' weights.
        start: the Laplace approximations.
        features: of the rows, shape (size, F), if the family is to be amortised over them.
    """

    centre: Frozen
    base: Frozen
    features: Frozen
    table: tuple[Array, Array, Array] | None
    encoder: MLP | None
    correction: MLP

    def __init__(self, key: PRNGKeyArray, start: Start, features: np.ndarray | None = None):
        size, num_locals = start.loc.shape
        num_globals = len(start.mean)
        key_encoder, key_correction = jax.random.split(key)
        white = np.linalg.inv(start.tril)
        self.centre = Frozen((jnp.asarray(start.mean), jnp.asarray(white)))
        if features is None:
            base = start.loc, start.slope, start.scale
            spread = np.log(np.diagonal(start.scale, axis1=1, axis2=2))
            features = np.concatenate([start.loc, spread], axis=1)
            shift = jnp.zeros((size, num_locals))
            self.table = (shift, jnp.zeros((size, num_locals, num_globals)), jnp.zeros_like(shift))
            self.encoder = None
        else:
            loc, scale = start.loc.mean(0), np.linalg.cholesky(_covariance(start))
            base = loc[None], start.slope.mean(0)[None], scale[None]
            out = num_locals * (2 + num_globals)
            self.table = None
            self.encoder = MLP(key_encoder, features.shape[1], out, (64, 64))
        self.base = Frozen(tuple(jnp.asarray(x) for x in base))
        self.features = Frozen(jnp.asarray(_standardised(features)))
        width = num_globals + features.shape[1]
        self.correction = MLP(key_correction, width, 2 * num_locals, _HIDDEN)

    def coefficients(self, row: Array) -> tuple[Array, Array, Array]:
        """$a_i$, $J_i$ and $T_i$ of a row, before the shared network."""
        loc, slope, scale = self.base.value
        if self.encoder is None:
            loc, slope, scale = loc[row], slope[row], scale[row]
            table = self.table or ()
            shift, tilt, log_scale = (_GENTLY * x[row] for x in table)
        else:
            loc, slope, scale = loc[0], slope[0], scale[0]
            out = self.encoder(self.features.value[row])
            num_locals = len(loc)
            shift, log_scale = out[:num_locals], out[num_locals : 2 * num_locals]
            tilt = out[2 * num_locals :].reshape(slope.shape)
        loc, slope = loc + scale @ shift, slope + scale @ tilt
        return loc, slope, scale * jnp.exp(_soft(log_scale))[None, :]

    def moments(self, g: Array, row: Array) -> tuple[Array, Array]:
        """Mean, shape (L,), and lower root of the covariance, shape (L, L)."""
        mean, white = self.centre.value
        z = white @ (g - mean)
        loc, slope, scale = self.coefficients(row)
        near = _REACH * jnp.tanh(z / _REACH)
        out = self.correction(jnp.concatenate([near, self.features.value[row]]))
        delta, log_scale = jnp.split(_GENTLY * out, 2)
        return loc + slope @ z + scale @ delta, scale * jnp.exp(_soft(log_scale))[None, :]

    def draw(self, eps: Array, g: Array, row: Array, *, path: bool = False) -> tuple[Array, Array]:
        """Locals of a row from standard normal `eps`, shape (L,), and their log density.

        With `path`, the density depends on the parameters through g and the draw alone.
        """
        mean, root = self.moments(g, row)
        value = mean + root @ eps
        if path:
            return value, stop_gradient(self).log_prob(value, g, row)
        return value, _log_normal(eps, root)

    def log_prob(self, value: Array, g: Array, row: Array) -> Array:
        """The conditional log density of a row's locals."""
        mean, root = self.moments(g, row)
        return _log_normal(_forward_substitution(root, value - mean), root)


def _forward_substitution(root: Array, y: Array) -> Array:
    """The solution of root @ x = y, row by row.

    Batches of small systems go to a parallel LAPACK call on CPUs, which with few cores may hang.
    """

    def step(x, inputs):
        i, row, value = inputs
        return x.at[i].set((value - row @ x) / row[i]), None

    return jax.lax.scan(step, jnp.zeros_like(y), (jnp.arange(len(y)), root, y))[0]


def _log_normal(eps: Array, root: Array) -> Array:
    scale = jnp.sum(jnp.log(jnp.diagonal(root)))
    return -0.5 * jnp.sum(eps**2) - 0.5 * len(eps) * math.log(2 * math.pi) - scale


def _soft(log_scale: Array) -> Array:
    """Within a factor of e^3 of what there is."""
    return 3.0 * jnp.tanh(log_scale / 3.0)


def _standardised(features: np.ndarray) -> np.ndarray:
    spread = features.std(axis=0)
    z = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return _REACH * np.tanh(z / _REACH)


def _covariance(start: Start) -> np.ndarray:
    """Of the locals over rows: between their means and within."""
    centred = start.loc - start.loc.mean(0)
    within = np.einsum("nij,nkj->ik", start.scale, start.scale) / len(start.loc)
    return centred.T @ centred / len(centred) + within


class LocalFlow(AbstractDistribution):
    r"""$q(g) \prod_i q(l_i \mid g)$: a flow on the globals, a conditional for each row's locals.

    Args:
        shared: the family of the globals, on (G,).
        local: the conditionals.
        global_index: which coordinates are global, shape (G,).
        local_index: which are those of each row, shape (size, L).
    """

    shared: AbstractDistribution
    local: Locals
    global_index: Array
    local_index: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, shared: Any, local: Locals, global_index: Any, local_index: Any):
        self.shared, self.local = shared, local
        self.global_index, self.local_index = jnp.asarray(global_index), jnp.asarray(local_index)
        self.shape = (self.global_index.size + self.local_index.size,)
        self.condition_shape = None

    def join(self, g: Array, own: Array) -> Array:
        """The vector of globals, shape (G,), and locals, shape (size, L)."""
        x = jnp.zeros_like(g, shape=self.shape)
        return x.at[self.global_index].set(g).at[self.local_index].set(own)

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density, both differentiable in the parameters."""
        key_shared, key_local = jax.random.split(key)
        g, log_q = self.shared.sample_and_log_prob(key_shared)
        eps = jax.random.normal(key_local, self.local_index.shape, g.dtype)
        rows = jnp.arange(len(eps))
        own, log_own = jax.vmap(lambda e, i: self.local.draw(e, g, i))(eps, rows)
        return self.join(g, own), log_q + jnp.sum(log_own)

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x`, shape `(dim,)`."""
        g, own = x[self.global_index], x[self.local_index]
        log_own = jax.vmap(lambda v, i: self.local.log_prob(v, g, i))(own, jnp.arange(len(own)))
        return self.shared.log_prob(g) + jnp.sum(log_own)
