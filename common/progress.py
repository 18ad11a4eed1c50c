"""Progress of long work on stderr: a bar in a terminal, otherwise a line now and then, with an estimate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_hushed = False
LINE_SECONDS = 20.0  # between lines where there is no terminal; shorter work says nothing


class Steps:
    """How far the work has come. `show` gets (steps done, text) whenever that changes."""

    def __init__(self, total: int, start: int, show: Callable[[int, str], None]) -> None:
        self._total, self._done, self._show = total, start, show
        self._first, self._began = start, math.nan

    def update(self, step: int, text: str = "") -> None:
        """`step` of the total is done; `text` is shown beside the time left."""
        self._done = step
        self._show(step, "  ".join(part for part in (self._left(), text) if part))

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.update(self._done + count)

    def _left(self) -> str:
        """From this process's own steps, without the first update: that one compiles."""
        now = time.monotonic()
        if math.isnan(self._began):
            self._first, self._began = self._done, now
        if not self._first < self._done < self._total:
            return ""
        return f"{clock((now - self._began) / (self._done - self._first) * (self._total - self._done))} left"


def hush() -> None:
    """Show no progress from here on: of several processes one speaks."""
    global _hushed
    _hushed = True


@contextmanager
def progress(total: int, what: str, *, start: int = 0) -> Iterator[Steps]:
    """Show that `what` goes on, until the block ends. `start` is where a resumed run begins."""
    if _hushed:
        yield Steps(total, start, lambda step, text: None)
        return
    if not sys.stderr.isatty():
        yield Steps(total, start, _Lines(total, what))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what is printed to a file stays there
    ) as bar:
        task = bar.add_task(what, total=total, completed=start, text="")
        yield Steps(total, start, lambda step, text: bar.update(task, completed=step, text=text))


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Lines:
    """Prints at most every LINE_SECONDS, and the end of what was long enough to be seen."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._spoken = total, what, False
        self._said = time.monotonic()

    def __call__(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now - self._said < LINE_SECONDS and not (self._spoken and step >= self._total):
            return
        self._said, self._spoken = now, True
        counted = f"{self._what} {step:,}/{self._total:,}"
        print("  ".join(part for part in (counted, text) if part), file=sys.stderr, flush=True)
