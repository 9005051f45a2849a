"""One file for a tree of arrays: two lines of text, then the leaves as equinox writes them.

    vflow <kind> <format version> <sha256 of the rest> <bytes of the rest>
    {the header, JSON}
    <leaves>

The first line tells a truncated, damaged, foreign or newer file from a good one before anything
in it is believed. Nothing is ever unpickled.
"""

import contextlib
import hashlib
import io
import json
import os
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1


def vflow_version() -> str:
    """The installed version, for messages and headers."""
    try:
        return metadata.version("vflow-jax")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
    """Put `content` at `path`: afterwards there is the old file or the whole new one, nothing else.

    The bytes go to a temporary file in the same folder, to the disk, and then take the name in one
    step. Whatever fails, the temporary file is removed.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}.")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_state(path: str | os.PathLike, header: dict[str, Any], tree: Any, *, kind: str) -> None:
    """Write a header and the leaves of a tree to one file, atomically.

    Args:
        path: where; an existing file is replaced.
        header: JSON-able.
        tree: its arrays (typed PRNG keys too) and Python numbers are written, in their dtypes.
        kind: "posterior", "checkpoint": what `read_file` will ask for; no spaces.
    """
    buffer = io.BytesIO()
    buffer.write(json.dumps(header, default=_plain).encode() + b"\n")
    eqx.tree_serialise_leaves(buffer, tree, filter_spec=_write_leaf)
    body = buffer.getvalue()
    digest = hashlib.sha256(body).hexdigest()
    write_atomic(path, f"vflow {kind} {FORMAT} {digest} {len(body)}\n".encode() + body)


def read_state(path: str | os.PathLike, like: Any, *, kind: str) -> tuple[dict[str, Any], Any]:
    """The header and the tree that `write_state` wrote.

    Args:
        path: the file.
        like: a tree of the same structure, shapes and dtypes.
        kind: as it was written.

    Returns:
        `(header, tree)`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is no such file, damaged, of a newer version, or does not fit `like`.
    """
    header, leaves = read_file(path, kind)
    return header, restore(path, leaves, like)


def read_file(path: str | os.PathLike, kind: str) -> tuple[dict[str, Any], bytes]:
    """The header and the undeciphered leaves of a file; the errors are those of `read_state`."""
    content = Path(path).read_bytes()
    first, _, body = content.partition(b"\n")
    words = first.decode("ascii", "replace").split(" ") if len(first) < 200 else []
    numbers = words[2::2]
    if len(words) != 5 or words[0] != "vflow" or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"{path} was not written by vflow, or its beginning is lost.")
    _, found, version, digest, length = words
    if int(version) > FORMAT:
        raise ValueError(
            f"{path} has format {version}; this vflow ({vflow_version()}) reads formats up to "
            f"{FORMAT}: update vflow."
        )
    if found != kind:
        raise ValueError(f"{path} holds a {found}, not a {kind}.")
    if len(body) != int(length):
        raise ValueError(
            f"{path} is incomplete: {len(body)} of {length} bytes after its first line are there."
        )
    if hashlib.sha256(body).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its content does not match its checksum.")
    header, _, leaves = body.partition(b"\n")
    return json.loads(header), leaves


def restore(path: str | os.PathLike, leaves: bytes, like: Any) -> Any:
    """The tree of a file whose leaves are `leaves`, in the structure of `like`."""
    buffer = io.BytesIO(leaves)
    problem = "it holds more arrays than expected"
    try:
        tree = eqx.tree_deserialise_leaves(buffer, like, filter_spec=_read_leaf)
    except Exception as error:  # numpy's, equinox's: whatever the bytes provoke
        problem, tree = str(error), None
    if tree is None or buffer.read(1):
        raise ValueError(f"{path} does not fit what it is read into: {problem}.")
    return tree


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _write_leaf(file: Any, x: Any) -> None:
    eqx.default_serialise_filter_spec(file, jax.random.key_data(x) if _is_key(x) else x)


def _read_leaf(file: Any, like: Any) -> Any:
    if not _is_key(like):
        return eqx.default_deserialise_filter_spec(file, like)
    data = eqx.default_deserialise_filter_spec(file, jax.random.key_data(like))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


def _plain(x: Any) -> Any:
    """NumPy and JAX numbers and arrays as JSON has them."""
    if isinstance(x, np.generic | np.ndarray | jax.Array):
        return np.asarray(x).tolist()
    raise TypeError(f"{x!r} cannot be written to a JSON header.")
