"""Training state on disk: safetensors and JSON, atomic, the last two kept; what a run resumes from.

Holds parameters, optimizer and step as arrays, and the loop's own notes (data position, best result) as JSON.
Twin: jax_impl/training/state.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from common.checkpoint import check_keys, read_json, read_tensors, sync, to_json, write_file
from common.errors import UserError

KEPT = 2
# in the order of `arrays`, of which a reranker's TrainState has two
_PARTS = ("model.safetensors", "optimizer.safetensors", "memory.safetensors", "average.safetensors")
_NOTES_FILE = "notes.json"
_PARTIAL = ".partial-"


class Stepped(Protocol):
    """Trees of arrays that know how many steps they have taken: mlx_impl.training.step.TrainState."""

    @property
    def step(self) -> Any: ...
    def arrays(self) -> list[Any]: ...


State = TypeVar("State", bound=Stepped)


class StateFolder:
    """The `state/` folder of a run."""

    def __init__(self, directory: Path, kept: int = KEPT) -> None:
        self.directory, self.kept = directory.absolute(), kept
        for remains in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(remains)

    def latest(self) -> int | None:
        """The last whole step, None in a new run."""
        return max(self._steps(), default=None)

    def save(self, state: Stepped, notes: dict[str, Any]) -> None:
        """Write the state of its step; a broken write leaves the earlier ones whole (UserError)."""
        step = int(state.step)
        if step == self.latest():
            return
        partial = self.directory / f"{_PARTIAL}{step}"
        try:
            partial.mkdir(parents=True)
            for name, tree in zip(_PARTS, state.arrays(), strict=False):
                write_file(partial / name, _tensor_bytes(tree))
            write_file(partial / _NOTES_FILE, to_json(notes))
            sync(partial)
            partial.rename(self.directory / str(step))  # a reader sees a whole state or none
            sync(self.directory)
            for old in sorted(self._steps())[: -self.kept]:
                shutil.rmtree(self.directory / str(old))
        except OSError as error:
            raise UserError(
                f"{self.directory}: the training state of step {step} cannot be written ({error}). Free some "
                "space; the same command then goes on from the last whole state."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def load(self, like: State) -> tuple[State, dict[str, Any]]:
        """The latest state, put into `like`, and its notes. UserError when it does not fit `like`."""
        step = self.latest()
        assert step is not None
        folder = self.directory / str(step)
        try:
            notes = read_json(folder / _NOTES_FILE)
            trees = like.arrays()
            parts = _PARTS[: len(trees)]
            found = [read_tensors(folder / name) for name in parts]
            for tensors, tree, name in zip(found, trees, parts, strict=True):
                expected = {key: tuple(value.shape) for key, value in _leaves(tree).items()}
                shapes = {key: value.shape for key, value in tensors.items()}
                check_keys(expected, shapes, where=folder / name)
        except UserError as error:
            raise UserError(
                f"{self.directory}: the state of step {step} cannot be read ({error}). Delete the folder "
                f"{step} there to go on from the one before, or start over with --fresh."
            ) from error
        for tensors, tree in zip(found, trees, strict=True):
            for key, value in tensors.items():
                _put(tree, key.split("."), mx.array(value))
        return like, notes

    def close(self) -> None:
        """Nothing waits to be written."""

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self.directory.glob("*") if path.name.isdigit()]


def _leaves(tree: Any) -> dict[str, mx.array]:
    flat: Any = tree_flatten(tree)
    return dict(flat)


def _tensor_bytes(tree: Any) -> bytes:
    from safetensors.numpy import save

    return save({key: np.array(value) for key, value in _leaves(tree).items()})


def _put(tree: Any, path: list[str], value: mx.array) -> None:
    """Replace one array of a tree, in the container that holds it."""
    for part in path[:-1]:
        tree = tree[int(part) if isinstance(tree, list) else part]
    tree[int(path[-1]) if isinstance(tree, list) else path[-1]] = value
