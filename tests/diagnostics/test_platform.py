import os
import subprocess
import sys

import jax
import pytest

from vflow._core._platform import CURE, platform_warning
from vflow.diagnostics._platform import check_platform


def test_this_platform_computes_right():
    report = check_platform()
    assert report.ok, str(report)
    assert bool(report)
    assert report.jaxlib in str(report)
    assert "WRONG" not in str(report)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_miscompiled_function_is_reported(wrong):
    def compile(function):
        def run(x):
            y = jax.jit(function)(x)
            return y.at[-1].multiply(wrong) if x.dtype == "float32" else y

        return run

    report = check_platform(compile)
    assert not report.ok
    assert not report
    assert {check.dtype for check in report.checks if not check.ok} == {"float32"}
    assert {check.dtype for check in report.checks if check.ok} == {"float64"}
    assert "WRONG RESULTS" in str(report)
    assert CURE in str(report)


def test_caller_keeps_its_precision():
    with jax.enable_x64(False):
        assert check_platform().ok
        assert jax.numpy.ones(2).dtype == "float32"


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.11.1"])
def test_known_bad_releases_warn_and_name_the_flag(version):
    message = platform_warning(version, "--xla_cpu_enable_fast_math=false")
    assert message is not None
    assert version in message
    assert f"XLA_FLAGS={CURE} " in message
    assert platform_warning(version, f"--xla_cpu_enable_fast_math=false {CURE}") is None
    assert platform_warning(version, f"{CURE}reduce") is not None


@pytest.mark.parametrize("version", ["0.9.0", "0.10.1", "0.12.0.1"])
def test_other_releases_are_silent(version):
    assert platform_warning(version, "") is None


def test_import_warns_once_on_a_bad_release():
    code = """
import warnings, jaxlib
jaxlib.__version__ = "0.10.2"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import vflow
    import vflow
print([str(w.message) for w in caught if w.category is RuntimeWarning])
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.count("jaxlib 0.10.2") == 1, out
    assert CURE in out
