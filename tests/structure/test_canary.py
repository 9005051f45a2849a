"""The import hook is at work in both packages: a wrong argument is refused by its annotation."""

import jax
import jaxtyping
import pytest
import vflow_kernels

import vflow as vf


def test_annotations_of_vflow_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        vf.FitError(3)  # pyright: ignore[reportArgumentType]


def test_annotations_of_the_kernels_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        vflow_kernels.standard_normal_log_density("not an array")  # pyright: ignore[reportArgumentType]


def test_settings():
    assert jax.config.jax_enable_x64
    assert jax.config.jax_numpy_rank_promotion == "raise"
