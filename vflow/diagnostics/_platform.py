"""Does this jaxlib compute what it is told to?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from vflow._core._platform import CURE

_QUADRATIC = "jit(vmap(sum((A x)^2)))"
_JACOBIAN = "jit(vmap(jacfwd(z |z|^2)))"
# Each size is above the threshold from which jaxlib 0.10.2 is wrong: (case, dtype, dim, rows).
_CASES = (
    (_QUADRATIC, "float32", 3, 40_000),
    (_QUADRATIC, "float64", 3, 32_768),
    (_QUADRATIC, "float64", 5, 20_000),
    (_JACOBIAN, "float32", 3, 5_000),
    (_JACOBIAN, "float64", 3, 5_000),
)
_TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


@dataclasses.dataclass(frozen=True)
class PlatformCheck:
    """One computation, compared with NumPy in float64.

    Attributes:
        name: the computation.
        dtype: "float32" or "float64".
        shape: of the batch of inputs, (rows, coordinates).
        error: the largest over rows of (largest absolute error / largest true value); no unit.
        ok: whether the error is finite and within rounding.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    error: float
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return f"{verdict:>5}  {self.name:<28} {self.dtype}  {self.shape}  error {self.error:.1e}"


@dataclasses.dataclass(frozen=True)
class PlatformReport:
    """What `check_platform` found; truthy where every check passed.

    Attributes:
        jaxlib: its version.
        backend: "cpu", "gpu" or "tpu".
        checks: one record per computation.
    """

    jaxlib: str
    backend: str
    checks: tuple[PlatformCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"jaxlib {self.jaxlib} on {self.backend}: {'ok' if self.ok else 'WRONG RESULTS'}"]
        lines += [str(check) for check in self.checks]
        if not self.ok:
            lines.append(
                f"Do not trust results of this installation. Install another jaxlib, or set "
                f"XLA_FLAGS={CURE} (an empty value) before Python starts, and check again."
            )
        return "\n".join(lines)


def check_platform(compile: Callable[..., Any] = jax.jit) -> PlatformReport:
    r"""Compute, as installed, what known-bad releases of jaxlib get silently wrong.

    Compares $\sum_i (A x)_i^2$ and the Jacobian $|z|^2 I + 2 z z^\top$ of $z |z|^2$, batched and
    compiled, with NumPy in float64, at batch sizes where jaxlib 0.10.2 is wrong on CPU. Takes
    about a second. Crashes and hangs (0.11.0, 0.11.1) cannot be caught from inside.

    Args:
        compile: how a batched function is compiled.

    Returns:
        A `PlatformReport`: truthy if all is right, `print` it for the table.

    Example:
        >>> import vflow as vf
        >>> vf.diagnostics.check_platform().ok
        True

    Source:
        jax-ml/jax#39103, jax-ml/jax#39257.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        checks = tuple(_check(compile, *case) for case in _CASES)
    return PlatformReport(jaxlib.__version__, jax.default_backend(), checks)


def _check(
    compile: Callable[..., Any], name: str, dtype: str, dim: int, rows: int
) -> PlatformCheck:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, dim)).astype(dtype)
    if name == _QUADRATIC:
        a = rng.normal(size=(dim, dim)).astype(dtype)
        matrix = jnp.asarray(a)
        run = compile(jax.vmap(lambda x: jnp.sum((matrix @ x) ** 2)))
        truth = ((x.astype(np.float64) @ a.T.astype(np.float64)) ** 2).sum(-1)
    else:
        run = compile(jax.vmap(jax.jacfwd(lambda z: z * jnp.sum(z**2))))
        z = x.astype(np.float64)
        square = (z**2).sum(-1)[:, None, None]
        truth = square * np.eye(dim) + 2 * z[:, :, None] * z[:, None, :]
    result = np.asarray(run(jnp.asarray(x)), np.float64)
    difference, scale = (np.abs(a).reshape(rows, -1).max(-1) for a in (result - truth, truth))
    error = float(np.max(difference / scale))
    return PlatformCheck(name, dtype, (rows, dim), error, bool(error <= _TOLERANCE[dtype]))
