"""Which coordinates have power tails, with which index, and which flow suits them."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

from vflow.diagnostics._tail_estimators import double_bootstrap, hill, kernel_estimator, moments
from vflow.diagnostics._tail_slopes import gaussian_at_mode, integrated_slopes, slice_slopes

_MIN_DRAWS = 200
_LIGHT_DF = 10.0  # Hill calls a normal sample about 10: it cannot tell such an index from light
_STEEP = 1.2  # a tail whose slope grows by this factor in a decade is no power law
_MOST_INTEGRATED = 64


class TailReport(NamedTuple):
    r"""What `vf.diagnostics.tails` found; it prints as a table.

    Attributes:
        df: index $\nu$ of every coordinate, infinite for light ones, shape (d,): what
            `vf.flows.tail_adaptive` and the tail layers take as `df`.
        lower: lower end of the range of df, shape (d,).
        upper: upper end, shape (d,).
        heavy: whether a coordinate has a power tail, shape (d,).
        method: "draws", "integrated" or "slices".
        details: further columns by name: estimators and numbers of order statistics for draws,
            slopes for a target.
        advice: which family to use.
        note: what the numbers mean and what they do not.
        loc: with `whiten`, the mode, shape (d,); else None.
        tril: with `whiten`, the lower Cholesky factor of the covariance of the Gaussian there, shape
            (d, d); else None.
    """

    df: NDArray
    lower: NDArray
    upper: NDArray
    heavy: NDArray
    method: str
    details: dict[str, NDArray]
    advice: str
    note: str
    loc: NDArray | None = None
    tril: NDArray | None = None

    def __repr__(self) -> str:
        """A table, the advice and the note."""
        header = ["coordinate", "tail", "df", "range", *self.details]
        rows = [header]
        for i, heavy in enumerate(self.heavy):
            span = f"{self.lower[i]:.3g} to {self.upper[i]:.3g}" if heavy else ""
            cells = [str(i), "heavy" if heavy else "light", f"{self.df[i]:.3g}", span]
            rows.append(cells + [f"{column[i]:.4g}" for column in self.details.values()])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        where = "" if self.loc is None else ", in the coordinates of the Gaussian at the mode"
        return "\n".join([f"Tails by {self.method}{where}", *lines, self.advice, self.note])


def tails(
    target_or_data: Any, *, method: str | None = None, whiten: bool = False, seed: int = 0
) -> TailReport:
    r"""Light or heavy, coordinate by coordinate, the tail index, and the family to use.

    The index of a heavy tail is $\nu = 1/\xi$, the degrees of freedom of a Student-t with that tail:
    $P(|x| > r) \sim r^{-\nu}$.

    *Draws*: with $|x|$ measured from the median, a coordinate is light if neither the moments nor
    the kernel estimator of $\xi$ is positive, or if Hill's $\nu$ is above 10. Otherwise $\nu$ is
    one over Hill's estimate, with the number of order statistics chosen by a double bootstrap; the
    range is its 95 % sampling interval, which leaves out bias. Draws are taken as independent.
    Exponential tails are the border: they may be called either.

    *A target* is a density without normaliser, and a slice of it is not a marginal: along an axis
    a multivariate t falls with slope $\nu + d$, where the marginal falls with $\nu + 1$, and a slice
    misses a tail that runs along a diagonal altogether. So by default ("integrated") the other
    coordinates are integrated out by Laplace's method, at ever larger values of the coordinate:
    exact in the limit for elliptical and for independent tails, an approximation else. $\nu$ is
    minus the slope of the log marginal in $\log r$, minus one, over the last decade, on the heavier
    side; the range spans the last two decades. A slope that still grows is a light tail. "slices"
    reports the slope along each axis through the mode, minus one: $\nu$ only for independent
    coordinates.

    With `whiten` all this is said of the coordinates $z$ of the Gaussian at the mode, $x = \mu + Lz$:
    linear dependence between heavy coordinates is taken out first, and a coordinate that is normal
    around a heavy one is then light. `vf.flows.heavy_tail` builds on these.

    Args:
        target_or_data: draws of shape (n,) or (n, d), n of at least 200; or a target with `log_prob`
            and `dim`, as `vf.target` and `vf.Target` make it.
        method: for a target "integrated" (default, up to 64 coordinates) or "slices".
        whiten: of a target, whether to look at it in the coordinates of the Gaussian at its mode, which
            the report then has as `loc` and `tril`.
        seed: of the bootstrap.

    Returns:
        A `TailReport`; its `df` can be passed on to a flow.

    Raises:
        ValueError: too few, non-finite or constant draws, an unknown method, or a target whose mode
            was not found.
        TypeError: neither draws nor a target, or called under jit.

    Example:
        >>> import numpy as np, vflow as vf
        >>> rng = np.random.default_rng(0)
        >>> draws = np.stack([rng.standard_cauchy(5000), rng.normal(size=5000)], axis=1)
        >>> report = vf.diagnostics.tails(draws)
        >>> print(report.df.round(1), report.heavy)
        [ 1. inf] [ True False]

    Source:
        Laszkiewicz, Lederer & Fischer 2022 (arXiv 2206.10311), section 4, for moments to classify
        and Hill for the index (which their code hands on as $\nu + 1$).
    """
    if callable(getattr(target_or_data, "log_prob", None)):
        if not isinstance(getattr(target_or_data, "dim", None), int):
            raise TypeError("tails: a target needs dim; pass `vf.target(program)`, a vf.Target, or draws.")
        return _of_target(target_or_data, method, whiten=whiten)
    if method is not None or whiten:
        given = f"method={method!r}" if method is not None else "whiten=True"
        raise ValueError(f"tails: method and whiten are for targets, got {given} with draws.")
    if isinstance(target_or_data, Tracer):
        raise TypeError("tails: the draws are traced; call it on concrete arrays, outside jit.")
    try:
        data = np.asarray(target_or_data, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"tails takes draws or a target, got {type(target_or_data).__name__}."
        ) from None
    return _of_draws(data, np.random.default_rng(seed))


def _of_draws(data: NDArray, rng: np.random.Generator) -> TailReport:
    data = data[:, None] if data.ndim == 1 else data
    if data.ndim != 2 or data.shape[0] < _MIN_DRAWS or data.shape[1] < 1:
        raise ValueError(
            f"tails: draws must have shape (n,) or (n, d) with n of at least {_MIN_DRAWS}, got "
            f"{data.shape}."
        )
    if not np.isfinite(data).all():
        raise ValueError(f"tails: {int((~np.isfinite(data)).sum())} entries are not finite.")
    columns = [_of_coordinate(i, column, rng) for i, column in enumerate(data.T)]
    df, lower, upper, hill_, moments_, kernel_, k = (
        np.array(c) for c in zip(*columns, strict=True)
    )
    details = {"Hill": hill_, "moments": moments_, "kernel": kernel_, "k": k}
    note = (
        "df is one over Hill's estimate; its range is the sampling error of independent draws at 95 %,\n"
        "without bias. Moments and kernel estimates of 1/df (negative: light) classify."
    )
    heavy = np.isfinite(df)
    return TailReport(df, lower, upper, heavy, "draws", details, _advice(df), note)


def _of_coordinate(index: int, x: NDArray, rng: np.random.Generator) -> tuple:
    size = np.sort(np.abs(x - np.median(x)))[::-1]
    size = size[size > 0]
    n = size.size
    if n < _MIN_DRAWS // 2 or size[0] == size[n // 2]:
        raise ValueError(f"tails: coordinate {index} is constant in most draws.")
    fixed = round(n**0.65)  # for the classifiers: their bias is small where Hill's is not
    xi_moments, xi_kernel = moments(size, fixed), kernel_estimator(size, n, 2 * fixed)
    k = max(double_bootstrap(size, rng), round(n**0.4))
    xi = hill(size, k)
    error = xi / np.sqrt(k)
    light = max(xi_moments, xi_kernel) <= 0 or xi * _LIGHT_DF < 1
    df = np.inf if light else 1 / xi
    lower = np.inf if light else 1 / (xi + 1.96 * error)
    upper = np.inf if light else (1 / (xi - 1.96 * error) if xi > 1.96 * error else np.inf)
    return df, lower, upper, xi, xi_moments, xi_kernel, k


def _of_target(target: Any, method: str | None, *, whiten: bool) -> TailReport:
    method = method or ("integrated" if target.dim <= _MOST_INTEGRATED else "slices")
    if method not in ("integrated", "slices"):
        raise ValueError(f"tails: method must be 'integrated' or 'slices', got {method!r}.")
    loc = tril = None
    with jax.enable_x64(True):
        log_density = target.log_prob
        if whiten:
            loc, tril = gaussian_at_mode(target.log_prob, target.dim)
            log_density = lambda z: target.log_prob(loc + tril @ z)
        run = integrated_slopes if method == "integrated" else slice_slopes
        slopes = run(log_density, target.dim)  # (d, 2 sides, 2 decades), positive
    index = slopes - 1
    # The heavier side decides; a power law is where the slope has stopped growing.
    power = (slopes[..., 1] < _STEEP * slopes[..., 0]) & (index[..., 1] > 0)
    by_side = np.where(power, index[..., 1], np.inf)
    side = np.argmin(by_side, axis=1)
    df = np.min(by_side, axis=1)
    both = np.take_along_axis(index, side[:, None, None], axis=1)[:, 0]
    heavy = np.isfinite(df)
    lower = np.where(heavy, both.min(axis=1), np.inf)
    upper = np.where(heavy, both.max(axis=1), np.inf)
    details = {"slope below": slopes[:, 0, 1], "slope above": slopes[:, 1, 1]}
    if method == "integrated":
        note = (
            "From the unnormalised density, the other coordinates integrated out by Laplace's method:\n"
            "df is minus the far slope of the log marginal, minus one; exact for elliptical and for\n"
            "independent tails, approximate else. The range spans two decades, not all errors."
        )
    else:
        note = (
            "From slices of the unnormalised density along the axes, which are not marginals: df is minus\n"
            "the slope, minus one, right for independent coordinates only. A multivariate t of df nu in d\n"
            "dimensions shows nu + d - 1 here, and a tail along a diagonal does not show at all."
        )
    advice = _advice(df, whitened=whiten)
    return TailReport(df, lower, upper, heavy, method, details, advice, note, loc, tril)


def _advice(df: NDArray, *, whitened: bool = False) -> str:
    heavy = np.isfinite(df)
    if not heavy.any():
        return "Use a light-tailed flow: vf.flows.coupling(key, dim)."
    where = ", loc=report.loc, tril=report.tril" if whitened else ""
    output = f"vf.flows.heavy_tail(key, dim, df=report.df{where})"
    if whitened or df[heavy].min() < 2:
        return f"Use an output transform: {output}."
    return f"Use {output},\nor a Student-t base: vf.flows.tail_adaptive(key, dim, df=report.df)."
