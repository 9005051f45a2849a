"""The structure of a flow as JSON, so that a file says how to rebuild it without pickling."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class NotOurs(Exception):
    """Part of a tree that is not made of vflow's own modules, arrays and plain values."""


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _name(cls: type) -> str:
    """`bijections.Affine` for `vflow.bijections._affine.Affine`: files in a package may move."""
    return f"{cls.__module__.split('.')[1]}.{cls.__qualname__}"


def classes() -> dict[str, type]:
    """vflow's module classes by name. A file can name these and no others."""
    return {
        _name(cls): cls
        for cls in _subclasses(eqx.Module)
        if cls.__module__.startswith("vflow.")
        and getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls
    }


def encode(tree: Any, where: str = "flow") -> Any:
    """A tree as JSON, arrays by dtype and shape.

    Raises:
        NotOurs: the message says which part.
    """
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, jax.Array | np.ndarray):
        kind = "array" if isinstance(tree, jax.Array) else "numpy"
        if jnp.issubdtype(tree.dtype, jax.dtypes.extended):
            raise NotOurs(f"{where} is a {tree.dtype}")
        return {kind: [tree.dtype.name, list(tree.shape)]}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [encode(x, f"{where}[{i}]") for i, x in enumerate(tree)]}
    if type(tree) is dict and all(type(k) is str for k in tree):
        return {"dict": {k: encode(v, f"{where}[{k!r}]") for k, v in tree.items()}}
    cls: Any = type(tree)
    ours = isinstance(tree, eqx.Module) and cls.__module__.startswith("vflow.")
    if ours and classes().get(_name(cls)) is cls:
        # A field that lives on the class alone (a default outside __init__) stays there.
        own = [f.name for f in dataclasses.fields(cls) if f.name in vars(tree)]
        fields = {name: encode(getattr(tree, name), f"{where}.{name}") for name in own}
        return {"module": _name(cls), "fields": fields}
    raise NotOurs(f"{where} is a {cls.__module__}.{cls.__qualname__}")


def decode(code: Any) -> Any:
    """The tree of `encode`, arrays without their values, ready to be read into.

    Raises:
        ValueError: a class that this vflow does not have.
    """
    if not isinstance(code, dict):
        return code
    match code:
        case {"array": [dtype, shape]}:
            return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        case {"numpy": [dtype, shape]}:
            return np.zeros(tuple(shape), jnp.dtype(dtype))
        case {"tuple": items}:
            return tuple(decode(x) for x in items)
        case {"list": items}:
            return [decode(x) for x in items]
        case {"dict": items}:
            return {k: decode(v) for k, v in items.items()}
        case {"module": name, "fields": fields}:
            return _module(name, fields)
    raise ValueError(f"unknown entry {sorted(code)}")


def _module(name: str, fields: dict[str, Any]) -> Any:
    cls = classes().get(name)
    if cls is None:
        raise ValueError(f"unknown class {name}")
    module = object.__new__(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if not set(fields) <= known or not all(hasattr(cls, k) for k in known - set(fields)):
        raise ValueError(f"class {name} has fields {sorted(known)}, not {sorted(fields)}")
    for key, value in fields.items():
        object.__setattr__(module, key, decode(value))
    return module
