"""Training with path gradients: the targets and numbers of tests/benchmarks/path_training.py."""

import jax
import numpy as np
import pytest

from tests.benchmarks import path_training


def _ends(runs):
    return [run["curve"][-1][2] for run in runs]


def _check_mixture(runs):
    """Its variance is hardly above the smaller one, at start, middle and end."""
    for _, share, total, path, mixture in runs[0]["variances"]:
        assert 0 < share < 4
        assert mixture < 1.1 * min(total, path)  # the estimate of the ratio has an error of 3 %


@pytest.mark.slow
def test_corners_of_a_cube():
    with jax.enable_x64(False):
        runs = path_training.reverse("corners, affine", 5)
    assert np.median(_ends(runs["path"])) >= 0.86
    assert np.median(_ends(runs["auto"])) >= 0.86
    assert np.median(_ends(runs["total"])) < np.median(_ends(runs["path"])) - 0.05
    _check_mixture(runs["auto"])


@pytest.mark.slow
def test_corners_of_a_cube_with_splines():
    with jax.enable_x64(False):
        (run,) = path_training.reverse("corners, spline", 1, ("path",))["path"]
    assert run["curve"][-1][2] >= 0.995
    _, _, total, path, _ = run["variances"][-1]
    assert total > 40 * path


@pytest.mark.slow
def test_a_lattice_field():
    with jax.enable_x64(False):
        runs = path_training.reverse("phi4, affine", 1, ("path", "auto"))
    assert _ends(runs["path"])[0] >= 0.88 and _ends(runs["auto"])[0] >= 0.88
    _, _, total, path, _ = runs["path"][0]["variances"][-1]
    assert total > 25 * path
    _check_mixture(runs["auto"])


@pytest.mark.slow
def test_few_data_with_a_known_density():
    """Maximum likelihood overfits a thousand draws; the path gradient sees the density."""
    with jax.enable_x64(False):
        losses = path_training.forward(3)
    of = lambda gradient: np.median([loss for loss, _ in losses[gradient]])
    assert of("path") <= 10.3  # the entropy of the target is 9.43
    assert of("total") > of("path") + 1
