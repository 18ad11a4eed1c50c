"""Training state on disk: Orbax v1, atomic, the last two kept; what an interrupted run resumes from.

Holds parameters, optimizer and step as arrays, and the loop's own notes (data position, best result) as JSON.
Twin: mlx_impl/training/state.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from common.errors import UserError

KEPT = 2


class Stepped(Protocol):
    """A pytree of arrays that knows how many steps it has taken: jax_impl.training.step.TrainState."""

    @property
    def step(self) -> jax.Array: ...


State = TypeVar("State", bound=Stepped)


class StateFolder:
    """The `state/` folder of a run."""

    def __init__(self, directory: Path) -> None:
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; what it raises is told below
        self._failed = False
        self.directory = directory.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The last whole step, None in a new run."""
        found = self._checkpointer.latest
        return None if found is None else int(found.step)

    def save(self, state: Stepped, notes: dict[str, Any]) -> None:
        """Write the state of its step; a broken write leaves the earlier ones whole (UserError)."""
        step = int(state.step)
        if step == self.latest():
            return
        try:
            self._checkpointer.save(step, _arrays(state), force=True, custom_metadata=notes)
        except (OSError, ValueError) as error:
            self._failed = True
            raise UserError(
                f"{self.directory}: the training state of step {step} cannot be written ({error}). Free some "
                "space; the same command then goes on from the last whole state."
            ) from error

    def load(self, like: State) -> tuple[State, dict[str, Any]]:
        """The latest state, placed as `like` is, and its notes. UserError when it does not fit `like`."""
        step = self.latest()
        assert step is not None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _arrays(like)
        )
        try:
            loaded = self._checkpointer.load(step, abstract)
            notes = self._checkpointer.checkpointables_metadata(step).custom_metadata
            if not notes:
                raise ValueError("its notes are lost")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.directory}: the state of step {step} cannot be read ({error}). Delete the folder "
                f"{step} there to go on from the one before, or start over with --fresh."
            ) from error
        treedef = jax.tree.structure(like)
        leaves = [jnp.asarray(loaded[name]) for name in _arrays(like)]
        return jax.tree.unflatten(treedef, leaves), dict(notes)

    def close(self) -> None:
        try:
            self._checkpointer.close()
        except (OSError, ValueError):
            if not self._failed:  # else it is the error of `save` again
                raise


def _arrays(state: Stepped) -> dict[str, jax.Array]:
    """The state's arrays by number: the order of a pytree's leaves is fixed by its structure."""
    return {f"{number:04d}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}
