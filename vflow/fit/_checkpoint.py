"""One file from which the same call goes on where it was stopped."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from vflow.fit._loop import LoopState
from vflow.fit._save import read_file, restore, write_state


class Resumed(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        flow: the flow with all its arrays, preconditioning included.
        state: where the running round stood; its params are those of `flow`.
        best: the best flow of the rounds before, if any.
        round: number of the running round of training.
        history: the objective over the finished rounds.
        settings: what the fit had settled before training.
    """

    flow: Any
    state: LoopState
    best: Any
    round: int
    history: np.ndarray
    settings: dict[str, Any]


class Checkpoint:
    """A file that a fit writes after each chunk of steps and goes on from.

    Args:
        path: the file.
        identity: what must agree for the file to belong to this call, JSON-able, by name.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any]):
        self.path, self.identity = Path(path), identity
        if self.path.is_dir():
            raise ValueError(f"fit: checkpoint must be a file, {self.path} is a folder.")
        if not self.path.parent.is_dir():
            raise ValueError(f"fit: the folder of checkpoint {self.path} does not exist.")

    def settings(self) -> dict[str, Any] | None:
        """What an existing file had settled; None if there is no file.

        Raises:
            ValueError: the file is damaged, or was written by another call.
        """
        if not self.path.exists():
            return None
        header, _ = read_file(self.path, "checkpoint")
        for name, mine in self.identity.items():
            theirs = header["identity"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"fit: checkpoint {self.path} belongs to another fit: {name} is {theirs!r} "
                    f"there and {mine!r} here. Delete the file, or choose another path."
                )
        return header["settings"]

    def resume(
        self, flow: Any, optimizer_init: Callable, partition: Callable, best: Any = None
    ) -> Resumed:
        """The content of the file, given flows of the same structure."""
        header, leaves = read_file(self.path, "checkpoint")
        like = {
            "flow": flow,
            "best": best,
            "optimizer": optimizer_init(partition(flow)[0]),
            "values": np.zeros(header["step"]),
            "history": np.zeros(header["done"]),
        }
        tree = restore(self.path, leaves, like)
        state = LoopState(
            header["step"],
            partition(tree["flow"])[0],
            tree["optimizer"],
            np.asarray(tree["values"]),
        )
        return Resumed(
            tree["flow"],
            state,
            tree["best"],
            header["round"],
            np.asarray(tree["history"]),
            header["settings"],
        )

    def save(
        self,
        flow: Any,
        state: LoopState,
        round: int,
        history: np.ndarray,
        settings: dict[str, Any],
        best: Any = None,
    ) -> None:
        """Replace the file."""
        header = {
            "identity": self.identity,
            "settings": settings,
            "step": state.step,
            "round": round,
            "done": len(history),
        }
        tree = {
            "flow": flow,
            "best": best,
            "optimizer": state.optimizer_state,
            "values": np.asarray(state.values, np.float64),
            "history": np.asarray(history, np.float64),
        }
        write_state(self.path, header, tree, kind="checkpoint")


def structure_of(tree: Any) -> str:
    """A digest of a tree's structure and the shapes of its arrays."""
    leaves, treedef = jax.tree.flatten(eqx.filter(tree, eqx.is_array))
    shapes = [leaf.shape for leaf in leaves]
    return hashlib.sha256(f"{treedef} {shapes}".encode()).hexdigest()[:16]


def key_words(key: PRNGKeyArray) -> list[int]:
    """A key as numbers."""
    return np.asarray(jax.random.key_data(key)).reshape(-1).tolist()
