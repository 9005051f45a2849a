"""Continuous flows: the solution of an ordinary differential equation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vflow._core._mlp import MLP
from vflow.bijections._bijection import AbstractBijection
from vflow.bijections._checks import check_dim, condition_shape


def _diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "Continuous needs diffrax: install the package with its extra, vflow-jax[cnf]."
        ) from error
    return diffrax


class Continuous(AbstractBijection):
    r"""The flow of a velocity field from time 0 to 1, solved to a tolerance.

    $$\frac{dx}{dt} = v(x, t, c), \qquad \frac{d\ell}{dt} = \operatorname{tr}\frac{\partial v}{\partial x},
      \qquad \frac{ds}{dt} = -\Big(\frac{\partial v}{\partial x}\Big)^{\!\top} s
      - \nabla_x \operatorname{tr}\frac{\partial v}{\partial x}$$

    $v$ is a multilayer perceptron whose last layer starts at zero, the map then at the identity;
    $\ell$ is the log-det and $s$ the score. The trace is exact, `dim` Jacobian columns per
    evaluation; the inverse integrates backwards, so round trips agree to the tolerance. With
    `trace="hutchinson"` a draw inside an objective that is linear in $\log q$ has the unbiased estimate
    $\varepsilon^\top (\partial v/\partial x)\,\varepsilon$ instead, one column, with one
    $\varepsilon_i = \pm 1$ for the whole solution; it is not unbiased for $1/q$, so other objectives, the
    verdict and `resample` keep the exact one, and path gradients, which need it, are refused. Costs
    some hundred couplings: never a first choice in variational inference. diffrax solves (Tsit5,
    adaptive steps).

    Args:
        key: PRNG key of the network.
        dim: number of coordinates.
        hidden: widths of its hidden layers.
        activation: its activation: a smooth one, as in "tanh", "silu".
        condition_dim: length of the condition vector $c$, or None.
        tolerance: relative and absolute tolerance of the solver; keep 1e-6 or more in float32.
        adjoint: "recursive" differentiates backwards only and is fast; "direct" allows forward mode
            (`jax.jacfwd`) and second derivatives, and compiles and runs several times slower.
        trace: "exact", or "hutchinson" for an estimate where the objective allows one.
        max_steps: steps after which the solver gives up with an error.

    Raises:
        ImportError: diffrax is not installed (the `cnf` extra).
        ValueError: an argument out of range.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> layer = vf.bijections.Continuous(jax.random.key(0), 2, hidden=(8,))
        >>> print(layer.forward_and_log_det(jnp.ones(2))[0])
        [1. 1.]

    Source:
        Chen, Rubanova, Bettencourt & Duvenaud 2018 (arXiv 1806.07366), equation 8; the estimate:
        Grathwohl et al. 2019 (arXiv 1810.01367); the score: Vaitl, Nicoli, Nakajima & Kessel 2022
        (arXiv 2203.15845).
    """

    velocity: MLP
    tolerance: float = eqx.field(static=True)
    adjoint: str = eqx.field(static=True)
    trace: str = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        dim: int,
        *,
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "tanh",
        condition_dim: int | None = None,
        tolerance: float = 1e-5,
        adjoint: str = "recursive",
        trace: str = "exact",
        max_steps: int = 256,
    ):
        _diffrax()
        check_dim("Continuous", dim)
        self.condition_shape = condition_shape("Continuous", condition_dim)
        if not 0 < tolerance < 1:
            raise ValueError(f"Continuous: tolerance must lie in (0, 1), got {tolerance}.")
        if adjoint not in ("recursive", "direct"):
            raise ValueError(
                f'Continuous: adjoint must be "recursive" or "direct", got {adjoint!r}.'
            )
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f'Continuous: trace must be "exact" or "hutchinson", got {trace!r}.')
        if max_steps < 1:
            raise ValueError(f"Continuous: max_steps must be positive, got {max_steps}.")
        self.velocity = MLP(key, dim + 1 + (condition_dim or 0), dim, hidden, activation)
        self.tolerance, self.adjoint, self.max_steps = float(tolerance), adjoint, int(max_steps)
        self.trace = trace
        self.shape = (dim,)

    def _field(
        self, t: Array, condition: Array | None, probe: Array | None = None
    ) -> Callable[[Array], tuple[Array, Array]]:
        """The velocity and its divergence, or the estimate of it by a probe, as functions of x."""
        rest = [t[None]] if condition is None else [t[None], condition]

        def velocity(x: Array) -> Array:
            return self.velocity(jnp.concatenate([x, *rest]))

        def field(x: Array) -> tuple[Array, Array]:
            if probe is not None:
                value, push = jax.jvp(velocity, (x,), (probe,))
                return value, jnp.vdot(probe, push)
            value, columns = jax.linearize(velocity, x)
            return value, jnp.trace(jax.vmap(columns)(jnp.eye(x.size, dtype=x.dtype)))

        return field

    def _solve(self, rate: Callable[..., Any], start: Any, t0: float, t1: float) -> Any:
        diffrax = _diffrax()
        adjoint = (
            diffrax.RecursiveCheckpointAdjoint()
            if self.adjoint == "recursive"
            else diffrax.DirectAdjoint()
        )
        dtype = jax.tree.leaves(start)[0].dtype
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, state, _: rate(jnp.asarray(t, dtype), state)),
            diffrax.Tsit5(),
            t0,
            t1,
            None,
            start,
            stepsize_controller=diffrax.PIDController(rtol=self.tolerance, atol=self.tolerance),
            adjoint=adjoint,
            max_steps=self.max_steps,
        )
        return jax.tree.map(lambda leaf: leaf[0], solution.ys)

    def _transport(
        self, x: Array, condition: Array | None, t0: float, t1: float, probe: Array | None = None
    ) -> tuple[Array, Array]:
        def rate(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            return self._field(t, condition, probe)(state[0])

        return self._solve(rate, (x, jnp.zeros_like(x[0])), t0, t1)

    def forward_and_log_det(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One solution forwards in time."""
        return self._transport(x, condition, 0.0, 1.0)

    @property
    def estimated(self) -> bool:
        """Whether the trace is estimated where the objective allows it."""
        return self.trace == "hutchinson"

    def forward_and_estimate(
        self, key: PRNGKeyArray, x: Array, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One solution with one probe of the Jacobian, or with all of it."""
        probe = jax.random.rademacher(key, x.shape, x.dtype) if self.estimated else None
        return self._transport(x, condition, 0.0, 1.0, probe)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """One solution backwards in time."""
        return self._transport(y, condition, 1.0, 0.0)

    def push_score(
        self, x: Array, score: Array, condition: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """One solution with the score beside the point: no inverse."""
        if self.estimated:
            raise NotImplementedError(
                'Continuous with trace="hutchinson" has no path gradient, which needs the exact '
                "trace: use gradient='total', or trace=\"exact\"."
            )

        def rate(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, _, score = state
            (velocity, divergence), pull = jax.vjp(self._field(t, condition), x)
            (rise,) = pull((score, jnp.ones_like(divergence)))
            return velocity, divergence, -rise

        return self._solve(rate, (x, jnp.zeros_like(x[0]), score), 0.0, 1.0)
