"""Batches for language models: tokens in ArrayRecord, read through grain as packed rows or as streams.

A batch is a pure function of (seed, step, data): a run that resumes sees what it would have seen.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.data.array_records import Records, write_once
from common.data.corpora import UNKNOWN, Corpus, Document
from common.errors import UserError
from common.language.text import LanguageTokenizer

WHAT = "the tokens of a corpus"
_Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_UNKNOWN_BYTES = len(UNKNOWN.encode())
PADDED_TO = 32  # lengths of whole rows are multiples, so that few shapes are compiled
WINDOW = 50  # batches whose rows are sorted by length together


def padded_length(length: int, multiple: int = PADDED_TO) -> int:
    """The next multiple from `length` on."""
    return multiple * -(-length // multiple)


@dataclass(frozen=True)
class TokenDocuments:
    """The documents of a split as tokens, one behind the other."""

    ids: np.ndarray  # int32 [T]
    counted: np.ndarray  # bool [T]: what the loss and perplexity count
    starts: np.ndarray  # int64 [N + 1]: document i is ids[starts[i] : starts[i + 1]]
    words: np.ndarray  # int64 [N]: counted words of the original, an end of line as one
    bytes: np.ndarray  # int64 [N]: counted bytes of the text

    def __len__(self) -> int:
        return len(self.words)

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [N]."""
        return np.diff(self.starts)

    def document(self, index: int) -> slice:
        """Where a document lies in `ids`."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def chosen(self, indices: Sequence[int] | np.ndarray) -> TokenDocuments:
        """These documents, in this order."""
        places = [self.document(int(index)) for index in indices]
        return joined_documents(
            [self.ids[place] for place in places],
            [self.counted[place] for place in places],
            self.words[indices],
            self.bytes[indices],
        )


def joined_documents(
    ids: Sequence[np.ndarray], counted: Sequence[np.ndarray], words: Any, bytes_: Any
) -> TokenDocuments:
    """Documents from the ids int32 [n] and what counts bool [n] of each, their counted words and bytes."""
    starts = np.concatenate(([0], np.cumsum([len(part) for part in ids]))).astype(np.int64)
    empty = np.zeros(0, np.int32)
    return TokenDocuments(
        np.concatenate([*ids, empty]),
        np.concatenate([*counted, empty.astype(bool)]),
        starts,
        np.asarray(words, np.int64),
        np.asarray(bytes_, np.int64),
    )


@dataclass(frozen=True)
class LanguageBatch:
    """B rows of K segments of S tokens, in the order of their text."""

    input_ids: np.ndarray  # int32 [B, K, S]
    labels: np.ndarray  # int32 [B, K, S]: the next token
    mask: np.ndarray  # bool [B, K, S]: whether that one is counted
    segments: np.ndarray  # int32 [B, K, S]: number of the document within the segment, 0 at padding
    reset: np.ndarray  # bool [B, K]: memory is empty when this segment begins
    row_index: np.ndarray  # int32 [B]: which row or stream of the epoch (evaluation: which document, -1 none)

    @property
    def token_share(self) -> float:
        """Counted tokens / places, in [0, 1]."""
        return float(self.mask.mean())


class Plan(Protocol):
    """What stands in which step; len(plan) is the steps of an epoch."""

    def __len__(self) -> int: ...
    def batch(self, step: int) -> LanguageBatch: ...
    def loader(self, steps: int) -> Any: ...


# --- on disk ---


def write_tokens(
    corpus: Corpus,
    tokenizer: LanguageTokenizer,
    directory: Path,
    *,
    mask_unknown: bool,
    mask_prompt: bool,
) -> Path:
    """Write a corpus to a folder of `directory` named by content and settings, and return it.

    Splits without a document are left out.
    """
    settings = (corpus.fingerprint, tokenizer.fingerprint(), mask_unknown, mask_prompt)
    place = directory / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    builder = functools.partial(_builder_class(), corpus, tokenizer, mask_unknown, mask_prompt)
    return write_once(place, builder, WHAT)


def read_tokens(directory: Path, split: str) -> TokenDocuments:
    """A split of what write_tokens returned. Raises UserError when it is missing or damaged."""
    records = Records(directory, split, WHAT)
    try:
        found = [records[i] for i in range(len(records))]
        ids = [np.asarray(record["ids"], np.int32) for record in found]
        counted = [np.asarray(record["counted"], bool) for record in found]
        words, sizes = ([record[name] for record in found] for name in ("words", "bytes"))
        return joined_documents(ids, counted, words, sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise records.unreadable(str(error)) from error


@cache
def _builder_class() -> Any:
    """The TFDS builder; made on first use, since TFDS is slow to import."""
    import tensorflow_datasets as tfds

    class CorpusTokens(tfds.core.GeneratorBasedBuilder):
        """Documents of a corpus as tokens."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = ()

        def __init__(
            self, corpus: Corpus, tokenizer: LanguageTokenizer, unknown: bool, prompt: bool, **kwargs: Any
        ) -> None:
            self._corpus, self._tokenizer, self._masked = corpus, tokenizer, (unknown, prompt)
            super().__init__(**kwargs)

        def _info(self) -> Any:
            features = {
                "ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                "counted": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                "words": tfds.features.Scalar(np.int64),
                "bytes": tfds.features.Scalar(np.int64),
            }
            # Articles of a test split are read in their order.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            written = (split for split, documents in self._corpus.splits.items() if documents)
            return {split: self._generate_examples(split) for split in written}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            documents, (unknown, prompt) = self._corpus.splits[split], self._masked
            encoded = self._tokenizer.encode_documents(documents, mask_unknown=unknown, mask_prompt=prompt)
            for number, (document, (ids, counted)) in enumerate(zip(documents, encoded, strict=True)):
                words, size = _counted_text(document, unknown, prompt)
                record = {"ids": ids, "counted": counted.astype(np.uint8), "words": words, "bytes": size}
                yield number, record

    return CorpusTokens


def _counted_text(document: Document, mask_unknown: bool, mask_prompt: bool) -> tuple[int, int]:
    """Words and bytes of what is counted."""
    text, words = document.text, document.words
    if mask_prompt and document.prompt:
        text = text[document.prompt :]
        words = sum(len(line.split()) + 1 for line in text.splitlines())
    unknown = text.count(UNKNOWN) if mask_unknown else 0
    return words - unknown, len(text.encode()) - unknown * _UNKNOWN_BYTES


# --- rows ---


class _Planned:
    """What both plans share: the position in the run, and rows cut from joined documents."""

    def __init__(self, documents: TokenDocuments, segment: int, end: int, seed: int) -> None:
        self.documents, self.segment, self.end, self.seed = documents, segment, end, seed
        self._epoch: tuple[int, Any] | None = None

    def loader(self, steps: int) -> Any:
        """A grain iterator over the first `steps` batches of the run, with get_state() and set_state()."""
        import grain

        # No threads: a batch costs less than a millisecond, and the state then says exactly what was read.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return iter(grain.MapDataset.range(steps).map(self.batch).to_iter_dataset(options))

    def batch(self, step: int) -> LanguageBatch:
        """The batch of a step counted from the start of the run."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Steps of an epoch."""
        raise NotImplementedError

    def _plan_epoch(self, epoch: int) -> Any:
        """What the batches of an epoch are cut from."""
        raise NotImplementedError

    def _place(self, step: int) -> tuple[Any, int]:
        """The plan of a step's epoch, made once, and the step's place in it."""
        epoch, position = divmod(step, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan_epoch(epoch))
        return self._epoch[1], position

    def _joined(self, group: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Documents as the model reads them, an end before, between and behind: ids [n], counted [n]."""
        ids, counted = [np.asarray([self.end], np.int32)], [np.zeros(1, bool)]
        for index in group:
            place = self.documents.document(index)
            ids += [self.documents.ids[place], np.asarray([self.end], np.int32)]
            counted += [self.documents.counted[place], np.ones(1, bool)]
        return np.concatenate(ids), np.concatenate(counted)


def _cut(ids: np.ndarray, counted: np.ndarray, start: int, stop: int, size: int, end: int) -> _Row:
    """input_ids, labels, mask, segments [size] of ids[start:stop], filled up with what is not counted."""
    stop = min(stop, start + size + 1)
    shown = max(0, stop - start - 1)  # positions with a next token
    inputs, labels = np.full(size, end, np.int32), np.full(size, end, np.int32)
    mask = np.zeros(size, bool)
    inputs[:shown], labels[:shown] = ids[start : start + shown], ids[start + 1 : stop]
    mask[:shown] = counted[start + 1 : stop]
    segments = np.zeros(size, np.int32)
    segments[:shown] = np.cumsum(inputs[:shown] == end) + 1
    return inputs, labels, mask, segments


def _stacked(parts: Sequence[_Row]) -> _Row:
    """Rows as columns of a batch, K = 1."""
    inputs, labels, mask, segments = (np.stack(part)[:, None] for part in zip(*parts, strict=True))
    return inputs, labels, mask, segments


class PackedRows(_Planned):
    """Documents shuffled, joined by their ends, and cut into rows of `segment` tokens: for Indra.

    A row may hold parts of several documents, told apart by `segments`. An epoch holds every token once, less
    the rows of an incomplete batch, others each epoch. With `fixed` the rows are the same in every epoch, in
    another order. Raises UserError when there are fewer rows than a batch holds.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        segment: int,
        batch_size: int,
        end: int,
        seed: int,
        *,
        fixed: bool = False,
    ) -> None:
        super().__init__(documents, segment, end, seed)
        self.batch_size, self.fixed = batch_size, fixed
        self.rows = -(-(len(documents.ids) + len(documents)) // segment)
        if self.rows < batch_size:
            raise _too_small(self.rows, f"rows of {segment} tokens", batch_size)

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def batch(self, step: int) -> LanguageBatch:
        (joined, order), position = self._place(step)
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        inputs, labels, mask, segments = self._rows(joined, rows)
        reset = np.ones((len(rows), 1), bool)
        return LanguageBatch(inputs, labels, mask, segments, reset, rows.astype(np.int32))

    def pieces(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """input_ids and segments [n, S] of all rows of a plan of `fixed` ones, `size` at a time, in order."""
        joined = self._shuffled(np.random.default_rng(self.seed))
        for start in range(0, self.rows, size):
            inputs, _, _, segments = self._rows(joined, np.arange(start, min(self.rows, start + size)))
            yield inputs[:, 0], segments[:, 0]

    def _plan_epoch(self, epoch: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """The joined documents, and the order of their rows."""
        rng = np.random.default_rng((self.seed, epoch))
        joined = self._shuffled(np.random.default_rng(self.seed) if self.fixed else rng)
        return joined, rng.permutation(self.rows)

    def _shuffled(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._joined(map(int, rng.permutation(len(self.documents))))

    def _rows(self, joined: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> _Row:
        (ids, counted), size = joined, self.segment
        return _stacked([_cut(ids, counted, row * size, len(ids), size, self.end) for row in map(int, rows)])


class Streams(_Planned):
    """Articles shuffled and read in `batch_size` streams, `unroll` segments a step: for Infinito.

    A segment holds one article, or several that are shorter than a segment. The next step goes on where a
    stream stopped. Memory is reset where an article begins (or one of the streams, once an epoch), and at
    random with probability `reset_rate`. An epoch holds every token once. UserError when there are fewer
    segments than a step holds.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        segment: int,
        batch_size: int,
        end: int,
        seed: int,
        *,
        unroll: int,
        reset_rate: float,
    ) -> None:
        super().__init__(documents, segment, end, seed)
        self.batch_size, self.unroll, self.reset_rate = batch_size, unroll, reset_rate
        groups = [self._joined(group) for group in self._groups()]
        self._ids = np.concatenate([ids for ids, _ in groups])
        self._counted = np.concatenate([counted for _, counted in groups])
        self._borders = np.cumsum([0, *(len(ids) for ids, _ in groups)])  # of the groups
        self._sizes = -(-(np.diff(self._borders) - 1) // segment)  # segments of each group
        self.segments = int(self._sizes.sum())
        if self.segments < batch_size * unroll:
            raise _too_small(self.segments, f"segments of {segment} tokens", batch_size * unroll)

    def __len__(self) -> int:
        return -(-self.segments // (self.batch_size * self.unroll))

    def batch(self, step: int) -> LanguageBatch:
        (table, first), position = self._place(step)
        shape, length = (self.batch_size, self.unroll), len(self) * self.unroll  # segments of a stream
        inputs, labels = (np.full((*shape, self.segment), self.end, np.int32) for _ in range(2))
        mask, reset = np.zeros((*shape, self.segment), bool), np.ones(shape, bool)
        segments = np.zeros((*shape, self.segment), np.int32)
        for row, k in np.ndindex(shape):
            place = position * self.unroll + k
            number = row * length + place
            if number >= self.segments:  # what fills the last streams up
                continue
            start, stop = table[number]
            cut = _cut(self._ids, self._counted, start, stop, self.segment, self.end)
            inputs[row, k], labels[row, k], mask[row, k], segments[row, k] = cut
            reset[row, k] = first[number] or place == 0
        streams = np.arange(self.batch_size, dtype=np.int32)
        return LanguageBatch(inputs, labels, mask, segments, reset, streams)

    def _groups(self) -> Iterator[list[int]]:
        """Documents that share segments: one of its own where it fills a segment, else several."""
        lengths = self.documents.lengths() + 1  # with the end
        joined: list[int] = []
        filled = 0
        for index in map(int, np.random.default_rng(self.seed).permutation(len(lengths))):
            length = int(lengths[index])
            if length >= self.segment:
                yield [index]
                continue
            if filled + length > self.segment:
                yield joined
                joined, filled = [], 0
            joined.append(index)
            filled += length
        if joined:
            yield joined

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each segment lies, and where its group ends [N, 2]; whether memory is reset there [N]."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self._sizes))
        starts, stops, sizes = self._borders[:-1][order], self._borders[1:][order], self._sizes[order]
        offset = np.concatenate([np.arange(size) * self.segment for size in sizes])
        table = np.stack((np.repeat(starts, sizes) + offset, np.repeat(stops, sizes)), 1)
        return table, (offset == 0) | (rng.random(len(offset)) < self.reset_rate)


class WholeRows(_Planned):
    """A document a row, none cut, rows of like length in a batch: for fine-tuning.

    The token `frame` stands before a document, `end` behind it where given; `segment` is the most that a row
    may have, in tokens that the model reads, padded to a multiple of PADDED_TO. `forms` F:
    `documents` holds N rows in F forms, one form after the other; row i has form (i + epoch) mod F. An epoch
    holds every row once; the last batch may have empty ones. UserError when there are fewer rows than a batch
    holds.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        segment: int,
        batch_size: int,
        frame: int,
        end: int | None,
        seed: int,
        *,
        forms: int = 1,
    ) -> None:
        super().__init__(documents, segment, frame, seed)
        self.batch_size, self.forms = batch_size, forms
        self._before = np.asarray([frame], np.int32)
        self._behind = np.asarray([] if end is None else [end], np.int32)
        self.rows = len(documents) // forms
        if self.rows < batch_size:
            raise _too_small(self.rows, "rows", batch_size)

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def batch(self, step: int) -> LanguageBatch:
        (chosen, order), position = self._place(step)
        rows = order[position]
        texts = [self._row(int(chosen[row])) for row in rows]
        length = min(self.segment, padded_length(max(len(ids) - 1 for ids, _ in texts)))
        parts = [_alone(ids, counted, length) for ids, counted in texts]
        empty = [_alone(*self._nothing(), length)] * (self.batch_size - len(rows))
        number = np.full(self.batch_size, -1, np.int32)
        number[: len(rows)] = rows
        return LanguageBatch(*_stacked([*parts, *empty]), np.ones((self.batch_size, 1), bool), number)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, list[list[int]]]:
        """The document of each row, and the rows of each batch."""
        row = np.arange(self.rows)
        chosen = row + self.rows * ((row + epoch) % self.forms)
        lengths = self.documents.lengths()[chosen].tolist()
        return chosen, batch_order(lengths, self.batch_size, self.seed, epoch, True)

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place = self.documents.document(index)
        ids = np.concatenate((self._before, self.documents.ids[place], self._behind))
        counted = (np.zeros(1, bool), self.documents.counted[place], np.ones(len(self._behind), bool))
        return ids, np.concatenate(counted)

    def _nothing(self) -> tuple[np.ndarray, np.ndarray]:
        return self._before, np.zeros(1, bool)


def _alone(ids: np.ndarray, counted: np.ndarray, size: int) -> _Row:
    """A whole text as a row of `size`; every token of it is of one segment, whatever it is."""
    inputs, labels, mask, segments = _cut(ids, counted, 0, len(ids), size, int(ids[0]))
    return inputs, labels, mask, (segments > 0).astype(np.int32)


def batch_order(lengths: Sequence[int], size: int, seed: int, epoch: int, buckets: bool) -> list[list[int]]:
    """The rows of each batch of an epoch: shuffled, and with `buckets` of like length within a batch.

    Every row stands in one batch; the last may be smaller.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths)).tolist()
    if buckets:
        window = WINDOW * size
        parts = [order[first : first + window] for first in range(0, len(order), window)]
        order = [row for part in parts for row in sorted(part, key=lambda i: lengths[i])]
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    if buckets:
        batches = [batches[i] for i in random.permutation(len(batches))]
    return batches


def evaluation_batches(
    documents: TokenDocuments, segment: int, batch_size: int, end: int, *, stride: int, carry: bool
) -> Iterator[LanguageBatch]:
    """Every counted token of a split once, K = 1; the ends of documents are not counted.

    Windows of `segment` tokens begin every `stride`; a window counts what the one before did not show. With
    `carry` the documents lie in streams, in which memory goes on within a document (`reset` says where not);
    stride is then the segment. Without, every window is reset.
    """
    lengths = documents.lengths()
    stride = segment if carry else stride
    windows = [
        [(index, start) for start in _window_starts(int(length), segment, stride)]
        for index, length in enumerate(lengths)
    ]
    rows: list[list[tuple[int, int]]] = [[] for _ in range(batch_size)]
    if carry:
        for index in np.argsort(-lengths, kind="stable"):
            min(rows, key=len).extend(windows[index])
    else:
        for number, window in enumerate(window for part in windows for window in part):
            rows[number % batch_size].append(window)
    for place in range(max(map(len, rows))):
        taken = [row[place] if place < len(row) else None for row in rows]
        yield _window_batch(documents, taken, segment, end, stride=stride, carry=carry)


def _window_starts(length: int, segment: int, stride: int) -> range:
    """Up to the first window that reaches the end of a document."""
    return range(0, max(1, length - segment + stride), stride)


def _window_batch(
    documents: TokenDocuments,
    taken: Sequence[tuple[int, int] | None],
    segment: int,
    end: int,
    *,
    stride: int,
    carry: bool,
) -> LanguageBatch:
    """One window a row, by document and offset; None is an empty row."""
    parts, reset, numbers = [], [], []
    for item in taken:
        index, start = item or (0, 0)
        place = documents.document(index)
        ids = np.concatenate(([end], documents.ids[place]))
        counted = np.concatenate(([False], documents.counted[place]))
        inputs, labels, mask, shown = _cut(ids, counted, start, len(ids), segment, end)
        shown = (shown > 0).astype(np.int32)  # a window shows one document
        if item is None:
            mask[:] = False
        elif start:
            mask[: segment - stride] = False  # the window before counted these
        parts.append((inputs, labels, mask, shown))
        reset.append(item is None or not carry or start == 0)
        numbers.append(-1 if item is None else index)
    began = np.asarray(reset, bool)[:, None]
    return LanguageBatch(*_stacked(parts), began, np.asarray(numbers, np.int32))


def _too_small(have: int, what: str, wanted: int) -> UserError:
    return UserError(
        f"the corpus has {have} {what}, fewer than the {wanted} of one step: give more text, or lower "
        "--train.batch-size or the context"
    )
