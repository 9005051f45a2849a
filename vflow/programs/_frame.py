"""The record that a program's random choices find while an objective runs."""

import contextlib
import dataclasses
import threading
import zlib
from collections.abc import Iterator

import jax
from jaxtyping import PRNGKeyArray

from vflow._core import ProgramError


@dataclasses.dataclass
class Frame:
    """One run of an objective: where keys come from and which gradient `simulate` defaults to."""

    key: PRNGKeyArray
    gradient: str = "total"
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    unnamed: int = 0

    def key_for(self, name: str | None, kind: str) -> PRNGKeyArray:
        """A key folded from the site's name; unnamed ones are numbered in program order."""
        if name is None:
            name = f"{kind} #{self.unnamed}"
            self.unnamed += 1
        code = zlib.crc32(name.encode())
        if code in self.names:
            raise ProgramError(
                f"site {name!r} shares its noise with site {self.names[code]!r}: rename one of them."
            )
        self.names[code] = name
        return jax.random.fold_in(self.key, code)


class _Stack(threading.local):
    def __init__(self):
        self.frames: list[Frame] = []


_STACK = _Stack()


def current_frame(what: str) -> Frame:
    """The innermost running frame; `what` names the caller in the error."""
    if not _STACK.frames:
        raise ProgramError(
            f"{what} was called outside an objective program: wrap the objective, "
            "`vf.expect(objective)(key, ...)`, or draw directly with `vf.sample_and_log_prob(key, ...)`."
        )
    return _STACK.frames[-1]


@contextlib.contextmanager
def running(frame: Frame) -> Iterator[Frame]:
    """Make `frame` the innermost one while the block runs."""
    _STACK.frames.append(frame)
    try:
        yield frame
    finally:
        _STACK.frames.pop()
