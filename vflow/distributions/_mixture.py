"""Mixtures with a stratified estimator."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from vflow._core import Frozen, ProgramError, stop_gradient
from vflow._core._numerics import as_float
from vflow.bijections import AbstractBijection
from vflow.bijections._checks import check_positive
from vflow.distributions._distribution import AbstractDistribution
from vflow.distributions._flow import Flow
from vflow.programs import sample
from vflow.programs._frame import current_frame
from vflow.programs._path_run import draw_scored
from vflow.programs.strategies import enum, measure_valued


class Mixture(AbstractDistribution):
    r"""A weighted sum of distributions of one structure: $q(x) = \sum_k w_k\, q_k(x)$.

    Inside an objective the expectation over components is an exact sum,
    $\sum_k w_k\, \mathbb{E}_{q_k}[F(x)]$ with one draw per component (a stratified estimate):
    unbiased, value and gradient, for every objective, the weights' gradient included. Among the
    particles of `vf.vmap` the sum would run over all tuples of components; there the component is
    drawn, and the weights get their derivative from `vf.measure_valued`, unbiased too. With
    `gradient="path"` the score is that of the mixture, not of the component.

    Outside objectives `sample_and_log_prob` draws the component as well. Such a draw is no smooth
    function of the weights, so differentiating it raises.

    Args:
        components: distributions built by the same constructor with the same options.
        weights: one per component, positive, normalised here; equal by default.
        trainable: whether `vf.params` contains the weights (as logits).

    Raises:
        ValueError: no components, different structures, or weights that are not positive.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> shift = lambda m: vf.bijections.Affine(jnp.array([m]), 1.0)
        >>> normal = vf.distributions.Normal(1)
        >>> parts = [vf.distributions.Flow(normal, shift(m)) for m in (-2.0, 2.0)]
        >>> q = vf.distributions.Mixture(parts, [0.25, 0.75])
        >>> print(f"{jnp.exp(q.log_prob(jnp.array([2.0]))):.4f}")
        0.2992

    Source:
        Roeder, Wu & Duvenaud 2017 (arXiv 1703.09194), section 5; Morningstar et al. 2021
        (arXiv 2003.01687), the stratified ELBO.
    """

    components: AbstractDistribution
    logits: Array | Frozen
    shape: tuple[int, ...] = eqx.field(static=True)
    condition_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        components: Sequence[AbstractDistribution],
        weights: ArrayLike | Sequence[float] | None = None,
        *,
        trainable: bool = True,
    ):
        components = list(components)
        if not components:
            raise ValueError("Mixture: components is empty.")
        if len({jax.tree.structure(part) for part in components}) > 1 or any(
            len({jnp.shape(leaf) for leaf in leaves}) > 1
            for leaves in zip(*map(jax.tree.leaves, components), strict=False)
        ):
            raise ValueError(
                "Mixture: components must have one structure: build them by the same constructor "
                "with the same options."
            )
        weights = as_float(jnp.ones(len(components)) if weights is None else jnp.asarray(weights))
        if weights.shape != (len(components),):
            raise ValueError(
                f"Mixture: weights must have one entry for each of the {len(components)} "
                f"components, got shape {weights.shape}."
            )
        check_positive("Mixture", "weights", weights)
        self.components = jax.tree.map(lambda *leaves: jnp.stack(leaves), *components)
        logits = jnp.log(weights / jnp.sum(weights))
        self.logits = logits if trainable else Frozen(logits)
        self.shape = components[0].shape
        self.condition_shape = components[0].condition_shape

    @property
    def log_weights(self) -> Array:
        """Normalised, shape `(K,)`."""
        logits = self.logits
        return jax.nn.log_softmax(logits.value if isinstance(logits, Frozen) else logits)

    def through(self, bijection: AbstractBijection) -> "Mixture":
        """The mixture behind one more bijection: each component gets it."""
        count = self.log_weights.size
        copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), bijection)
        pushed = eqx.filter_vmap(Flow)(self.components, copies)
        return eqx.tree_at(lambda mixture: mixture.components, self, pushed)

    def path_refusal(self) -> str | None:
        """Why `gradient="path"` is not defined, or None: it is where components have a log_prob."""
        return None

    def log_prob(self, x: Array, condition: Array | None = None) -> Array:
        """The log density at `x` of shape `shape`; shape `()`."""
        parts = jax.vmap(lambda part: part.log_prob(x, condition))(self.components)
        return jax.nn.logsumexp(self.log_weights + parts)

    def sample_and_log_prob(
        self, key: PRNGKeyArray, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """One draw and its log density: shapes `shape` and `()`; not differentiable."""
        key_component, key_draw = jax.random.split(key)
        k = jax.random.categorical(key_component, self.log_weights)
        x = _not_differentiable(self._draw(k, key_draw, condition))
        return x, self.log_prob(x, condition)

    def simulate(
        self,
        *,
        gradient: str | None = None,
        condition: Array | None = None,
        log_density: Any = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        """One draw per component inside an objective program, and the mixture's log density.

        Args:
            gradient: "total" or "path"; None is the default of the running objective.
            condition: array of `condition_shape`, or None.
            log_density: ignored: the density does not depend on the target.
            name: the site's name; None numbers it.

        Returns:
            `(x, log_q)`: shapes `shape` and `()`.

        Raises:
            ProgramError: called outside an objective program.
        """
        from numpyro.distributions import Categorical

        frame = current_frame("Mixture.simulate")
        name = frame.label("simulate") if name is None else name
        gradient = frame.gradient_of(gradient)
        strategy = measure_valued() if frame.looped else enum()
        k = sample(f"{name}/component", Categorical(logits=self.log_weights), strategy)
        x = self._draw(k, frame.key_for(name, "simulate"), condition)

        def scored(*, live: bool) -> tuple[Array, Array, Array]:
            still, point, context = stop_gradient((self, x, condition))
            log_q, score = jax.value_and_grad(still.log_prob)(point, context)
            return x, self.log_prob(x, condition) if live else log_q, score

        return draw_scored(
            frame,
            frame.scope + name,
            gradient,
            lambda: (x, self.log_prob(x, condition)),
            scored,
            fixed="a Mixture draws its component too, which has no sampling path",
        )

    def _draw(self, k: Array, key: PRNGKeyArray, condition: Array | None) -> Array:
        part = jax.tree.map(lambda leaf: leaf[k], self.components)
        return part.sample(key, condition)


@jax.custom_jvp
def _not_differentiable(x: Array) -> Array:
    return x


@_not_differentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ProgramError(
        "a draw of a Mixture was differentiated: the component is a discrete choice, and the "
        "derivative would leave the weights out. Use q.simulate() inside an objective program."
    )
