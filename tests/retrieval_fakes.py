"""An encoder and a scorer that need no model: words are hashed, so what shares words is near."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.backends import Scores


class WordEncoder:
    """Unit vectors: the sum of a random direction for each word."""

    def __init__(self, name: str = "words", dim: int = 128) -> None:
        self.name, self.identity, self.dim = name, name, dim
        self.encoded = 0  # texts so far

    def encode(self, texts: Sequence[str], *, kind: str = "passage") -> np.ndarray:
        self.encoded += len(texts)
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split() or [""]:
                vectors[row] += _direction(word.strip(".,?"), self.dim)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@functools.cache
def _direction(word: str, dim: int) -> np.ndarray:
    seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).normal(size=dim)


class WordScorer:
    """The score is the number of the passage's words that the query has; each batch calls `before` first."""

    def __init__(self, identity: str = "scorer", omega: float = 0.0, batch: int = 4) -> None:
        self.name, self.identity, self.fusion_weight, self.batch = "words", identity, omega, batch
        self.scored = 0  # pairs so far
        self.before: Callable[[], None] = lambda: None

    def score(
        self, queries: Sequence[str], passages: Sequence[str], on_batch: Callable[[int], None] | None = None
    ) -> Scores:
        found: list[float] = []
        for start in range(0, len(passages), self.batch):
            self.before()
            for query, passage in zip(
                queries[start : start + self.batch], passages[start : start + self.batch], strict=True
            ):
                words = set(query.lower().split())
                found.append(float(sum(word.strip(".") in words for word in passage.lower().split())))
                self.scored += 1
            if on_batch is not None:
                on_batch(min(self.batch, len(passages) - start))
        score = np.asarray(found, np.float32)
        part = np.full(len(score), 0.5, np.float32)
        return Scores(score, score, part, part, part)


class MoodyScorer(WordScorer):
    """A WordScorer that hangs for `hang`, ends its process for `die`, and cannot read `refuse`."""

    def score(self, queries: Any, passages: Any, on_batch: Any = None) -> Scores:
        for query in queries:
            if "hang" in query:
                time.sleep(60)
            if "die" in query.split():
                os._exit(1)
            if "refuse" in query:
                raise ValueError("cannot read this")
        return super().score(queries, passages, on_batch)


class SecondScorer(MoodyScorer):
    """Another model, with another name and the opposite order."""

    def __init__(self) -> None:
        super().__init__("second")
        self.name = "second"

    def score(self, queries: Any, passages: Any, on_batch: Any = None) -> Scores:
        found = super().score(queries, passages, on_batch)
        return Scores(-found.score, -found.score, found.resonance, found.overlap, found.coherence)
