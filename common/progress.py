"""Progress of long work on stderr: a bar with an estimate on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Steps:
    """`with Steps(total, what) as steps: ... steps.advance(n)`; silent when the work is short."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done = total, what, 0
        self._start = time.monotonic()
        self._said = self._start

    def __enter__(self) -> Steps:
        return self

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= (0.5 if sys.stderr.isatty() else 30.0) and self._done < self._total:
            self._said = now
            self._say(now - self._start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._said > self._start and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _say(self, seconds: float) -> None:
        left = seconds * (self._total - self._done) / max(1, self._done)
        text = f"{self._what}: {self._done:,} of {self._total:,}, about {_clock(left)} left"
        ends = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(ends[0] + text, end=ends[1], file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
