"""A reranker in a process of its own, shared by all requests: pairs that wait are scored together.

A process that dies or hangs is replaced by a new one; until that is ready every call fails at once, which a
RAGPipeline answers with the first stage's order.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.backends import SCORES, Scorer, Scores
from common.errors import UserError

MAX_PAIRS = 64  # of a batch; a longer request is scored in several, others' pairs between them
_POLL = 0.02  # seconds between two looks at whether the caller still waits


class UnavailableError(Exception):
    """The reranker cannot answer now: it died, hangs, or starts."""


@dataclass(frozen=True)
class Batch:
    """What one call of the model held: pairs, the requests they are of, and its seconds."""

    pairs: int
    requests: int
    seconds: float


@dataclass
class _Job:
    """The pairs of one call; `taken` of them are in batches, `scored` of them back."""

    queries: list[str]
    passages: list[str]
    values: NDArray[np.float32]  # [5, N]
    taken: int = 0
    scored: int = 0
    error: Exception | None = None
    dropped: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class BatchedScorer:
    """A Scorer (common.backends) whose model runs in a process; many threads may call it at once.

    Args:
      load: makes the model in the new process; a function that can be imported there, or a partial of one.
      patience: seconds that a batch may take before the process counts as hung and is replaced.
      start_seconds: seconds that loading may take.
      on_batch: told of every batch.
    Raises UserError when the first start fails. `close` ends the process.
    """

    def __init__(
        self,
        load: Callable[[], Scorer],
        *,
        patience: float = 30.0,
        start_seconds: float = 300.0,
        max_pairs: int = MAX_PAIRS,
        on_batch: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self._load, self._patience, self._start_seconds = load, patience, start_seconds
        self._max_pairs, self._on_batch = max_pairs, on_batch
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.up, self.restarts = False, -1
        self.name, self.identity, self.fusion_weight = "", "", 0.0
        self._process: Any = None
        self._connection: Connection | None = None
        try:
            self._start()
        except UnavailableError as error:
            raise UserError(f"the reranker did not start: {error}") from None
        self._thread = threading.Thread(target=self._run, daemon=True, name="resonance-batches")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Calls that wait for a batch."""
        return len(self._waiting)

    @property
    def process_id(self) -> int | None:
        """Of the process that scores; None while there is none."""
        return self._process.pid if self._process is not None else None

    def score(
        self, queries: Sequence[str], passages: Sequence[str], on_batch: Callable[[int], None] | None = None
    ) -> Scores:
        """Scores of the pairs, each [N] float32. What `on_batch` raises takes the call out of the queue.

        Raises UnavailableError without a process, and UserError for what the model refuses.
        """
        if not queries:
            return Scores(*(np.zeros(0, np.float32) for _ in SCORES))
        job = _Job(list(queries), list(passages), np.zeros((len(SCORES), len(queries)), np.float32))
        with self._changed:
            if self._closing or not self.up:
                raise UnavailableError("the reranker's process is " + ("closed" if self._closing else "down"))
            self._waiting.append(job)
            self._changed.notify()
        try:
            told = 0
            while not job.done.wait(_POLL if on_batch is not None else 1.0):
                if on_batch is not None:
                    scored = job.scored
                    on_batch(scored - told)
                    told = scored
        finally:
            job.dropped = True
        if job.error is not None:
            raise job.error
        return Scores(*job.values)

    def close(self) -> None:
        """End the process; calls that still wait fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._patience + 5.0)
        self._stop()

    # the thread that feeds the process

    def _run(self) -> None:
        while not self._closing:
            if not self.up:
                self._restart()
                continue
            batch = self._next()
            if batch:
                self._score(batch)
            elif self._process is not None and not self._process.is_alive() and not self._closing:
                self._fail("the reranker's process died", [])
        self._fail("the service is closing", [])

    def _next(self) -> list[tuple[_Job, slice]]:
        """Parts of waiting jobs that together make a batch, the oldest first; empty after a while."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(0.5)
            parts: list[tuple[_Job, slice]] = []
            room = self._max_pairs
            unfinished: list[_Job] = []
            while self._waiting and room:
                job = self._waiting.popleft()
                if job.dropped:
                    continue
                end = min(job.taken + room, len(job.queries))
                parts.append((job, slice(job.taken, end)))
                room -= end - job.taken
                job.taken = end
                if end < len(job.queries):
                    unfinished.append(job)
            self._waiting.extend(unfinished)
        return parts

    def _score(self, batch: list[tuple[_Job, slice]]) -> None:
        queries = [query for job, part in batch for query in job.queries[part]]
        passages = [passage for job, part in batch for passage in job.passages[part]]
        began = time.perf_counter()
        try:
            kind, content = self._asked((queries, passages))
        except UnavailableError as error:
            self._fail(str(error), [job for job, _ in batch])
            return
        self._on_batch(Batch(len(queries), len(batch), time.perf_counter() - began))
        if kind == "error" and len(batch) > 1:  # one of them is to blame: the others are not told its error
            for single in batch:
                self._score([single])
            return
        start = 0
        for job, part in batch:
            size = part.stop - part.start
            if kind == "error":
                job.error = UserError(str(content))
                job.dropped = True
                job.done.set()
            else:
                job.values[:, part] = content[:, start : start + size]
                job.scored += size
                start += size
                if job.scored == len(job.queries):
                    job.done.set()

    def _asked(self, question: object) -> tuple[str, Any]:
        """What the process answers. UnavailableError when it died or takes too long."""
        assert self._connection is not None
        try:
            self._connection.send(question)
            if not self._connection.poll(self._patience):
                raise UnavailableError(f"the reranker's process hung for {self._patience:g} s")
            return self._connection.recv()
        except (EOFError, OSError):
            raise UnavailableError("the reranker's process died") from None

    def _fail(self, why: str, jobs: list[_Job]) -> None:
        """Every call that waits is told; the process is ended."""
        with self._changed:
            self.up = False
            jobs = [*jobs, *self._waiting]
            self._waiting.clear()
        for job in jobs:
            job.error = UnavailableError(why)
            job.done.set()
        self._stop()

    def _restart(self) -> None:
        try:
            self._start()
        except UnavailableError:
            with self._changed:  # once more after a while, unless the service closes
                self._changed.wait_for(lambda: self._closing, 5.0)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._load), daemon=True)
        self._process.start()
        theirs.close()
        self.restarts += 1
        try:
            if not self._connection.poll(self._start_seconds):
                raise UnavailableError(f"it took longer than {self._start_seconds:g} s to load")
            kind, content = self._connection.recv()
            if kind == "error":
                raise UnavailableError(content)
        except (EOFError, OSError):
            self._stop()
            raise UnavailableError("its process died while it loaded") from None
        except UnavailableError:
            self._stop()
            raise
        self.name, self.identity, self.fusion_weight = content
        with self._changed:
            self.up = True

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._connection = self._process = None


def _serve(connection: Connection, load: Callable[[], Scorer]) -> None:
    """In the process: load, then answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to handle
    try:
        scorer = load()
    except Exception as error:
        connection.send(("error", str(error) if isinstance(error, UserError) else repr(error)))
        return
    connection.send(("ready", (scorer.name, scorer.identity, scorer.fusion_weight)))
    while True:
        try:
            queries, passages = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = scorer.score(queries, passages)
            answer: tuple[str, Any] = ("scores", np.stack([getattr(found, name) for name in SCORES]))
        except Exception as error:
            answer = ("error", str(error) if isinstance(error, UserError) else repr(error))
        try:
            connection.send(answer)
        except OSError:
            return
