"""Perplexity of a language model over a split: windows or streams in, NLL of each document out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.data.language import PADDED_TO, LanguageBatch, TokenDocuments, evaluation_batches
from common.metrics.language import Perplexity, memory_statistics, perplexity
from common.progress import progress


class TokenScores(NamedTuple):
    """What a model says of B rows of one segment."""

    nll: np.ndarray  # float32 [B, S], nats of each label
    memory: Any  # for the next segment, as the backend has it; None without
    read: np.ndarray | None  # float32 [B, N + 1], mean read weight of each slot, the null slot last
    importance: np.ndarray | None  # float32 [B, N], after the segment
    age: np.ndarray | None  # float32 [B, N], segments since a slot was written, after the segment
    replaced: np.ndarray | None  # [B], slots that the segment overwrote


class SegmentScorer(Protocol):
    """A language model that scores segments. `carries` says whether it has a memory."""

    @property
    def context(self) -> int: ...
    @property
    def carries(self) -> bool: ...
    def score(self, batch: LanguageBatch, memory: Any) -> TokenScores: ...


class AttentiveScorer(SegmentScorer, Protocol):
    """A SegmentScorer that shows its attention."""

    def attention(
        self, input_ids: np.ndarray
    ) -> tuple[np.ndarray, ...]: ...  # of texts [B, S], each layer's weights [B, H, S, S]; none of an LSTM


@dataclasses.dataclass(frozen=True)
class LanguageResult:
    """A split's perplexity, how it was measured, and what the memory was used for."""

    perplexity: Perplexity
    mode: str  # static: every window begins with nothing; cache: memory of the document's earlier text
    context: int
    stride: int
    memory: dict[str, float] | None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the task, of what is generated

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.perplexity.json(),
            "mode": self.mode,
            "context": self.context,
            "stride": self.stride,
            "memory": self.memory,
            **self.scores,
        }


def evaluate_perplexity(
    scorer: SegmentScorer,
    documents: TokenDocuments,
    end: int,
    *,
    cache: bool,
    batch_size: int = 16,
    stride: int | None = None,
) -> LanguageResult:
    """Perplexity of every counted token. `cache` carries memory through each document (a model with one).

    `stride` (static only) is the tokens between windows, the context when absent. Raises ValueError for a
    split without a counted token, and for a model whose numbers are not finite.
    """
    context = scorer.context
    stride = context if stride is None or cache else stride
    segment = context if cache else min(context, _enough(documents))
    batches = evaluation_batches(
        documents, segment, batch_size, end, stride=min(stride, segment), carry=cache
    )
    nll, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    memory: Any = None
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    total = int(documents.counted.sum())
    with progress(total, "perplexity: tokens") as steps:
        for batch in batches:
            scores = scorer.score(batch, memory)
            memory = scores.memory
            mask = batch.mask[:, 0]
            rows = batch.row_index >= 0
            np.add.at(nll, batch.row_index[rows], (scores.nll * mask)[rows].sum(1, dtype=np.float64))
            np.add.at(tokens, batch.row_index[rows], mask[rows].sum(1))
            if (
                cache
                and scores.read is not None
                and scores.importance is not None
                and scores.replaced is not None
            ):
                used = mask.any(1)
                seen.append((scores.read[used], scores.importance[used], scores.replaced[used]))
            steps.advance(int(mask.sum()))
    found = perplexity(nll, tokens, documents.words, documents.bytes)
    statistics = memory_statistics(*(np.concatenate(x) for x in zip(*seen, strict=True))) if seen else None
    return LanguageResult(found, "cache" if cache else "static", context, stride, statistics)


def evaluate_modes(
    scorer: SegmentScorer,
    documents: TokenDocuments,
    end: int,
    *,
    batch_size: int = 16,
    stride: int | None = None,
) -> list[LanguageResult]:
    """`evaluate_perplexity` static, and of a model with a memory with its cache too."""
    return [
        evaluate_perplexity(scorer, documents, end, cache=cache, batch_size=batch_size, stride=stride)
        for cache in ((False, True) if scorer.carries else (False,))
    ]


def _enough(documents: TokenDocuments) -> int:
    """Tokens of a window that every document fits in."""
    return PADDED_TO * -(-int(max(documents.lengths(), default=1)) // PADDED_TO)
