"""How a command ends for its user: one message, what to do, and an exit code."""

from __future__ import annotations

import errno

import pytest

from common.errors import UserError, run_command


class JaxRuntimeError(RuntimeError):
    """As jax names it."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no file x"), 2, "error: no file x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "Free some space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
            2,
            "'/cache/x'. Mend its permissions",
        ),
        (MemoryError(), 2, "out of memory; lower data.max_passage_tokens"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 12 GiB"), 2, "out of memory"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(fail)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (code, "")
    assert message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), JaxRuntimeError("INTERNAL"), KeyError("a")])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(fail)


def test_a_command_s_own_code_is_its_exit_code() -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: 3)
    assert ended.value.code == 3
