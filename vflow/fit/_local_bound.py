"""Objectives on a minibatch of rows: unbiased where they are linear in the log densities."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import ProgramError
from vflow.fit._local import LocalFlow, Locals
from vflow.fit._minibatch import draw_rows
from vflow.programs import expect
from vflow.programs._frame import current_frame
from vflow.programs._nested import check_linear, mark
from vflow.targets._rows import Rows

_LABEL = "0 rows"  # of what is estimated on a minibatch


class _Draw(eqx.Module):
    """Globals, shape (G,), and the locals of a batch of rows, shape (B, L)."""

    g: Array
    own: Array


class _Family:
    """What an objective sees of q on a minibatch."""

    def __init__(self, draw: Callable[..., tuple[_Draw, Array]]):
        self._draw = draw

    def simulate(
        self, *, gradient: str | None = None, log_density: Any = None, name: str | None = None
    ) -> tuple[_Draw, Array]:
        frame = current_frame("simulate")
        gradient = frame.gradient_of(gradient)
        if gradient == "auto":
            raise TypeError("gradient 'auto' needs all rows")
        return self._draw(frame.key_for(name, "simulate"), gradient)


class _Density:
    """What an objective sees of p on a minibatch."""

    def __init__(self, log_prob: Callable[[_Draw], Array]):
        self.log_prob = log_prob


def check_objective(objective: Callable[..., Any]) -> None:
    """Refuse an objective whose estimate on minibatches would be biased.

    Raises:
        ValueError: it is not linear in log p and log q, or uses draws for more than these.
    """

    def total(key, value):
        q = _Family(lambda key, gradient: (_Draw(value, value), mark(value, _LABEL)))
        p = _Density(lambda draw: mark(draw.own, _LABEL))
        return expect(lambda: objective(q, p))(key)

    remedy = "Use vf.objectives.elbo(), or drop subsample_size."
    try:
        check_linear(total, jax.random.key(0), jnp.zeros(()))
    except ProgramError as error:
        raise ValueError(
            "fit: this objective is not possible for a model with a subsampled plate: it is not linear "
            "in the log densities, and a nonlinear function of their estimates on minibatches is biased. "
            f"{remedy}"
        ) from error
    except (AttributeError, TypeError) as error:
        raise ValueError(
            "fit: this objective is not possible for a model with a subsampled plate: on minibatches q "
            "has no more than simulate(), p no more than log_prob(x), and x is good for nothing else "
            f"({error}). {remedy}"
        ) from error


def minibatch_bound(
    rows: Rows, num_samples: int, objective: Callable[..., Any], gradient: str
) -> Callable:
    r"""An objective linear in log p and log q on a minibatch of rows, unbiased in value and gradient.

    $$\log \hat p = \log p(g) + \frac{N}{B} \sum_{i \in b} \left[\log p(l_i, y_i \mid g)
    - c_i - v_i^\top (g - \mu)\right] + \sum_{i=1}^N \left[c_i + v_i^\top (g - \mu)\right]$$
    $$\log \hat q = \log q(g) + \frac{N}{B} \sum_{i \in b} \log q(l_i \mid g)$$

    The constants $c_i$ and slopes $v_i$ are $\log \hat p(y_i \mid g)$ and its derivative at the
    Gaussian's mean $\mu$: whatever they are, the sums over b and over all rows cancel in expectation.
    What is left varies between minibatches by $1/\sqrt{B}$ instead of $\sqrt{N/B}$ in units of the posterior.

    Returns:
        `S(key, flow, inputs) -> scalar`; `inputs` as `row_inputs` makes them.

    Source:
        Baker, Fearnhead, Fox & Nemeth 2019, Control variates for stochastic gradient MCMC (arXiv
        1706.05439), section 3, for the control variate.
    """

    def bound(key, flow, inputs):
        key_rows, key_draws = jax.random.split(key)
        batch = draw_rows(key_rows, rows.size, rows.batch)
        scale = rows.size / rows.batch
        value, slope = inputs["value"][batch], inputs["gradient"][batch].sum(0)
        rest = inputs["total_value"] - scale * value.sum()
        tilt = inputs["total_gradient"] - scale * slope
        shared, local = parts(flow)

        def draw(key, gradient):
            key_shared, key_local = jax.random.split(key)
            g, log_q = shared.sample_and_log_prob(key_shared, None, gradient)
            own, each = draw_locals(rows, local, key_local, g, batch, path=gradient == "path")
            return _Draw(g, own), log_q + scale * each.sum()

        def log_density(x):
            each = log_prob_of_rows(rows, x.g, x.own, batch, inputs["data"])
            total = rows.global_log_prob(x.g) + scale * each.sum()
            return total + rest + tilt @ (x.g - inputs["mean"])

        q, p = _Family(draw), _Density(log_density)
        return expect(lambda: objective(q, p), num_samples, gradient=gradient)(key_draws)

    return bound


def parts(flow: Any) -> tuple[Any, Locals | None]:
    """The family of the globals, and the conditionals of the locals if there are any."""
    return (flow.shared, flow.local) if isinstance(flow, LocalFlow) else (flow, None)


def draw_locals(
    rows: Rows, local: Locals | None, key: Any, g: Array, batch: Array, *, path: bool = False
) -> tuple[Array, Array]:
    """One draw of the locals of each row of a batch, shape (B, L), and their log densities given g."""
    shape = (len(batch), rows.num_locals)
    if local is None:
        return jnp.zeros_like(g, shape=shape), jnp.zeros_like(g, shape=shape[:1])
    eps = jax.random.normal(key, shape, g.dtype)
    return jax.vmap(lambda e, i: local.draw(e, g, i, path=path))(eps, batch)


def log_prob_of_rows(rows: Rows, g: Array, own: Array, batch: Array, data: Any) -> Array:
    """log p(l, y | g) of each row of a batch, shape (B,)."""
    return jax.vmap(lambda v, i: rows.row_log_prob(g, v, i, data))(own, batch)
