"""The score-function estimator, with baselines."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vflow.programs._site import Site
from vflow.programs._strategy import Strategy


@dataclasses.dataclass(frozen=True, repr=False)
class Reinforce(Strategy):
    """See `reinforce`."""

    baseline: Any = None

    def draw(self, site: Site) -> Any:
        """A detached draw; what comes later is multiplied by its score."""
        value = site.draw_detached()
        log_prob = site.log_prob(value)
        if isinstance(self.baseline, str):
            if site.num_samples < 2:
                raise site.error(
                    f"the baseline {self.baseline!r} is made of other samples: use "
                    "vf.expect(objective, num_samples=2) or more."
                )
            site.add_score(log_prob, baseline=self.baseline)
            return value
        site.add_score(log_prob)
        if self.baseline is not None:
            learned = callable(self.baseline)
            baseline = jnp.asarray(self.baseline() if learned else self.baseline)
            if baseline.shape != ():
                raise site.error(f"the baseline must be a scalar, got shape {baseline.shape}.")
            site.add_control(jax.lax.stop_gradient(baseline), log_prob)
            if learned:
                site.fit(baseline)
        return value


def reinforce(baseline: Any | Callable[[], Any] | None = None) -> Strategy:
    r"""The score-function estimator, $\mathbb{E}[(F - b) \nabla_\theta \log p(x;\theta)]$.

    Right to every order of derivative.

    Args:
        baseline: what is subtracted from the objective; it never changes the expectation.
            A number; `"loo"`, the mean of the other samples of `vf.expect(..., num_samples=n)`;
            `"ema"`, a running average of the preceding ones; or a function without arguments that
            returns a scalar, which may use trainable arrays and the values of earlier sites: it is
            trained at the same time, by a term of value zero whose gradient (for the arrays that
            only the baseline uses) is that of $-\tfrac12 \mathbb{E}(F - b)^2$.

    Raises:
        ValueError: for an unknown baseline.

    Example:
        >>> import vflow as vf
        >>> vf.reinforce(baseline="loo")
        reinforce(baseline='loo')

    Source: Williams (1992); Foerster et al., DiCE (2018), section 3; Kool et al. (2019) for "loo".
    """
    if isinstance(baseline, str) and baseline not in ("loo", "ema"):
        raise ValueError(
            f'baseline must be a number, "loo", "ema" or a function, got {baseline!r}.'
        )
    return Reinforce(baseline)
