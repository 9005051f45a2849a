"""New views of the NumPy arrays that functions and arguments hold."""

import functools as ft
import types
from typing import Any

import jax
import numpy as np

_JITTED = type(jax.jit(lambda: None))
_HOLDERS = {np.ndarray, tuple, list, dict, ft.partial, _JITTED, types.FunctionType}


def fresh(x: Any) -> Any:
    """The same function or arguments, with a new view of each NumPy array inside.

    jax 0.10 remembers which float type an array object had in an earlier trace, under another
    setting of x64 too, for as long as that trace is alive: traced again, the array is of the wrong
    type, which fails or costs digits.

    Arrays are found in lists, tuples, dicts and partials, and in closures, globals and defaults of
    functions and of those of the same module that they use; not in attributes of other objects.
    """
    return _Fresh().of(x)


class _Fresh:
    """One copy: an object found twice is renewed once. What holds no array stays the same object."""

    def __init__(self):
        self._done: dict[int, Any] = {}

    def of(self, x: Any) -> Any:
        """The same with fresh arrays."""
        if type(x) not in _HOLDERS:
            return x
        if id(x) not in self._done:
            self._done[id(x)] = x  # where a function reaches itself
            self._done[id(x)] = self._renewed(x)
        return self._done[id(x)]

    def _renewed(self, x: Any) -> Any:
        if type(x) is np.ndarray:
            return x.view()
        if type(x) in (tuple, list):
            new = [self.of(item) for item in x]
            return x if _same(new, x) else type(x)(new)
        if type(x) is dict:
            new = {key: self.of(value) for key, value in x.items()}
            return x if _same(new.values(), x.values()) else new
        if type(x) is ft.partial:
            function, args, kwargs = self.of(x.func), self.of(x.args), self.of(x.keywords)
            same = _same((function, args, kwargs), (x.func, x.args, x.keywords))
            return x if same else ft.partial(function, *args, **kwargs)
        if type(x) is _JITTED:  # inside a trace it is the function itself
            inner = getattr(x, "__wrapped__", None)
            return x if self.of(inner) is inner else self.of(inner)
        return self._function(x)

    def _function(self, f: types.FunctionType) -> types.FunctionType:
        cells = tuple(map(self._cell, f.__closure__ or ()))
        found = {name: f.__globals__[name] for name in _names(f.__code__) & f.__globals__.keys()}
        found = {k: v for k, v in found.items() if _module(v) in (None, f.__module__)}
        names = {k: self.of(v) for k, v in found.items()}
        defaults, keywords = self.of(f.__defaults__), self.of(f.__kwdefaults__)
        if (
            _same(cells, f.__closure__ or ())
            and _same(names.values(), found.values())
            and _same((defaults, keywords), (f.__defaults__, f.__kwdefaults__))
        ):
            return f
        scope = f.__globals__ if _same(names.values(), found.values()) else f.__globals__ | names
        new = types.FunctionType(f.__code__, scope, f.__name__, defaults, cells)
        new.__kwdefaults__ = keywords
        ft.update_wrapper(new, f)
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            return cell
        return cell if self.of(value) is value else types.CellType(self.of(value))


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _names(code: types.CodeType) -> set[str]:
    """Names that the code may look up, nested functions included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _module(x: Any) -> str | None:
    """Where a function is defined; None of what is no function."""
    return x.__module__ if type(x) in (types.FunctionType, _JITTED) else None
