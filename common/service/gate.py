"""Admission: so many requests at work, so many waiting, and the others are told when to come again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class BusyError(Exception):
    """There is no room, or the wait was too long; `retry_after` in seconds."""

    def __init__(self, why: str, retry_after: int) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class Gate:
    """Runs blocking work in at most `threads` threads, with `queue` requests waiting for at most `wait`
    seconds. `on_wait` is told how long each has waited."""

    def __init__(
        self, threads: int, queue: int, wait: float, on_wait: Callable[[float], None] = lambda _: None
    ) -> None:
        self.threads, self.queue, self.wait = threads, queue, wait
        self.inside = 0
        self._limiter = anyio.CapacityLimiter(threads)
        self._seconds = 0.1  # of a request, smoothed
        self._on_wait = on_wait

    @property
    def full(self) -> bool:
        return self.inside >= self.threads + self.queue

    @property
    def waiting(self) -> int:
        return max(0, self.inside - self.threads)

    def busy(self, why: str) -> BusyError:
        """An error that says when a place may be free."""
        seconds = self._seconds * self.inside / self.threads
        return BusyError(why, min(60, max(1, math.ceil(seconds))))

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread. BusyError when there is no room, or not soon enough."""
        if self.full:
            raise self.busy(f"{self.inside} requests are at work or waiting; the queue is full")
        self.inside += 1
        came = time.perf_counter()

        def begun() -> T:
            waited = time.perf_counter() - came
            self._on_wait(waited)
            if waited > self.wait:
                raise self.busy(f"waited {waited:.1f} s for a place, allowed are {self.wait:g}")
            start = time.perf_counter()
            try:
                return work()
            finally:
                self._seconds += 0.1 * (time.perf_counter() - start - self._seconds)

        try:
            # not abandoned when the asker is gone: what was accepted is finished
            return await anyio.to_thread.run_sync(begun, limiter=self._limiter)
        finally:
            self.inside -= 1
