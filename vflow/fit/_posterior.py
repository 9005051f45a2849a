"""What a fit returns."""

import operator
import os
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from vflow._core import Estimate, FitError
from vflow.diagnostics import psis
from vflow.distributions._sampling import as_key
from vflow.fit._draws import BATCH, Drawer
from vflow.fit._dtype import default_dtype
from vflow.fit._points import Points
from vflow.fit._predictive import predict
from vflow.fit._record import record
from vflow.fit._refine import Refined, choose_method, run_chains
from vflow.fit._resample import resample
from vflow.fit._save import write_state
from vflow.fit._summary import Summary, summarise
from vflow.fit._verdict import Verdict
from vflow.targets import Target

_SUMMARY_DRAWS = 4 * BATCH
_SUMMARY_NUMBERS = 1 << 25  # in memory at once
_TABLE_ROWS = 40


# The settings that print; the others are for the record.
_TOLD = ("gradient", "num_steps", "num_samples", "preconditioner", "dtype", "seconds")


class Posterior:
    r"""A fitted posterior: draws, densities, and the verdict on whether to trust them.

    The flow lives on the unconstrained space of the target; draws and densities by site are
    constrained. Its coordinates are those of `target`, not always those of `vf.target(model)`, as sites
    may be decentred: `constrain` and `unconstrain` go between. Densities are computed in
    `settings["dtype"]`; what is returned has JAX's default float type.

    Args:
        flow: the fitted flow on unconstrained $R^d$, in JAX's default float type.
        target: what it was fitted to.
        verdict: the verdict on fresh draws.
        history: the objective by step; NaN where a step was skipped.
        settings: how it was fitted, JSON-able; "dtype" is "float32" or "float64" and "notes" a list
            of sentences.
        drawer: a compiled `Drawer` of the target and dtype to go on using.

    Attributes:
        flow: the fitted flow on the unconstrained space.
        target: what it was fitted to.
        verdict: the verdict on fresh draws.
        history: the objective by step; NaN where a step was skipped.
        settings: how it was fitted.

    Example:
        >>> import jax, jax.numpy as jnp, vflow as vf
        >>> target = vf.Target(lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), dim=2)
        >>> posterior = vf.fit(jax.random.key(0), target, num_steps=100, progress=False)
        >>> posterior.require_ok()
        >>> draws = posterior.sample(jax.random.key(1), 1000)
        >>> print(draws["x"].shape, abs(posterior.summary()["x[0]"].mean - 1.0) < 0.1)
        (1000, 2) True
    """

    def __init__(
        self,
        flow: Any,
        target: Target,
        verdict: Verdict,
        history: np.ndarray,
        settings: dict[str, Any],
        *,
        drawer: Drawer | None = None,
    ):
        self.flow = flow
        self.target = target
        self.verdict = verdict
        self.history = np.asarray(history)
        self.settings = {"dtype": default_dtype(), "notes": []} | settings
        self._drawer = Drawer(target, self.settings["dtype"]) if drawer is None else drawer
        self._points = Points(target, self.settings["dtype"])
        self._table: Summary | None = None
        self._num_summary = min(_SUMMARY_DRAWS, max(1024, _SUMMARY_NUMBERS // target.dim))

    @property
    def status(self) -> str:
        """The verdict in a word: "ok", "suspect" or "failed"."""
        return self.verdict.status

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the status is not "ok", one sentence each."""
        return self.verdict.reasons

    @property
    def khat(self) -> float:
        """Pareto k-hat of the importance weights; trusted below 0.7."""
        return self.verdict.khat

    @property
    def ess_fraction(self) -> float:
        """Importance effective sample size over the number of draws, in (0, 1]."""
        return self.verdict.ess_fraction

    @property
    def elbo(self) -> Estimate:
        """The evidence lower bound, in nats."""
        return self.verdict.elbo

    @property
    def log_evidence(self) -> Estimate:
        """The log evidence by importance sampling, in nats."""
        return self.verdict.log_evidence

    def require_ok(self) -> None:
        """Raise a `vf.FitError` with reasons and remedies unless the status is "ok"."""
        if self.status == "ok":
            return
        lines = [f"the fit is {self.status}, not to be trusted:"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines.append(
            "Remedies: a larger num_steps or num_samples; another flow=; dtype='float64'; "
            "a model in other coordinates (non-centred, or data rescaled); where only the ESS is "
            "low, resample() corrects the draws."
        )
        raise FitError("\n".join(lines), reasons=self.reasons)

    def sample(self, key: PRNGKeyArray, n: int) -> dict[str, Array]:
        """`n` independent draws from the fit, constrained.

        Args:
            key: PRNG key.
            n: number of draws.

        Returns:
            Site -> array of shape (n, *site shape), deterministic sites included.

        Raises:
            TypeError, ValueError: key or n is none.
        """
        x = self._drawer.plain(self.flow, as_key(key), _count("n", n))
        return self._handed_out(self._sites(x))

    def resample(self, key: PRNGKeyArray, n: int) -> dict[str, Array]:
        """`n` draws corrected by Pareto-smoothed importance resampling, constrained.

        As many fresh proposals are drawn from the fit as it takes for the draws to be worth `n`
        independent ones, at most 64 `n`. Some draws may be repeated. A warning says when k-hat is
        too large for the correction to be complete.

        Args:
            key: PRNG key.
            n: number of draws.

        Returns:
            Site -> array of shape (n, *site shape), deterministic sites included.

        Raises:
            FitError: the importance weights are not usable (NaN, infinite, or all in one draw).
            TypeError, ValueError: key or n is none.
        """
        x = self._resample(key, _count("n", n))
        return self._handed_out(self._sites(x))

    def refine(
        self,
        key: PRNGKeyArray,
        method: str = "auto",
        num_samples: int = 4000,
        *,
        num_chains: int = 4,
        num_warmup: int = 500,
        num_rounds: int = 6,
    ) -> Refined:
        """Draws of Markov chains that start from the fit and are exact in the long run.

        "neutra" runs NUTS on the density pulled back through the flow, where it is rounder: robust in
        many dimensions and where the fit is poor, but a chain stays in its mode. "imh" picks among
        fresh draws of the fit by weight, with local MALA moves in between (iterated sampling
        importance resampling): it crosses between modes that the fit has, and stalls where the
        weights are uneven. "auto" takes "imh" where the importance ESS fraction is at least 0.02 and
        k-hat below 0.7, and for families without a map to pull back through; "neutra" otherwise.
        Modes that the fit has lost stay lost with either.

        Where R-hat is 1.01 or more, the effective size is below 100 per chain, or more than 1 % of the
        transitions diverge, another round follows; and after any divergent transition, until means and
        sds (of ranks) of two rounds agree to 0.05 sd, as R-hat does not see what no chain gets into. With
        "neutra" a coupling flow is fitted to the draws by maximum likelihood, and the chains go on
        behind it: a fit that is far off is only the first of the maps. With "imh", and with fewer than 10
        draws per coordinate, the chains become longer.

        Args:
            key: PRNG key.
            method: "auto", "neutra" (for a `Flow`) or "imh".
            num_samples: draws of all chains together.
            num_chains: independent chains, at least 2: R-hat compares them.
            num_warmup: iterations of each chain that are discarded; step sizes are adapted there.
            num_rounds: how many at most; the draws are those of one, mostly the last.

        Returns:
            A `Refined` with `draws` like those of `sample`, R-hat, effective size and warnings.

        Raises:
            TypeError, ValueError: an argument is wrong; it is named.

        Source:
            Hoffman et al. 2019, NeuTra-lizing Bad Geometry (arXiv 1903.03704); Grenioux, Durmus,
            Moulines & Gabrie 2023, On Sampling with Approximate Transport Maps (arXiv 2302.04763).
        """
        method = choose_method(method, self.flow, self.ess_fraction, self.khat)
        num_samples, num_chains = (
            _count("num_samples", num_samples),
            _count("num_chains", num_chains),
        )
        if num_chains < 2:
            raise ValueError("num_chains must be at least 2: R-hat compares chains.")
        num_warmup, num_rounds = (
            _count("num_warmup", num_warmup),
            _count("num_rounds", num_rounds),
        )
        x, report = run_chains(
            as_key(key),
            self.flow,
            self.target,
            self.settings["dtype"],
            method,
            num_samples,
            num_chains,
            num_warmup,
            num_rounds,
        )
        return Refined(self._handed_out(self._sites(x)), **report)

    def log_prob(self, sites: dict[str, Any]) -> Array:
        r"""The normalised log density of the fit at constrained values.

        $$\log q(v) = \log q(x) - \log|\det \partial T/\partial x|, \qquad v = T(x)$$

        It is the density of the constrained values (in the measure of the model's own
        distributions); `flow.log_prob(unconstrain(sites))` is that on the unconstrained space.

        Args:
            sites: a value for each latent site, shape (*site shape), or (n, *site shape) for all of
                them; deterministic sites may be there too and are ignored.

        Returns:
            Shape () or (n,), in nats; -inf outside the support.

        Raises:
            ValueError: a site is missing, has a wrong shape, or is NaN.
        """
        return _handed_out(self._points.log_prob(self.flow, sites))

    def constrain(self, x: Any) -> dict[str, Array]:
        """The named constrained values at unconstrained points.

        Args:
            x: shape (dim,) or (n, dim).

        Returns:
            Site -> (*site shape) or (n, *site shape), deterministic sites included.

        Raises:
            ValueError: another shape.
        """
        return self._handed_out(self._points.constrain(x))

    def unconstrain(self, sites: dict[str, Any]) -> Array:
        """The inverse of `constrain`.

        Args:
            sites: as `log_prob` takes them.

        Returns:
            Shape (dim,) or (n, dim).

        Raises:
            ValueError: a site is missing or has a wrong shape.
        """
        return _handed_out(self._points.unconstrain(sites))

    def predictive(
        self,
        key: PRNGKeyArray,
        model: Callable[..., Any],
        *args: Any,
        num_samples: int = 1000,
        resample: bool = False,
        batch_size: int = 500,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Posterior predictive draws: the model run forward on draws of its latent sites.

        Args:
            key: PRNG key.
            model: a NumPyro model, with the same latent sites; sites that the posterior does not
                have are drawn from the model.
            *args: its positional arguments, without the data that is to be predicted.
            num_samples: number of draws.
            resample: whether the latent draws are corrected, as `resample` does it.
            batch_size: how many are in memory at once.
            **kwargs: its keyword arguments.

        Returns:
            Site -> array of shape (num_samples, *site shape), for the sites that are neither
            latent in the posterior nor observed in the call; deterministic sites are computed
            anew.

        Raises:
            ProgramError: the model fails, or has nothing to predict.
            TypeError, ValueError: an argument of a wrong type or size.

        Example:
            `posterior.predictive(key, eight_schools, sigma)["y"]`, of shape (1000, 8).
        """
        num_samples = _count("num_samples", num_samples)
        batch_size = _count("batch_size", batch_size)
        key_draws, key_model = jax.random.split(as_key(key))
        x = (
            self._resample(key_draws, num_samples)
            if resample
            else self._drawer.plain(self.flow, key_draws, num_samples)
        )
        draws = self._drawer.constrain(x)
        latent = {site.name: draws[site.name] for site in self.target.sites}
        dtype = self.settings["dtype"]
        return self._handed_out(predict(key_model, model, latent, args, kwargs, batch_size, dtype))

    def summary(self) -> Summary:
        """Mean, sd and the 5%, 50% and 95% quantiles of each element of each site.

        They come from 16384 draws of `sample` (fewer above 2048 coordinates) with a fixed key, so that
        two calls agree.

        Returns:
            A mapping `site` or `site[i,j]` -> row; it prints as a table.
        """
        if self._table is None:
            x = self._drawer.plain(self.flow, jax.random.key(0), self._num_summary)
            self._table = summarise(self._sites(x))
        return self._table

    def to_arviz(self, key: PRNGKeyArray | None = None, n: int = 4000) -> Any:
        """Draws, importance weights and data as an xarray DataTree.

        Groups: `posterior` (dimensions chain, draw and the plates' names; deterministic sites
        included), `sample_stats` (`log_weight`, log p - log q of each draw), `observed_data`. The
        verdict is in the attributes. The draws are independent: r-hat and MCMC effective sizes
        mean nothing for them.

        Args:
            key: PRNG key of the draws; a fixed one by default.
            n: number of draws.

        Returns:
            `xarray.DataTree`.
        """
        from vflow.fit._export import to_arviz

        key = jax.random.key(0) if key is None else as_key(key)
        x, log_w = self._drawer.weighted(self.flow, key, _count("n", n))
        return to_arviz(self, self._sites(x), log_w)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """The history of the objective and the marginals of the sites.

        Args:
            path: where to write the figure, its format by the suffix; None writes none.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed (`pip install "vflow-jax[plots]"`).
        """
        from vflow.fit._plot import plot

        draws = self._sites(self._drawer.plain(self.flow, jax.random.key(0), BATCH))
        return plot(self, draws, path)

    def report(self, path: str | os.PathLike) -> None:
        """Write one self-contained HTML page: verdict in plain words, loss curve, weights, pictures.

        The pictures show draws of the fit beside the same draws resampled by their smoothed
        importance weights, where these are usable. No plotting library is needed.

        Args:
            path: of the page; an existing one is replaced.

        Raises:
            OSError: the file cannot be written.

        Example:
            `posterior.report("fit.html")`
        """
        from vflow.fit._report import report

        x, log_w = self._drawer.weighted(self.flow, jax.random.key(0), self._num_summary)
        draws = self._sites(x)
        smoothed = psis(log_w)
        corrected = None
        if smoothed.reason is None:
            weights = np.exp(np.asarray(smoothed.log_weights, np.float64))
            taken = np.random.default_rng(0).choice(len(x), len(x), p=weights / weights.sum())
            corrected = {name: values[taken] for name, values in draws.items()}
        report(self, draws, corrected, log_w, path)

    def save(self, path: str | os.PathLike) -> None:
        """Write the posterior to one file, atomically; `vf.load` reads it.

        The file holds the flow, the verdict, the history and the settings, not the model or the
        data. If writing fails, a file that was there before is unharmed.

        Args:
            path: where.

        Raises:
            OSError: the file cannot be written.
        """
        write_state(path, *record(self), kind="posterior")

    def __str__(self) -> str:
        verdict, settings = self.verdict, self.settings
        lines = [
            f"Posterior of {self.target.dim} unconstrained coordinates: status {self.status}",
            *(f"  - {reason}" for reason in self.reasons),
            f"ELBO {self.elbo}, log evidence {self.log_evidence} (nats)",
            f"k-hat {self.khat:.2f} (trusted below {verdict.khat_threshold:.2f}), importance ESS "
            f"fraction {self.ess_fraction:.3f}, on {verdict.num_draws} fresh draws",
        ]
        told = {k: settings[k] for k in _TOLD if settings.get(k) is not None}
        lines += textwrap.wrap(_short(told)[1:-1], 100)
        lines += [f"note: {note}" for note in settings["notes"]]
        return "\n".join([*lines, "", self.summary().text(_TABLE_ROWS)])

    def __repr__(self) -> str:
        return (
            f"Posterior(status={self.status!r}, khat={self.khat:.2f}, "
            f"ess_fraction={self.ess_fraction:.3f}, sites={[s.name for s in self.target.sites]})"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Posterior is not pickled: posterior.save(path) writes it to a file, and "
            "vf.load(path, program) reads it."
        )

    def __copy__(self) -> "Posterior":
        return self

    def __deepcopy__(self, memo: Any) -> "Posterior":
        return self  # nothing in it changes

    def _resample(self, key: Any, n: int) -> np.ndarray:
        key, key_u = jax.random.split(as_key(key))
        keys = iter(jax.random.split(key, 64))
        return resample(
            lambda k: self._drawer.weighted(self.flow, next(keys), k),
            n,
            self.ess_fraction,
            float(jax.random.uniform(key_u)),
        )

    def _sites(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Constrained values, the latent sites first and in their order."""
        values = self._drawer.constrain(x)
        return {site.name: values[site.name] for site in self.target.sites} | values

    def _handed_out(self, values: dict[str, np.ndarray]) -> dict[str, Array]:
        """Host arrays as JAX arrays in the caller's default types."""
        return {name: _handed_out(value) for name, value in values.items()}


def _handed_out(value: np.ndarray) -> Array:
    floating = np.issubdtype(value.dtype, np.floating)
    return jnp.asarray(value.astype(default_dtype()) if floating else value)


def _count(name: str, n: Any) -> int:
    try:
        n = n if isinstance(n, bool) else operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be a positive integer, got {n!r}.") from None
    if isinstance(n, bool) or n < 1:
        raise ValueError(f"{name} must be a positive integer, got {n!r}.")
    return n


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(x)}" for key, x in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
