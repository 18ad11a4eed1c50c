"""Perplexity of a language model over a split: windows or streams in, NLL of each document out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.data.language import LanguageBatch, TokenDocuments, evaluation_batches, padded_length
from common.metrics.language import Perplexity, alignment_statistics, memory_statistics, perplexity
from common.progress import progress


class TokenScores(NamedTuple):
    """What a model says of B rows of one segment."""

    nll: np.ndarray  # float32 [B, S], nats of each label
    memory: Any  # for the next segment, as the backend has it; None without
    read: np.ndarray | None  # float32 [B, N + 1], mean read weight of each slot, the null slot last
    importance: np.ndarray | None  # float32 [B, N], after the segment
    age: np.ndarray | None  # float32 [B, N], segments since a slot was written, after the segment
    replaced: np.ndarray | None  # [B], slots that the segment overwrote
    alignment: np.ndarray | None = None  # float32 [B, S, 2], phase_magnitude_means of a state


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
    """A split's perplexity, how it was measured, use of the memory, alignment of the state."""

    perplexity: Perplexity
    mode: str  # static: every window begins with nothing; cache: memory of the document's earlier text
    context: int
    stride: int
    memory: dict[str, float] | None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the task, of what is generated
    alignment: Mapping[str, float] | None = None  # with a teacher's certainty (alignment_statistics)
    nll: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))  # nats of each document, [N]

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.perplexity.json(),
            "mode": self.mode,
            "context": self.context,
            "stride": self.stride,
            "memory": self.memory,
            "alignment": self.alignment,
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
    certainties: Sequence[np.ndarray] | None = None,
) -> LanguageResult:
    """Perplexity of every counted token. `cache` carries memory through each document (a model with one).

    `stride` (static only) is the tokens between windows, the context when absent. `certainties` of a teacher
    (`teacher_certainties` with the same arguments) are what a state's alignment is measured against. Raises
    ValueError for a split without a counted token, and for a model whose numbers are not finite.
    """
    context = scorer.context
    stride = context if stride is None or cache else stride
    batches = _batches(context, documents, end, cache=cache, batch_size=batch_size, stride=stride)
    nll, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    memory: Any = None
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    told: list[tuple[np.ndarray, np.ndarray]] = []
    total = int(documents.counted.sum())
    with progress(total, "perplexity: tokens") as steps:
        for number, batch in enumerate(batches):
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
            if certainties is not None and scores.alignment is not None:
                told.append((scores.alignment[mask], certainties[number][mask]))
            steps.advance(int(mask.sum()))
    found = perplexity(nll, tokens, documents.words, documents.bytes)
    statistics = memory_statistics(*(np.concatenate(x) for x in zip(*seen, strict=True))) if seen else None
    aligned = alignment_statistics(*map(np.concatenate, zip(*told, strict=True))) if told else None
    mode = "cache" if cache else "static"
    return LanguageResult(found, mode, context, stride, statistics, alignment=aligned, nll=nll)


def teacher_certainties(
    certainty: Callable[[np.ndarray, np.ndarray], np.ndarray],
    context: int,
    documents: TokenDocuments,
    end: int,
    *,
    batch_size: int = 16,
    stride: int | None = None,
) -> list[np.ndarray]:
    """What `certainty` (input ids, segments [B, S] -> float32 [B, S] in [0, 1]) says of each batch of
    `evaluate_perplexity` without a cache, of a model with this context."""
    stride = context if stride is None else stride
    batches = _batches(context, documents, end, cache=False, batch_size=batch_size, stride=stride)
    found = []
    with progress(int(documents.counted.sum()), "teacher on dev: tokens") as steps:
        for batch in batches:
            found.append(certainty(batch.input_ids[:, 0], batch.segments[:, 0]))
            steps.advance(int(batch.mask.sum()))
    return found


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


def _batches(
    context: int, documents: TokenDocuments, end: int, *, cache: bool, batch_size: int, stride: int
) -> Iterator[LanguageBatch]:
    """`evaluation_batches`, whose windows are not longer than every document needs."""
    segment = context if cache else min(context, _enough(documents))
    return evaluation_batches(documents, segment, batch_size, end, stride=min(stride, segment), carry=cache)


def _enough(documents: TokenDocuments) -> int:
    """Tokens of a window that every document fits in."""
    return padded_length(int(max(documents.lengths(), default=1)))
