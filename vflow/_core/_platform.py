"""What is known of jaxlib releases that compute wrongly, from the version alone."""

import os
import warnings

import jaxlib

CURE = "--xla_cpu_experimental_ynn_fusion_type="

_TROUBLE = {
    "0.10.2": "silently miscompiles batched reductions on CPU (jax-ml/jax#39103)",
    "0.11.0": "crashes, hangs or miscompiles batched reductions on CPU (jax-ml/jax#39257)",
    "0.11.1": "is reported to hang in loops on CPU",
}


def platform_warning(version: str, xla_flags: str) -> str | None:
    """The warning that `import vflow` owes its user, or None.

    Args:
        version: of jaxlib.
        xla_flags: the value of the environment variable XLA_FLAGS.

    Returns:
        One sentence on the trouble and one on the cure; None for other releases, and where
        the flag that cures is set already.
    """
    trouble = _TROUBLE.get(version)
    if trouble is None or CURE in xla_flags.split():
        return None
    return (
        f"jaxlib {version} {trouble}. Install another release, or set XLA_FLAGS={CURE} (an empty "
        "value) before Python starts; vflow.diagnostics.check_platform() tells what is wrong here."
    )


def warn_of_known_bad_jaxlib() -> None:
    """Warn if the installed jaxlib is known to be wrong; compiles nothing."""
    message = platform_warning(jaxlib.__version__, os.environ.get("XLA_FLAGS", ""))
    if message is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
