"""Particles and rows of data over the devices of a mesh."""

import contextlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vflow._core import ProgramError
from vflow.programs._frame import placing
from vflow.targets import Target
from vflow.targets._numpyro import NumpyroSpace
from vflow.targets._target import on_arguments

AXES = ("particle", "data")


class Layout:
    """Where the particles, the data and everything else of a fit live.

    Keys are split before they are spread, so that draws do not depend on the number of devices; sums
    are taken in another order. Without a mesh nothing is placed and the data stays as it is.

    Args:
        mesh: with axes "particle", "data" or both; None for one device.
        target: whose rows of data are spread along "data": the arrays among the arguments of a NumPyro
            model that have the longest leading axis.
        num_samples: particles of a step.

    Raises:
        TypeError, ValueError: not such a mesh, or one that does not divide particles or rows.
    """

    def __init__(self, mesh: Any, target: Target, num_samples: int):
        self.mesh = None if mesh is None else _checked(mesh, num_samples)
        sizes = {} if self.mesh is None else dict(self.mesh.shape)
        self.num_particle, self.num_data = (sizes.get(axis, 1) for axis in AXES)
        self.rows: dict[int, Any] = {}
        if self.num_data > 1:
            self.rows = _rows(target, self.num_data)

    def _put(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))  # pyright: ignore[reportArgumentType]

    def inputs(self, dtype: str) -> tuple[Any, ...]:
        """What a compiled function takes as its data: nothing, or the spread rows."""
        if not self.rows:
            return ()
        floats = lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x
        sharding = self._put("data")
        return ({i: jax.device_put(floats(x), sharding) for i, x in self.rows.items()},)

    def bound(self, target: Target, inputs: tuple[Any, ...]) -> Target:
        """The target on traced rows."""
        if not inputs or not isinstance(target.space, NumpyroSpace):
            return target
        call = target.space.program.call
        leaves, treedef = jax.tree.flatten((call.args, call.kwargs))
        leaves = [inputs[0].get(i, leaf) for i, leaf in enumerate(leaves)]
        return on_arguments(target, *jax.tree.unflatten(treedef, leaves))

    def particles(self) -> contextlib.AbstractContextManager:
        """While it runs, estimates spread the keys of their samples."""
        return placing(None if self.num_particle == 1 else self.spread)

    def spread(self, x: Array, axis: int = 0) -> Array:
        """An array of particles along "particle", where that axis divides it."""
        if self.num_particle == 1 or x.shape[axis] % self.num_particle:
            return x
        return jax.lax.with_sharding_constraint(x, self._put(*[None] * axis, "particle"))

    def replicated(self, tree: Any) -> Any:
        """Inside a compiled function: the same on every device."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._put()), tree)

    def everywhere(self, tree: Any) -> Any:
        """A copy on every device, those of other processes too."""
        return tree if self.mesh is None else jax.device_put(tree, self._put())


def _checked(mesh: Any, num_samples: int) -> Mesh:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"fit: mesh must be a jax.sharding.Mesh, as jax.make_mesh((8,), ('particle',)), got "
            f"{type(mesh).__name__}."
        )
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise ValueError(f"fit: mesh may have axes {AXES}, got {mesh.axis_names}.")
    particles = mesh.shape.get("particle", 1)
    if num_samples % particles:
        raise ValueError(
            f"fit: axis 'particle' of mesh has {particles} devices, which do not divide num_samples="
            f"{num_samples}; take num_samples={-(-num_samples // particles) * particles}."
        )
    return Mesh(mesh.devices, mesh.axis_names)  # axes whose shardings the compiler completes


def _rows(target: Target, num_data: int) -> dict[int, Any]:
    """The arguments to spread: position among the leaves of the arguments -> array."""
    if not isinstance(target.space, NumpyroSpace):
        raise ValueError(
            "fit: axis 'data' of mesh needs a program made by vf.from_numpyro, whose arguments are the "
            "data; a log density keeps its own: use axis 'particle' alone."
        )
    call = target.space.program.call
    leaves = jax.tree.leaves((call.args, call.kwargs))
    arrays = {
        i: x for i, x in enumerate(leaves) if isinstance(x, np.ndarray | jax.Array) and x.ndim
    }
    if not arrays:
        raise ProgramError(
            "fit: axis 'data' of mesh has nothing to spread: the model has no array among its "
            "arguments. Pass the data, vf.from_numpyro(model, y), instead of closing over it."
        )
    longest = max(x.shape[0] for x in arrays.values())
    if longest % num_data:
        raise ValueError(
            f"fit: axis 'data' of mesh has {num_data} devices, which do not divide the {longest} rows "
            "of the model's arguments; drop rows, or pad and mask them."
        )
    return {i: x for i, x in arrays.items() if x.shape[0] == longest}
