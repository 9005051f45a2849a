"""Where a fit of globals and locals starts: Laplace approximations of each row's locals along the globals."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from scipy.optimize import minimize

from vflow._core import FitError
from vflow.targets._rows import Rows

_NEWTON = 10
_STEPS = (1.0, 0.3, 0.1, 0.02, 0.0)
_CHUNK = 1024  # rows in memory at once
_SUBSET = 1024  # rows that the first climbs look at
_NUM_STARTS = 4
_FLOOR = 1e-6  # of a curvature


class Start(NamedTuple):
    r"""Gaussian of the globals; Laplace approximations of the rows at its mean, in float64.

    Attributes:
        mean: of the globals, shape (G,).
        tril: lower root of their covariance, shape (G, G).
        loc: mode of each row's locals, shape (size, L).
        slope: its derivative in the whitened globals, shape (size, L, G).
        scale: lower root of the inverse curvature there, shape (size, L, L).
        value: log p(y_i | g) of each row by Laplace at the mean, shape (size,).
        gradient: its derivative in the globals, shape (size, G).
    """

    mean: np.ndarray
    tril: np.ndarray
    loc: np.ndarray
    slope: np.ndarray
    scale: np.ndarray
    value: np.ndarray
    gradient: np.ndarray


def _eigen(curvature: Array) -> tuple[Array, Array]:
    if curvature.shape == (1, 1):
        return curvature[0], jnp.ones_like(curvature)
    values, vectors = jnp.linalg.eigh(curvature)
    return values, vectors


def _mode(rows: Rows, g: Array, row: Array, data: Any) -> tuple[Array, Array]:
    """The mode of a row's locals given the globals, and the curvature there.

    Newton's steps, halved until they climb; the last one is differentiable in g, which makes the
    derivative of the mode that of the implicit function theorem.
    """
    density = lambda own: rows.row_log_prob(g, own, row, data)
    zero = jnp.zeros_like(g, shape=(rows.num_locals,))

    def direction(own):
        values, vectors = _eigen(-jax.hessian(density)(jax.lax.stop_gradient(own)))
        values = jnp.maximum(jnp.abs(values), _FLOOR)
        values, vectors = jax.lax.stop_gradient((values, vectors))
        return vectors @ ((vectors.T @ jax.grad(density)(own)) / values)

    def step(own, _):
        trials = own[None, :] + jnp.asarray(_STEPS, own.dtype)[:, None] * direction(own)[None, :]
        values = jax.vmap(density)(trials)
        return trials[jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))], None

    own = jax.lax.stop_gradient(jax.lax.scan(step, zero, None, _NEWTON)[0])
    own = own + direction(own)
    return own, -jax.hessian(density)(own)


def row_evidence(rows: Rows, g: Array, row: Array, data: Any) -> Array:
    r"""$\log p(y_i \mid g)$ by Laplace's approximation; exact where the conditional is Gaussian."""
    if not rows.num_locals:
        return rows.row_log_prob(g, jnp.zeros_like(g, shape=(0,)), row, data)
    own, curvature = _mode(rows, g, row, data)
    values, _ = _eigen(curvature)
    log_det = jnp.sum(jnp.log(jnp.maximum(values, _FLOOR)))
    constant = 0.5 * rows.num_locals * math.log(2 * math.pi)
    return rows.row_log_prob(g, own, row, data) + constant - 0.5 * log_det


def _density(rows: Rows) -> Callable[..., tuple[float, np.ndarray]]:
    """(g, numbers of rows) -> value and gradient of the marginal density, scaled up to all rows."""
    chunk, data = min(rows.size, _CHUNK), jax.device_put(rows.data)

    @jax.jit
    def total(g, numbers, weights, count, data):
        def of_chunk(g, i):
            each = jax.vmap(lambda row: row_evidence(rows, g, row, data))(numbers[i])
            return jnp.sum(jnp.where(weights[i] > 0, each, 0.0))

        def body(i, sums):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(of_chunk)(g, i))

        value, grad = jax.lax.fori_loop(0, count, body, (jnp.sum(0 * g), 0 * g))
        scale = rows.size / jnp.sum(weights)
        shared, shared_grad = jax.value_and_grad(rows.global_log_prob)(g)
        return shared + scale * value, shared_grad + scale * grad

    whole = -(-rows.size // chunk) * chunk

    def density(g, numbers):
        count = -(-len(numbers) // chunk)
        padded, weights = np.zeros(whole, int), np.zeros(whole)
        padded[: len(numbers)], weights[: len(numbers)] = numbers, 1.0
        shape = (-1, chunk)
        value, grad = total(g, padded.reshape(shape), weights.reshape(shape), count, data)
        return float(value), np.asarray(grad)

    return density


def find_start(rows: Rows, key: PRNGKeyArray) -> Start:
    r"""The Gaussian of the globals by Laplace on the marginal density, and the rows at its mean.

    The marginal density $p(g) \prod_i \hat p(y_i \mid g)$ has the locals integrated out by Laplace's
    approximation, so that no funnel is left between them and their scale. It is climbed from prior draws
    and the origin on a subset of the rows, then on all of them.

    Args:
        rows: the model.
        key: PRNG key.

    Raises:
        FitError: the density is not finite at any start.
    """
    density, dim = _density(rows), rows.num_globals
    key_prior, key_rows = jax.random.split(key)
    starts = np.asarray(rows.prior_globals(key_prior, _NUM_STARTS - 1), np.float64)
    starts = np.concatenate([np.zeros((1, dim)), starts])
    chosen = np.random.default_rng(np.asarray(jax.random.key_data(key_rows))).permutation(rows.size)
    subset, everything = chosen[:_SUBSET], np.arange(rows.size)
    best, eye = None, np.eye(dim)
    for start in starts:
        if not math.isfinite(density(start, subset)[0]):
            continue
        mode, value = _climb(density, subset, start, eye)
        root = _root(density, subset, mode, eye)
        score = value + np.log(np.diag(root)).sum()  # Laplace's evidence: wide modes weigh more
        if best is None or score > best[0]:
            best = score, mode, root
    if best is None:
        raise FitError(
            "fit: the density of the globals, with the locals integrated out, is not finite at any of "
            f"{len(starts)} starts (the origin, prior draws): check the data for NaN and the priors."
        )
    _, mean, tril = best
    if rows.size > len(subset):
        mean, _ = _climb(density, everything, mean, tril)
        tril = _root(density, everything, mean, tril)
    return start_at(rows, mean, tril)


def start_at(rows: Rows, mean: np.ndarray, tril: np.ndarray) -> Start:
    """The Laplace approximations of the rows at the mean of a Gaussian of the globals.

    Raises:
        FitError: the density of a row is not finite there.
    """
    start = Start(mean, tril, *_tables(rows, mean, tril))
    broken = ~(np.isfinite(start.value) & np.isfinite(start.gradient).all(axis=1))
    if broken.any():
        raise FitError(
            f"fit: the density of {int(broken.sum())} of {rows.size} rows of plate {rows.plate!r} is not "
            f"finite at the start, first of row {int(np.argmax(broken))}: check its data."
        )
    return start


def _climb(density: Any, numbers: Any, start: np.ndarray, tril: np.ndarray):
    """The mode and the value there, by L-BFGS in coordinates whitened by `tril`."""

    def loss(z):
        value, grad = density(start + tril @ z, numbers)
        if not (math.isfinite(value) and np.isfinite(grad).all()):
            return 1e100, np.zeros_like(z)
        return -value, -tril.T @ grad

    result = minimize(loss, np.zeros(len(start)), jac=True, method="L-BFGS-B")
    return start + tril @ result.x, -result.fun


def _root(density: Any, numbers: Any, mode: np.ndarray, tril: np.ndarray) -> np.ndarray:
    """A lower root of the inverse curvature, by differences of gradients along `tril`'s columns."""
    step = 1e-4
    columns = []
    for column in tril.T:
        up, down = (density(mode + sign * step * column, numbers)[1] for sign in (1, -1))
        columns.append(-tril.T @ (up - down) / (2 * step))
    curvature = np.stack(columns)
    if not np.isfinite(curvature).all():
        return tril
    values, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
    root = tril @ (vectors / np.sqrt(np.maximum(np.abs(values), 1e-8)))
    upper = np.linalg.qr(root.T, mode="r")
    return (upper * np.where(np.diag(upper) < 0, -1.0, 1.0)[:, None]).T  # pyright: ignore[reportAttributeAccessIssue]


def _tables(rows: Rows, mean: np.ndarray, tril: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of `Start` that have an entry a row."""
    num_locals = rows.num_locals

    def one(row, data):
        g = jnp.asarray(mean)
        value, grad = jax.value_and_grad(lambda g: row_evidence(rows, g, row, data))(g)
        if not num_locals:
            return value, grad
        own, curvature = _mode(rows, g, row, data)
        slope = jax.jacrev(lambda g: _mode(rows, g, row, data)[0])(g) @ tril
        values, vectors = _eigen(curvature)
        inverse = (vectors / jnp.maximum(jnp.abs(values), _FLOOR)[None, :]) @ vectors.T
        return own, slope, jnp.linalg.cholesky(inverse), value, grad

    table = jax.jit(
        lambda data: jax.lax.map(
            lambda row: one(row, data), jnp.arange(rows.size), batch_size=min(rows.size, _CHUNK)
        )
    )
    found = tuple(np.asarray(x) for x in table(rows.data))
    if num_locals:
        return found
    shapes = (rows.size, 0), (rows.size, 0, len(mean)), (rows.size, 0, 0)
    return *(np.zeros(shape) for shape in shapes), *found
