"""The contract of a strategy: how the gradient of a random choice is estimated."""

import abc
import dataclasses
from typing import Any

from vflow.programs._site import Site


class Strategy(abc.ABC):
    """How the gradient of a random choice is estimated.

    A subclass is a frozen dataclass that implements `draw`: it returns the value of the site in
    this run, and tells the site what to do about the gradient:

    * nothing, if the value carries its derivative (`site.draw()`);
    * `site.add_score(log_prob)`: later costs are multiplied by the score function;
    * `site.star(base, values, weights, base_weight)`: alternatives that share one axis of lanes;
    * `site.enumerate(values)`: a sum over the support, an axis of its own.

    Example:
        >>> import dataclasses, jax, numpyro.distributions as dist, vflow as vf
        >>> @dataclasses.dataclass(frozen=True, repr=False)
        ... class PlainScore(vf.Strategy):
        ...     def draw(self, site):
        ...         value = site.draw_detached()
        ...         site.add_score(site.log_prob(value))
        ...         return value
        >>> def objective(t):
        ...     return vf.sample("x", dist.Normal(t, 1.0), PlainScore()) ** 2
        >>> slope = jax.grad(vf.expect(objective, num_samples=4), argnums=1)(jax.random.key(0), 0.7)
    """

    @abc.abstractmethod
    def draw(self, site: Site) -> Any:
        """The value of the site in this run."""

    def __repr__(self) -> str:
        name = type(self).__name__
        snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        given = [(f.name, getattr(self, f.name)) for f in fields]
        return f"{snake}({', '.join(f'{k}={v!r}' for k, v in given if v is not None)})"
