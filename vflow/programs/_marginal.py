"""Programs with estimated densities: marginals, and conditioning."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from vflow._core import ProgramError
from vflow.programs._frame import Recorder, current_frame
from vflow.programs._inner import Algorithm, Particles
from vflow.programs._program import Program, draw


class _Marginal(Program):
    program: Program
    keep: tuple[str, ...] = eqx.field(static=True)
    inner: Algorithm

    def run(self, *args: Any) -> Any:
        """Refused: the sites that are summed out have no place in another program."""
        raise ProgramError("a marginal can be simulated and scored, not conditioned further.")

    def simulate(
        self,
        *args: Any,
        gradient: str | None = None,
        condition: Any = None,
        log_density: Any = None,
        name: str | None = None,
    ) -> tuple[dict[str, Any], Array]:
        """Draw the kept sites, inside an objective program.

        Returns:
            (site name -> value, an estimate of log q of shape ()).
        """
        if gradient == "path":
            raise ProgramError(
                "a marginal has no path gradient, its density is estimated: use gradient='total'."
            )
        frame = current_frame("simulate")
        values, _ = draw(self.program, args, frame, Recorder({}, only=set()), name)
        missing = set(self.keep) - set(values)
        if missing:
            raise ProgramError(
                f"vf.marginal keeps {sorted(missing)}, which are no sites of the program; it has "
                f"{sorted(values)}."
            )
        kept = {k: values[k] for k in self.keep}
        rest = {k: v for k, v in values.items() if k not in kept}
        return kept, self.inner.particles(self.program, args, kept, rest).log_evidence

    def log_prob(self, values: dict[str, Any], *args: Any) -> Array:
        """An estimate of the log density of the kept sites, unbiased for the density."""
        if set(values) != set(self.keep):
            raise ProgramError(
                f"this marginal has the sites {sorted(self.keep)}, got values for {sorted(values)}."
            )
        return self.inner.particles(self.program, args, dict(values)).log_evidence


def marginal(program: Program, keep: Sequence[str], inner: Algorithm) -> Program:
    r"""The marginal of some sites of a program, its density estimated by an inner algorithm.

    `simulate` gives $\hat q$ with $\mathbb{E}[1/\hat q \mid x] = 1/q(x)$, `log_prob` gives $\hat p$
    with $\mathbb{E}[\hat p] = p$: what a guide and a model need for $\mathbb{E} \log \hat p/\hat q$
    to be a lower bound.

    Args:
        program: a `vf.program` or `vf.from_numpyro` program.
        keep: names of the sites that remain; the others are summed out.
        inner: `vf.importance(n)`, `vf.exact_enumeration()` or `vf.smc(n)`.

    Returns:
        A `Program` of the kept sites.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> @vf.program
        ... def guide(scale):
        ...     u = vf.sample("u", dist.Normal(0.0, 1.0))
        ...     vf.sample("x", dist.Normal(u, scale))
        >>> q = vf.marginal(guide(0.5), keep=("x",), inner=vf.importance(5))
        >>> value = vf.expect(lambda: q.simulate()[1])(jax.random.key(0))

    Source: Sobolev and Vetrov, Importance Weighted Hierarchical Variational Inference (2019).
    """
    if isinstance(keep, str):
        raise TypeError(f"keep must be a sequence of names, got the string {keep!r}.")
    return _Marginal(_program(program, "marginal"), tuple(keep), _algorithm(inner, "marginal"))


def normalize(program: Program, data: dict[str, Any], algorithm: Algorithm) -> Particles:
    r"""Condition a program on data: weighted values of the remaining sites.

    $\sum_i w_i f(u_i)$ estimates the posterior expectation of f: consistent in the number of
    particles, not unbiased (exact for `vf.exact_enumeration()`). Called inside an objective program.

    Args:
        program: a `vf.program` or `vf.from_numpyro` program.
        data: site name -> value; a NumPyro model may have its data bound already, then `{}`.
        algorithm: `vf.importance(n, proposal)`, `vf.exact_enumeration()` or `vf.smc(n)`.

    Returns:
        `values` (site name -> (n, *shape)), `weights` (n,) which sum to one, and `log_evidence`,
        the log of an unbiased estimate of the density of the data.

    Example:
        >>> import jax, numpyro.distributions as dist, vflow as vf
        >>> @vf.program
        ... def model():
        ...     z = vf.sample("z", dist.Normal(0.0, 1.0))
        ...     vf.sample("x", dist.Normal(z, 1.0))
        >>> def posterior_mean():
        ...     values, weights, _ = vf.normalize(model, {"x": 1.0}, vf.importance(50))
        ...     return (weights * values["z"]).sum()
        >>> value = vf.expect(posterior_mean)(jax.random.key(0))
    """
    if not isinstance(data, dict):
        raise TypeError(f"data must be a dict from site name to value, got {data!r}.")
    algorithm = _algorithm(algorithm, "normalize")
    data = {k: jnp.asarray(v) for k, v in data.items()}
    return algorithm.particles(_program(program, "normalize"), (), data)


def _program(program: Any, word: str) -> Program:
    if not isinstance(program, Program):
        raise TypeError(
            f"vf.{word} takes a program made by vf.program or vf.from_numpyro, got {program!r}."
        )
    return program


def _algorithm(algorithm: Any, word: str) -> Algorithm:
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"vf.{word} takes vf.importance(n), vf.exact_enumeration() or vf.smc(n), got "
            f"{algorithm!r}."
        )
    return algorithm
