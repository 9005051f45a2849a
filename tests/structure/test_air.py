"""The example of counting digits learns to count, whichever strategy estimates its gradient."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "air.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["measure_valued", "reinforce, learned baseline", "enum", "mixed"]
)
def test_counts_held_out_digits(strategy, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--strategy", strategy, "--steps", "2000"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    _, name, bound, accuracy, found, *_ = done.stdout.splitlines()[-1].split("|")
    assert name.strip() == strategy
    assert float(accuracy) >= 0.9  # one count of three is right by chance
    assert float(found) >= 0.85  # and where they are, which the amount of ink does not tell
    assert float(bound.split()[0]) > 60.0  # an empty canvas is far below: its start is about 26
