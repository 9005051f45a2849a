"""A posterior as an xarray DataTree."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vflow.fit._save import vflow_version


def to_arviz(posterior: Any, draws: Mapping[str, np.ndarray], log_w: np.ndarray) -> Any:
    """The DataTree of draws (n, *shape), their log weights (n,), the data and the verdict."""
    from arviz_base import from_dict

    observed = {name: np.asarray(value) for name, value in posterior.target.observed.items()}
    shapes = {name: value.shape[1:] for name, value in draws.items()}
    shapes |= {name: value.shape for name, value in observed.items()}
    groups = {
        "posterior": {name: value[None] for name, value in draws.items()},
        "sample_stats": {"log_weight": log_w[None]},
    }
    attributes = {
        "inference_library": "vflow",
        "inference_library_version": vflow_version(),
        "status": posterior.status,
        "reasons": " ".join(posterior.reasons),
        "khat": posterior.khat,
        "ess_fraction": posterior.ess_fraction,
        "elbo": posterior.elbo.value,
        "log_evidence": posterior.log_evidence.value,
    }
    return from_dict(
        groups | ({"observed_data": observed} if observed else {}),
        sample_dims=["chain", "draw"],
        dims=_dims(shapes, posterior.target.dims),
        attrs={"/": attributes, "posterior": attributes},
    )


def _dims(
    shapes: Mapping[str, tuple[int, ...]], plates: Mapping[str, tuple[str | None, ...]]
) -> dict[str, list[str]]:
    """A name for each axis: its plate's, or one of its own where that would clash.

    A plate's name clashes with another axis of the same site, with a plate of the same name but
    another size, and with "chain" and "draw".
    """
    sizes: dict[str, int] = {}
    named = {}
    for site, shape in shapes.items():
        given = plates.get(site, ())
        given = given if len(given) == len(shape) else (None,) * len(shape)
        names: list[str] = []
        for axis, (plate, size) in enumerate(zip(given, shape, strict=True)):
            free = plate not in (*names, "chain", "draw", None)
            if free and sizes.setdefault(str(plate), size) == size:
                names.append(str(plate))
            else:
                names.append(f"{site}_dim_{axis}")
        named[site] = names
    return named
