"""What every test runs under: checked annotations, float64, no silent broadcasting of ranks."""

from jaxtyping import install_import_hook

# First, before anything imports the packages. Not jaxtyping's pytest flag: with two packages and
# a checker in parentheses it silently skips the second one.
install_import_hook(["vflow", "vflow_kernels"], "beartype.beartype")

import os
import pathlib
import sys
import zlib

_CACHE = pathlib.Path(
    os.environ.get("JAX_COMPILATION_CACHE_DIR") or pathlib.Path(__file__).parent / ".jax_cache"
)
try:  # a warm cache halves the time of the suite, but nothing depends on it
    _CACHE.mkdir(parents=True, exist_ok=True)
except OSError:
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
else:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    # XLA calls each load of a cached function an error because of two tuning hints in its target.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """The fast suite's time is compilation: XLA's older emitters, and few optimisations."""
    if config.option.markexpr == "slow":
        return
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # later ones have no other emitters, and end at the flag
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


def pytest_collection_finish():
    """Collecting doctests binds each package in its parent: `vflow.fit` is the function again."""
    vflow = sys.modules.get("vflow")
    if vflow is not None:
        setattr(vflow, "fit", sys.modules["vflow.fit"].fit)  # noqa: B010


@pytest.fixture
def key(request):
    """A key of the test's own: a function of its node id, the same alone and under xdist."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def no_key_reuse():
    """While the test runs, using a key twice is an error."""
    with jax.debug_key_reuse(True):
        yield


@pytest.fixture(autouse=True)
def _optimised(request):
    """All of XLA's optimisations for a test that counts operations."""
    if request.node.get_closest_marker("optimised") is None:
        yield
        return
    few = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", few)


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory(request):
    """Compiled functions are dropped after each test file; the cache on disk keeps them cheap."""
    yield
    if request.path.name.startswith("test_"):
        jax.clear_caches()
