"""Errors for the person at the keyboard, and how a command reports them."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: what was wrong, where, what is allowed, what to do."""


def listed(problems: list[str], limit: int = 20) -> str:
    """Join problems one to a line, the first `limit` of them and a count of the rest."""
    shown = "\n".join(f"  {problem}" for problem in problems[:limit])
    more = len(problems) - limit
    return shown + (f"\n  ... and {more} more" if more > 0 else "")


# what MLX says in a plain RuntimeError
_MLX_MEMORY = ("[malloc] Unable to allocate", "] Attempting to allocate", "Insufficient Memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return "RESOURCE_EXHAUSTED" in str(error) or "ut of memory" in str(error)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MLX_MEMORY):
        return True
    return isinstance(error, MemoryError)


_RIGHTS = "Mend its permissions, or name another place (of the cache: $RESONANCE_CACHE)"
_MENDED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
}


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 or its code, 2 after a UserError, 130 after Ctrl-C.

    A full disk, a lack of rights and memory that ran out are a UserError's too. A reader that closes the pipe
    early (`| head`) ends the command without a word.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows what a terminal would, when it would
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in _MENDED:
            raise
        print(f"error: {error}. {_MENDED[error.errno]}; the same command then goes on.", file=sys.stderr)
        raise SystemExit(2) from error
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(
            "error: out of memory; lower data.max_passage_tokens or evaluation.depth, or use fewer passages "
            f"or a smaller model. ({str(error)[:200] or 'host memory'})",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    raise SystemExit(code or 0)
