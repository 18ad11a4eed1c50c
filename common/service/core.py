"""What the service does, without HTTP: a pipeline, its reranker's process, feedback, a language model."""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.backends import Scorer, load_scorer
from common.errors import UserError
from common.language.generation import Generated, Piece, SamplingConfig
from common.language.samples import LanguageGenerator
from common.metrics.calibration import Confidence
from common.rag import Context, RAGPipeline, Results
from common.reranker.reranking import load_confidence
from common.service.batching import BatchedScorer, UnavailableError
from common.service.feedback import FeedbackStore, Scored
from common.service.metrics import Metrics
from common.service.registry import Registry, Version

_log = logging.getLogger("resonance.service")


@dataclass(frozen=True)
class Reranked:
    """Passages of one request, best first: places in it, and float64 [N] of each."""

    order: list[int]
    score: list[float]
    resonance: list[float]
    overlap: list[float]
    coherence: list[float]


@dataclass(frozen=True)
class Found:
    """A search, the id under which it is stored (None when that failed), and the index's version."""

    id: str | None
    results: Results
    version: int


def start_reranker(
    load: Callable[[], Scorer], metrics: Metrics, *, patience: float = 30.0, start_seconds: float = 300.0
) -> BatchedScorer:
    """A reranker in its own process whose batches are counted. Raises UserError when it cannot start."""
    return BatchedScorer(load, patience=patience, start_seconds=start_seconds, on_batch=metrics.batch)


def reranker_of(directory: Path, backend: str) -> Callable[[], Scorer]:
    """How a process loads the reranker of a directory."""
    return functools.partial(load_scorer, directory, backend)


class Service:
    """Answers requests from many threads.

    Args:
      rag: the pipeline; its reranker is `scorer`.
      scorer: the reranker's process, None for the first stage alone.
      feedback: where searches and feedback are stored.
      generator: the language model, None without one.
      deadline: seconds that one text may take to be generated, and one /rerank to be scored.
    """

    def __init__(
        self,
        rag: RAGPipeline,
        scorer: BatchedScorer | None,
        feedback: FeedbackStore,
        metrics: Metrics,
        *,
        generator: LanguageGenerator | None = None,
        deadline: float = 60.0,
    ) -> None:
        self.rag, self.scorer, self.feedback, self.metrics = rag, scorer, feedback, metrics
        self.generator, self.deadline = generator, deadline
        self._active: set[object] = set()
        self._changed = threading.Condition()
        self._unrecorded = False
        metrics.watch(lambda: rag.statistics, self._gauges)

    def search(self, query: str, rerank: bool = True) -> Found:
        """All passages of the first stage, reranked or not, and stored for feedback."""
        with self._using():
            depth = self.rag.top_k_retrieval
            results = self.rag.retrieve_and_rerank(query, depth) if rerank else self.rag.retrieve(query)
            version = self.rag.index.version
        return Found(self._stored(results), results, version)

    def context(self, query: str, top_k: int, max_tokens: int) -> tuple[str | None, Context]:
        with self._using():
            found = self.rag.context(query, top_k, max_tokens)
        return self._stored(found.results), found

    def rerank(self, query: str, passages: Sequence[str]) -> Reranked:
        """Raises UnavailableError without a reranker's process, or past the deadline."""
        until = time.monotonic() + self.deadline

        def in_time(_: int) -> None:
            if time.monotonic() > until:
                raise UnavailableError(f"not scored within {self.deadline:g} s")

        with self._using():
            if self.scorer is None:
                raise UnavailableError("this service was started without a reranker")
            found = self.scorer.score([query] * len(passages), passages, in_time)
        if not np.isfinite(found.score).all():
            raise UnavailableError("a score is not finite: the reranker's checkpoint is damaged")
        order = np.argsort(-found.score, kind="stable")
        parts = (found.score, found.resonance, found.overlap, found.coherence)
        return Reranked(order.tolist(), *(part[order].astype(float).tolist() for part in parts))

    def generate(
        self, prompts: Sequence[str], sampling: SamplingConfig, on_text: Callable[[Piece], None]
    ) -> list[Generated]:
        """Raises UserError for what the model cannot continue, UnavailableError past the deadline."""
        assert self.generator is not None
        began = time.monotonic()

        def told(piece: Piece) -> None:
            if time.monotonic() > began + self.deadline:
                raise UnavailableError(f"the text took longer than {self.deadline:g} s; ask for fewer tokens")
            on_text(piece)

        made = self.generator.generate(prompts, sampling, told)
        self.metrics.stage("generate", time.monotonic() - began)
        self.metrics.generated.inc(sum(len(item.ids) for item in made))
        return made

    def replace_reranker(self, scorer: BatchedScorer, confidence: Confidence | None) -> None:
        """Another reranker for what comes from now on; the old one ends with the last request that may use
        it."""
        old, self.scorer = self.scorer, scorer
        self.rag.set_reranker(scorer, confidence=confidence)
        with self._changed:
            before = set(self._active)
            self._changed.wait_for(lambda: not before & self._active)
        if old is not None:
            old.close()

    def close(self) -> None:
        if self.scorer is not None:
            self.scorer.close()
        self.feedback.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keeps the rerankers that there are alive."""
        token = object()
        with self._changed:
            self._active.add(token)
        try:
            yield
        finally:
            with self._changed:
                self._active.discard(token)
                self._changed.notify_all()

    def _stored(self, results: Results) -> str | None:
        """The search's id; None, counted and said once, when it cannot be stored."""
        for stage, seconds in results.seconds.items():
            self.metrics.stage(stage, seconds)
        by_rank = sorted(results.hits, key=lambda hit: hit.first_rank)
        first = [Scored(hit.id, hit.first_score) for hit in by_rank]
        second = [Scored(hit.id, hit.score) for hit in results.hits] if results.reranked else []
        try:
            return self.feedback.record_search(
                results.query,
                first,
                second,
                latency=results.seconds,
                cache_hit=cache_hit(results),
                fallback=results.fallback,
            )
        except UserError as error:
            self.metrics.unrecorded.inc()
            if not self._unrecorded:
                _log.warning("%s; searches go on without being stored (said once, counted)", error)
            self._unrecorded = True
            return None

    def _gauges(self) -> dict[str, float]:
        scorer = self.scorer
        found = {"index_passages": float(self.rag.index.size)}
        if scorer is not None:
            found |= {"reranker_up": float(scorer.up), "reranker_restarts": float(scorer.restarts)}
            found["batch_queue_requests"] = float(scorer.waiting)
        return found


def cache_hit(results: Results) -> bool:
    """Whether every score came from the cache."""
    return results.reranked and results.cached >= len(results.hits) > 0


class Reloader:
    """Watches a model of a registry and brings each promoted version but `seen` into the service.

    A version that cannot be loaded is said once, and the one before stays.
    """

    def __init__(
        self,
        service: Service,
        registry: Registry,
        name: str,
        start: Callable[[Path], BatchedScorer],
        seen: Version | None,
        every: float = 5.0,
    ) -> None:
        self._service, self._registry, self._name, self._start = service, registry, name, start
        self._every, self._stop = every, threading.Event()
        self._seen = seen
        self._thread = threading.Thread(target=self._watch, daemon=True, name="resonance-reload")

    def begin(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def look(self) -> bool:
        """Bring in the current version when it is another than before; whether that was done."""
        try:
            version = self._registry.current_version(self._name)
            if version is None or (self._seen is not None and version.digest == self._seen.digest):
                return False
            self._seen = version
            directory = self._registry.current(self._name)
            confidence = load_confidence(directory)
            scorer = self._start(directory)
        except (UserError, OSError) as error:
            _log.error("the new version is not used, the one before stays: %s", error)
            self._service.metrics.reloads.labels("refused").inc()
            return False
        self._service.replace_reranker(scorer, confidence)
        self._service.metrics.reloads.labels("done").inc()
        _log.info("reranker: version %d of %s", version.number, self._name)
        return True

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.look()


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
