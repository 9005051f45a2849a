"""Every example script runs, with tiny arguments, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


def test_there_are_examples():
    assert "eight_schools.py" in {path.name for path in EXAMPLES}


# README's first fit and objective; the others take half a minute each to compile.
FAST = {"eight_schools.py", "custom_objective.py"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=() if path.name in FAST else pytest.mark.slow)
        for path in EXAMPLES
    ],
)
def test_example_runs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, path, "--steps", "20"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()
