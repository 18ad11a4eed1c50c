"""How the processes of a run find each other, agree, and fail together."""

from __future__ import annotations

import pytest

from common.errors import UserError
from common.processes import Launch, Processes, launch

FLAGS = Launch("node1:1234", 4, 3)


def test_a_process_alone_is_the_first_and_agrees_with_itself() -> None:
    alone = Processes()
    assert alone.first and alone.any(True) and not alone.any(False)
    assert alone.told([0.1, 1 / 3]) == [0.1, 1 / 3] and alone.in_turn(lambda: 7) == 7
    with pytest.raises(UserError, match="mine"), alone.together():
        raise UserError("mine")


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (Launch(), {}, None),
        (Launch(), {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # an allocation without a step
        (Launch(), {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (Launch(), {"SLURM_STEP_NUM_TASKS": "4"}, Launch()),
        (Launch(), {"OMPI_COMM_WORLD_SIZE": "2"}, Launch()),
        (FLAGS, {}, FLAGS),
        (
            Launch(process=3),
            {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
            FLAGS,
        ),
    ],
)
def test_a_launch_is_read_from_flags_then_environment_then_the_cluster(
    given: Launch, environment: dict[str, str], expected: Launch | None
) -> None:
    assert launch(given, environment) == expected


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        (Launch(processes=2), {}, "need all of --coordinator HOST:PORT, --processes N and --process I"),
        (Launch("node1", 2, 0), {}, "--coordinator node1: allowed: HOST:PORT"),
        (Launch("node1:1", 2, 2), {}, "--process is 2; allowed: 0 to 1"),
        (Launch(), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; allowed: a whole number"),
    ],
)
def test_half_a_launch_is_refused(given: Launch, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(given, environment)


@pytest.mark.parametrize(
    ("other", "error"), [(1.0, UserError), (2.0, KeyboardInterrupt)], ids=["failed", "interrupted"]
)
def test_what_ends_one_process_ends_the_others(other: float, error: type[BaseException]) -> None:
    met: list[list[float]] = []

    def gather(row: list[float]) -> list[list[float]]:
        met.append(row)
        return [[other], row]

    processes = Processes(1, 2, gather)
    with pytest.raises(error), processes.together():
        pass
    with pytest.raises(ValueError, match="mine"), processes.together():  # its own error goes first
        raise ValueError("mine")
    assert met == [[0.0], [1.0]]


def test_the_first_process_works_before_the_others() -> None:
    order: list[str] = []

    def gather(row: list[float]) -> list[list[float]]:
        order.append("met")
        return [row, row]

    for index in (0, 1):
        Processes(index, 2, gather).in_turn(lambda: order.append("work"))
    assert order == ["work", "met", "met", "met", "work", "met"]
