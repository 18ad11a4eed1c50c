"""The processes of one run: which one writes and speaks, how they agree, how a failure of one ends all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from common.errors import UserError

T = TypeVar("T")
Gather = Callable[[list[float]], list[list[float]]]  # one row of numbers in, the rows of all processes out

_FINE, _FAILED, _INTERRUPTED = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class Launch:
    """How a process finds the others; what is None is read from the cluster (SLURM, Open MPI)."""

    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None
    process: int | None = None  # from 0


class Processes:
    """This process among those of a run; alone unless a backend says otherwise.

    Every process calls `any`, `told`, `together` and `in_turn` in the same order: each waits for all.
    """

    def __init__(self, index: int = 0, count: int = 1, gather: Gather = lambda row: [row]) -> None:
        self.index, self.count, self._gather = index, count, gather

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(row[0] for row in self._gather([float(flag)]))

    def told(self, values: Sequence[float]) -> list[float]:
        """The first process's values, as many as this one's, to the last bit."""
        return self._gather(list(values))[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block in which one process may fail: all reach its end, or all leave with an error."""
        state = _FAILED
        try:
            yield
            state = _FINE
        except KeyboardInterrupt:
            state = _INTERRUPTED
            raise
        finally:
            others = max(row[0] for row in self._gather([state]))
        if others == _INTERRUPTED:
            raise KeyboardInterrupt
        if others == _FAILED:
            raise UserError("another process of this run has failed; its message says why.")

    def in_turn(self, work: Callable[[], T]) -> T:
        """work() in the first process, then in the others, who find what it has put into the cache."""
        done: list[T] = []
        for mine in (self.first, not self.first):
            with self.together():
                if mine:
                    done.append(work())
        return done[0]


def launch(given: Launch, environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How to join the other processes; None for a process alone. Raises UserError for half a description.

    Flags first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then a SLURM step or an
    Open MPI job of more than one task.
    """
    count, index = environment.get("JAX_NUM_PROCESSES"), environment.get("JAX_PROCESS_ID")
    found = Launch(
        given.coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        given.processes if given.processes is not None else _number("JAX_NUM_PROCESSES", count),
        given.process if given.process is not None else _number("JAX_PROCESS_ID", index),
    )
    tasks = max(int(environment.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if found == Launch():
        return found if tasks > 1 else None
    if tasks == 1 and None in (found.coordinator, found.processes, found.process):
        raise UserError(
            "several processes need all of --coordinator HOST:PORT, --processes N and --process I (or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID); under SLURM's srun none."
        )
    if found.coordinator is not None and not found.coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator {found.coordinator}: allowed: HOST:PORT, as in node1:12345")
    if found.processes is not None and not 0 <= (found.process or 0) < found.processes:
        raise UserError(
            f"--process is {found.process}; allowed: 0 to {found.processes - 1} (--processes - 1)"
        )
    return found


def _number(name: str, text: str | None) -> int | None:
    if text is not None and not text.isdigit():
        raise UserError(f"{name} is {text!r}; allowed: a whole number")
    return None if text is None else int(text)
