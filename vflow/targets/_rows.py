"""A NumPyro model with a subsampled plate, taken apart: its globals, and each row given them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.primitives import Messenger

from vflow._core import ProgramError
from vflow.programs._numpyro import NumpyroCall, NumpyroProgram
from vflow.programs._numpyro_checks import model_name, running_model
from vflow.targets._numpyro import NumpyroSpace
from vflow.targets._site import Site
from vflow.targets._target import Target


class _Choose(Messenger):
    """Gives the subsampled plates of a model the rows that `rows(name, size, count)` returns."""

    def __init__(self, fn: Callable[..., Any], rows: Callable[[str, int, int], Any]):
        super().__init__(fn)
        self.rows = rows

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate" or msg["value"] is not None:
            return
        size, count = msg["args"]
        msg["value"] = self.rows(msg["name"], size, count)
        msg["args"] = (size, msg["value"].shape[0])


def _first(n: int) -> Array:
    """The first n rows; concrete inside a trace too, as NumPy data is indexed with them."""
    with jax.ensure_compile_time_eval():
        return jnp.arange(n)


def subsampled(program: Any) -> dict[str, tuple[int, int]]:
    """The plates of a program that draw a random subsample: name -> (rows, rows in a subsample)."""
    if not isinstance(program, NumpyroProgram):
        return {}
    found: dict[str, tuple[int, int]] = {}

    def note(name, size, count):
        found[name] = (int(size), int(count))
        return _first(count)

    call = program.call
    # What is wrong with the model is told, better, by those who make something of it.
    try:
        with running_model(call.model):
            model = handlers.seed(_Choose(call.model, note), jax.random.key(0))
            jax.eval_shape(lambda: (model(*call.args, **call.kwargs), 0)[1])
    except ProgramError:
        return found
    return found


def whole(program: NumpyroProgram) -> NumpyroProgram:
    """The program with every plate over all of its rows."""
    call = program.call
    everything = _Choose(call.model, lambda name, size, count: _first(size))

    @functools.wraps(call.model)
    def model(*args, **kwargs):
        return everything(*args, **kwargs)

    return NumpyroProgram(NumpyroCall(model, call.args, call.kwargs, call.strategies))


class Rows:
    r"""A model $p(g) \prod_i p(l_i, y_i \mid g)$ with one subsampled plate, on unconstrained space.

    The globals $g$ are the coordinates of the sites outside the plate, the locals $l_i$ those of
    row i of the sites inside, and $y_i$ the data that the model observes inside the plate at row i.

    Args:
        program: made by `vf.from_numpyro`, with one plate that has a `subsample_size`.

    Attributes:
        plate: name of the plate.
        size: its number of rows.
        batch: its rows in a subsample.
        whole: the target on all rows.
        global_index: which coordinates of `whole` are global, shape (G,).
        local_index: which are those of each row, shape (size, L).
        data: the arrays among the arguments with one entry a row, by position.

    Raises:
        ProgramError: there are several such plates, or the rows are not independent given the globals.
    """

    def __init__(self, program: NumpyroProgram):
        plates = subsampled(program)
        if len(plates) != 1:
            raise ProgramError(
                f"model {model_name(program.call.model)} subsamples plates {sorted(plates)}: give one "
                "plate a subsample_size."
            )
        ((self.plate, (self.size, self.batch)),) = plates.items()
        self._call = program.call
        self.whole = Target(NumpyroSpace(whole(program)))
        self._one = NumpyroSpace(self._on(jnp.arange(1)))
        self.global_index, self.local_index = self._split(self.whole.sites, self.size)
        globals_, (locals_,) = self._split(self._one.sites, 1)
        self._order = np.argsort(np.concatenate([globals_, locals_]))
        self._one_global = globals_
        leaves = jax.tree.leaves((self._call.args, self._call.kwargs))
        self.data = {
            i: x
            for i, x in enumerate(leaves)
            if isinstance(x, np.ndarray | jax.Array) and x.ndim and x.shape[0] == self.size
        }
        self._inside = self._sites_inside()
        self._check()

    @property
    def num_globals(self) -> int:
        """G."""
        return len(self.global_index)

    @property
    def num_locals(self) -> int:
        """L, for one row."""
        return self.local_index.shape[1]

    def _on(self, rows: Any) -> NumpyroProgram:
        """The program whose first argument is the rows it sees."""
        call = self._call

        def model(rows, *args, **kwargs):
            args, kwargs = jax.tree.map(self._as_jax, (args, kwargs))
            return _Choose(call.model, lambda name, size, count: rows)(*args, **kwargs)

        model.__name__ = model_name(call.model)
        return NumpyroProgram(NumpyroCall(model, (rows, *call.args), call.kwargs, call.strategies))

    def _as_jax(self, leaf: Any) -> Any:
        """NumPy data by row as a JAX array: rows that are traced cannot index it otherwise."""
        by_row = isinstance(leaf, np.ndarray) and leaf.ndim and leaf.shape[0] == self.size
        return jnp.asarray(leaf) if by_row else leaf

    def _split(self, sites: tuple[Site, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
        shared, own = [np.zeros(0, int)], [np.zeros((size, 0), int)]
        for site in sites:
            index = np.arange(site.start, site.stop)
            if self.plate in site.dims:
                index = index.reshape(site.unconstrained_shape)
                index = np.moveaxis(index, site.dims.index(self.plate), 0)
                own.append(index.reshape(size, -1))
            else:
                shared.append(index)
        return np.concatenate(shared), np.concatenate(own, axis=1)

    def _sites_inside(self) -> set[str]:
        """The sample sites inside the plate, factors too."""
        seen: list[set[str]] = []

        def look(x):
            trace, _ = self._one._push(x)
            stacks = {k: s["cond_indep_stack"] for k, s in trace.items() if s["type"] == "sample"}
            seen.append({k for k, s in stacks.items() if any(f.name == self.plate for f in s)})

        jax.eval_shape(look, jnp.zeros(len(self._order)))
        return seen[0]

    def _terms(
        self, g: Array, own: Array, rows: Array, data: dict[int, Any]
    ) -> tuple[Array, Array]:
        """Log density of the globals, and of the one row, Jacobians included."""
        call = self._call
        leaves, treedef = jax.tree.flatten((call.args, call.kwargs))
        leaves = [data.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        space = self._one.with_arguments((rows, *args), kwargs)
        x = jnp.concatenate([g, own])[self._order]
        zero = jnp.zeros_like(x, shape=())
        shared, row = zero, zero
        for name, term in space.terms(x).items():
            site = name.removeprefix("jacobian of ")
            if site not in self._inside:
                shared = shared + term
            elif site == name:
                row = row + term / self.size  # the plate scales its one row up to all
            else:
                row = row + term
        return shared.astype(x.dtype), row.astype(x.dtype)

    def global_log_prob(self, g: Array) -> Array:
        """Log density of the globals, shape `(G,)`, without any row."""
        own = jnp.zeros_like(g, shape=(self.num_locals,))
        return self._terms(g, own, jnp.zeros(1, int), {})[0]

    def row_log_prob(self, g: Array, own: Array, row: Array, data: dict[int, Any]) -> Array:
        """Log density of one row's locals and data given the globals.

        Args:
            g: shape `(G,)`.
            own: the row's locals, shape `(L,)`.
            row: its number, shape `()`.
            data: `self.data`, perhaps traced.
        """
        return self._terms(g, own, jnp.reshape(row, (1,)), data)[1]

    def prior_globals(self, key: PRNGKeyArray, n: int) -> Array:
        """Draws of the globals from the prior, shape `(n, G)`."""
        return self._one.prior_draws(key, n)[:, self._one_global]

    def _check(self) -> None:
        """Two rows together have the density of each alone."""
        if self.size < 2:
            return
        pair = NumpyroSpace(self._on(jnp.arange(2)))
        g_index, own_index = self._split(pair.sites, 2)
        x = pair.prior_draws(jax.random.key(0), 1)[0]
        g, own = x[g_index], x[own_index]
        shared, _ = self._terms(g, own[0], jnp.arange(1), self.data)
        rows = [self.row_log_prob(g, own[i], jnp.asarray(i), self.data) for i in range(2)]
        together = {k: jnp.sum(v) for k, v in pair.terms(x).items()}
        half = self.size / 2
        both = sum(v / half if k in self._inside else v for k, v in together.items())
        apart = shared + sum(rows)
        size = 1.0 + sum(abs(float(v)) for v in together.values()) / half
        if np.isfinite(float(apart)) and abs(float(both - apart)) > 1e-3 * size:
            raise ProgramError(
                f"the rows of plate {self.plate!r} are not independent given the sites outside it: two "
                f"rows together have log density {float(both):.6g}, one by one {float(apart):.6g}. A "
                "site outside the plate may not use what is drawn inside, and data have to be taken by "
                "the plate's indices, `with plate as i: ... obs=y[i]`."
            )
