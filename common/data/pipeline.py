"""Batches of candidate lists for training: planned from (seed, epoch), grouped by length, read through grain.

A batch is a pure function of (seed, step, data): a run that resumes sees what it would have seen. Of several
processes each plans all of it and assembles its own share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.errors import UserError
from common.text import PASSAGE, QUERY, Encoded, PairTokenizer, bucket_for, join_pair

if TYPE_CHECKING:
    from common.config import DataConfig
    from common.data.lists import TrainingList
    from common.data.original import OriginalOutputs

WINDOW_BATCHES = 16  # lists are sorted by length inside shuffled windows of this many batches


Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> vectors [N, D]
Recall = Callable[[Sequence[Encoded]], "OriginalOutputs"]  # pairs -> what the frozen original says of them


class ListSource(Protocol):
    """Random access to training lists: a Python list, or what `common.data.lists.read_lists` returns."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TrainingList: ...


@dataclass(frozen=True)
class ListBatch:
    """B queries with L candidates each, padded to S tokens."""

    input_ids: np.ndarray  # int32 [B, L, S]
    sides: np.ndarray  # int8 [B, L, S]: 0 padding, 1 query side, 2 passage side
    labels: np.ndarray  # float32 [B, L]: grade, 0 for negatives and padding
    mask: np.ndarray  # bool [B, L]: a real candidate
    related: np.ndarray  # float32 [B, B]: relatedness of the queries in [0, 1], symmetric, 0 on the diagonal
    query_index: np.ndarray  # int32 [B]: position of the list in the source
    query_vectors: np.ndarray  # float32 [B, D]: the base's own of the text alone; D is 0 without `vectors`
    passage_vectors: np.ndarray  # float32 [B, L, D]
    teacher: np.ndarray  # float32 [B, L]: a teacher's scores, NaN where there is none
    # of the frozen original, in a retraining that preserves it:
    original_scores: np.ndarray  # float32 [B, L], NaN where there is none
    original_query: np.ndarray  # float32 [B, L, 2, C]: (re, im) of its states; C is 0 without them
    original_passage: np.ndarray  # float32 [B, L, 2, C]

    @property
    def token_share(self) -> float:
        """Real tokens / padded tokens, in (0, 1]; of a process's share, its own."""
        return float((self.sides > 0).mean())

    @property
    def related_pairs(self) -> float:
        """Pairs of related queries in the batch; of a process's share half of those that its rows have."""
        return float((self.related > 0).sum()) / 2


@dataclass(frozen=True)
class Share:
    """The lists of a step that a process holds, in order: positions in the step, -1 for an empty list."""

    rows: np.ndarray  # int64 [R]
    order: np.ndarray  # int64 [P]: those of all processes; the R rows of `related` have P columns


def device_order(lists: int, parts: int, devices: int) -> np.ndarray:
    """Which lists of a step stand on which device, int64 [devices, parts, rows]; -1 is an empty list.

    Each device has a block of neighbours of each of the `parts` micro-batches. Where a micro-batch does not
    divide over the devices, the last ones have empty lists, which no loss sees.
    """
    size = lists // parts
    rows = -(-size // devices)
    places = np.arange(devices * rows).reshape(devices, 1, rows)
    return np.where(places < size, places + size * np.arange(parts)[:, None], -1)


class EncodedLists:
    """All texts of the training lists, tokenized once; counts truncation in `tokenizer.truncation`."""

    def __init__(self, source: ListSource, tokenizer: PairTokenizer, embed: Embed | None = None) -> None:
        lists = [source[i] for i in range(len(source))]
        numbers: dict[str, int] = {}  # passage text -> its number
        self.positives = [_numbered(item.positives, numbers) for item in lists]
        self.negatives = [_numbered(item.negatives, numbers) for item in lists]
        self.grades = [np.asarray(item.grades, np.float32) for item in lists]
        self.teacher = [_teacher_of(item) for item in lists]  # of positives, then negatives
        self.related = [dict(zip(item.related, item.related_weight, strict=True)) for item in lists]
        self.queries, query_cut = tokenizer.query_ids([item.query for item in lists])
        self.passages, passage_cut = tokenizer.passage_ids(list(numbers))
        self.pad_id = tokenizer.pad_id
        empty = np.zeros((0, 0), np.float32)
        self.query_vectors = embed([item.query for item in lists]) if embed else empty  # [N, D]
        self.passage_vectors = embed(list(numbers)) if embed else empty  # [P, D]
        self._passage_lengths = np.asarray([len(ids) for ids in self.passages], np.int32)
        candidates = [np.concatenate(pair) for pair in zip(self.positives, self.negatives, strict=True)]
        tokenizer.count_truncation(
            sum(len(passages) for passages in candidates),
            sum(int(cut) * len(passages) for cut, passages in zip(query_cut, candidates, strict=True)),
            sum(int(passage_cut[passages].sum()) for passages in candidates),
        )
        self.longest = max(
            (self.pair_length(i, passages) for i, passages in enumerate(candidates)), default=0
        )

    def __len__(self) -> int:
        return len(self.queries)

    def pair_length(self, query: int, passages: np.ndarray) -> int:
        """Tokens of the longest pair of this list's query with one of `passages` (numbers)."""
        return len(self.queries[query]) + int(self._passage_lengths[passages].max())


@dataclass(frozen=True)
class _PlannedList:
    """One list as it stands in one epoch: candidates are passage numbers, the positives first."""

    index: int
    candidates: np.ndarray  # int64 [n], n <= list_size
    labels: np.ndarray  # float32 [n]
    teacher: np.ndarray  # float32 [n]
    length: int  # tokens of the longest pair


class ListPlan:
    """Which lists, with which sampled candidates, stand in which batch of which epoch.

    An epoch holds every list once, less the N mod batch_size of an incomplete batch, others each epoch. A
    list shows its best graded positives (ties at random), at most `max_positives`, and negatives drawn from
    its pool without replacement. With `pair_related` a query stands beside its most related free one (an odd
    batch size parts some at the borders). With `fixed` a list shows the same candidates in every epoch, and
    `recall` then gives what a frozen original says of them. Of `beside`, another plan, each batch holds the
    lists of the same step behind its own. len(plan) is the number of steps of an epoch. Raises UserError
    when there are fewer lists than a batch holds, or a pair longer than every bucket.
    """

    def __init__(
        self,
        source: ListSource,
        tokenizer: PairTokenizer,
        cfg: DataConfig,
        batch_size: int,
        seed: int,
        pair_related: bool,
        embed: Embed | None = None,
        *,
        fixed: bool = False,
        recall: Recall | None = None,
        beside: ListPlan | None = None,
    ) -> None:
        if len(source) < batch_size:
            raise UserError(
                f"{len(source)} training lists cannot fill a batch of {batch_size}: lower train.batch_size "
                f"to at most {len(source)}, or give more training queries"
            )
        self.lists = EncodedLists(source, tokenizer, embed)
        self.list_size, self.max_positives = cfg.list_size, cfg.max_positives
        self.in_batch_negatives = cfg.in_batch_negatives
        self.buckets = tuple(sorted(cfg.length_buckets))
        self.batch_size, self.seed, self.pair_related = batch_size, seed, pair_related
        self.fixed, self.beside = fixed or recall is not None, beside
        self._epoch: tuple[int, list[list[_PlannedList]]] | None = None
        longest_query = max(map(len, self.lists.queries))  # meets any passage of the batch
        longest_passage = max(map(len, self.lists.passages))
        far = longest_query + longest_passage if self.in_batch_negatives else 0
        bucket_for(max(self.lists.longest, far), self.buckets)
        self._original = None if recall is None else self._recalled(recall)

    def __len__(self) -> int:
        return len(self.lists) // self.batch_size

    def batch(self, step: int, share: Share | None = None) -> ListBatch:
        """The batch of a step counted from the start of the run, or a process's share of it."""
        if share is None:
            batch = self._assemble(self._planned(step))
            return batch if self.beside is None else joined(batch, self.beside.batch(step), self.lists.pad_id)
        rows, size = share.rows, self.batch_size
        held = np.sort(rows[rows >= 0])
        batch = self._assemble(self._planned(step), held[held < size])
        if self.beside is not None:
            old = self.beside._assemble(self.beside._planned(step), held[held >= size] - size)
            batch = joined(batch, old, self.lists.pad_id)
        return arranged(
            batch, np.where(rows < 0, -1, np.searchsorted(held, rows)), share.order, self.lists.pad_id
        )

    def loader(self, steps: int, share: Share | None = None) -> Any:
        """A grain iterator over the first `steps` batches of the run, with get_state() and set_state().

        The state is a position in the run, whatever the share.
        """
        import grain

        # No threads: a batch costs less than a millisecond, and the state then says exactly what was read.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = grain.MapDataset.range(steps).map(functools.partial(self.batch, share=share))
        return iter(dataset.to_iter_dataset(options))

    def _planned(self, step: int) -> list[_PlannedList]:
        epoch, position = divmod(step, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan_epoch(epoch))
        return self._epoch[1][position]

    def _plan_epoch(self, epoch: int) -> list[list[_PlannedList]]:
        rng = np.random.default_rng((self.seed, epoch))
        kept = rng.permutation(len(self.lists))[: len(self) * self.batch_size]
        planned = {int(i): self._draw(int(i), rng) for i in kept}
        groups = self._related_pairs(planned) if self.pair_related else [[item] for item in planned.values()]
        groups = [groups[i] for i in rng.permutation(len(groups))]
        window = max(1, WINDOW_BATCHES * self.batch_size // (2 if self.pair_related else 1))
        for start in range(0, len(groups), window):
            groups[start : start + window] = sorted(groups[start : start + window], key=_longest)
        ordered = [item for group in groups for item in group]
        starts = rng.permutation(len(self)) * self.batch_size
        return [ordered[start : start + self.batch_size] for start in starts]

    def _draw(self, index: int, rng: np.random.Generator) -> _PlannedList:
        """Sample one epoch's candidates of a list."""
        if self.fixed:
            rng = np.random.default_rng((self.seed, index))
        grades, pool = self.lists.grades[index], self.lists.negatives[index]
        best_first = np.lexsort((rng.random(len(grades)), -grades))
        chosen = best_first[: min(self.max_positives, self.list_size - 1)]
        own = self.list_size - self.in_batch_negatives
        drawn = rng.permutation(len(pool))[: own - len(chosen)]
        candidates = np.concatenate((self.lists.positives[index][chosen], pool[drawn]))
        labels = np.zeros(len(candidates), np.float32)
        labels[: len(chosen)] = grades[chosen]
        teacher = self.lists.teacher[index][np.concatenate((chosen, len(grades) + drawn))]
        return _PlannedList(index, candidates, labels, teacher, self.lists.pair_length(index, candidates))

    def _with_in_batch(self, items: Sequence[_PlannedList]) -> list[_PlannedList]:
        """The lists with the best positives of others in the batch as further negatives."""
        best = [int(item.candidates[0]) for item in items]
        index = self._index(items)
        related = [{b for b, w in enumerate(row) if w > 0} for row in self._relatedness(index, index)]
        made = []
        for row, item in enumerate(items):
            known = {*map(int, item.candidates), *map(int, self.lists.positives[item.index])}
            others = [(row + step) % len(items) for step in range(1, len(items))]
            fitting = dict.fromkeys(
                best[other] for other in others if best[other] not in known and other not in related[row]
            )
            more = np.asarray(list(fitting)[: self.in_batch_negatives], np.int64)
            candidates = np.concatenate((item.candidates, more))
            made.append(
                _PlannedList(
                    item.index,
                    candidates,
                    np.concatenate((item.labels, np.zeros(len(more), np.float32))),
                    np.concatenate((item.teacher, np.full(len(more), np.nan, np.float32))),
                    self.lists.pair_length(item.index, candidates),
                )
            )
        return made

    def _index(self, items: Sequence[_PlannedList]) -> np.ndarray:
        return np.asarray([item.index for item in items], np.int32)

    def _related_pairs(self, planned: dict[int, _PlannedList]) -> list[list[_PlannedList]]:
        """Twos: a query with its most related free one; those left over by similar length."""
        free = dict(planned)
        pairs: list[list[_PlannedList]] = []
        alone: list[_PlannedList] = []
        for index, item in planned.items():
            if free.pop(index, None) is None:
                continue
            weights = {other: w for other, w in self.lists.related[index].items() if other in free}
            if weights:
                pairs.append([item, free.pop(max(weights, key=lambda other: weights[other]))])
            else:
                alone.append(item)
        window = WINDOW_BATCHES * self.batch_size
        for start in range(0, len(alone), window):
            similar = sorted(alone[start : start + window], key=lambda item: item.length)
            pairs += [similar[i : i + 2] for i in range(0, len(similar), 2)]
        return pairs

    def _assemble(self, items: Sequence[_PlannedList], held: np.ndarray | None = None) -> ListBatch:
        """The arrays of a batch's lists, or of those at the positions `held`; `related` [R, B] to all."""
        if self.in_batch_negatives:
            items = self._with_in_batch(items)
        length = bucket_for(max(item.length for item in items), self.buckets)
        everyone = self._index(items)
        if held is not None:
            items = [items[place] for place in held]
        size = (len(items), self.list_size)
        input_ids = np.full((*size, length), self.lists.pad_id, np.int32)
        sides = np.zeros((*size, length), np.int8)
        labels, mask = np.zeros(size, np.float32), np.zeros(size, bool)
        teacher = np.full(size, np.nan, np.float32)
        for row, item in enumerate(items):
            query, count = self.lists.queries[item.index], len(item.candidates)
            labels[row, :count], mask[row, :count], teacher[row, :count] = item.labels, True, item.teacher
            input_ids[row, :count, : len(query)], sides[row, :count, : len(query)] = query, QUERY
            for column, candidate in enumerate(item.candidates):
                passage = self.lists.passages[candidate]
                span = slice(len(query), len(query) + len(passage))
                input_ids[row, column, span], sides[row, column, span] = passage, PASSAGE
        query_index = self._index(items)
        related = self._relatedness(query_index, everyone)
        vectors = self._vectors(items)
        return ListBatch(
            input_ids, sides, labels, mask, related, query_index, *vectors, teacher, *self._remembered(items)
        )

    def _recalled(self, recall: Recall) -> tuple[np.ndarray, OriginalOutputs]:
        """Where each list's pairs begin, and the original's outputs of all of them."""
        unused = np.random.default_rng(0)
        drawn = [self._draw(index, unused).candidates for index in range(len(self.lists))]
        starts = np.cumsum([0, *map(len, drawn)])
        pairs = [
            join_pair(query, self.lists.passages[candidate])
            for query, candidates in zip(self.lists.queries, drawn, strict=True)
            for candidate in candidates
        ]
        return starts, recall(pairs)

    def _remembered(self, items: Sequence[_PlannedList]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The original's scores [B, L] and its states of query and passage, each [B, L, 2, C]."""
        size = (len(items), self.list_size)
        width = 0 if self._original is None else self._original[1].state_size
        scores, states = np.full(size, np.nan, np.float32), np.zeros((*size, 2, 2, width), np.float32)
        if self._original is not None:
            starts, outputs = self._original
            for row, item in enumerate(items):
                count = len(item.candidates)
                known = outputs.rows(int(starts[item.index]), count)  # [count, 1 + 4C]
                scores[row, :count] = known[:, 0]
                states[row, :count] = known[:, 1:].reshape(count, 2, 2, width)
        return scores, states[:, :, 0], states[:, :, 1]

    def _vectors(self, items: Sequence[_PlannedList]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the texts alone: queries [B, D], passages [B, L, D], zero at padding."""
        width = self.lists.query_vectors.shape[1]
        queries = np.zeros((len(items), width), np.float32)
        passages = np.zeros((len(items), self.list_size, width), np.float32)
        for row, item in enumerate(items if width else ()):
            queries[row] = self.lists.query_vectors[item.index]
            passages[row, : len(item.candidates)] = self.lists.passage_vectors[item.candidates]
        return queries, passages

    def _relatedness(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float32 [R, B] of lists; a weight that either of the two states counts for both, 0 for itself."""
        related = self.lists.related
        weights = [
            [0.0 if a == b else max(related[a].get(b, 0.0), related[b].get(a, 0.0)) for b in columns.tolist()]
            for a in rows.tolist()
        ]
        return np.asarray(weights, np.float32).reshape(len(rows), len(columns))


def joined(new: ListBatch, old: ListBatch, pad_id: int) -> ListBatch:
    """The lists of `old` behind those of `new`, padded to the longer of both; unrelated to each other.

    `query_index` of an old list is -1 - its position, so that it is never a new one's.
    """
    length = max(new.input_ids.shape[-1], old.input_ids.shape[-1])
    (count, width), (more, wider) = new.related.shape, old.related.shape  # not square in a share
    related = np.zeros((count + more, width + wider), np.float32)
    related[:count, :width], related[count:, width:] = new.related, old.related
    parts: dict[str, tuple[np.ndarray, ...]]
    parts = {name: (values, getattr(old, name)) for name, values in vars(new).items() if name != "related"}
    for name, fill in (("input_ids", pad_id), ("sides", 0)):
        parts[name] = tuple(_lengthened(values, length, fill) for values in parts[name])
    parts["query_index"] = (new.query_index, -1 - old.query_index)
    return ListBatch(related=related, **{name: np.concatenate(pair) for name, pair in parts.items()})


# What a batch's fields hold of an empty list; 0 in the others. Without real candidates it is in no loss.
_EMPTY: dict[str, float] = {
    "query_index": np.iinfo(np.int32).min,
    "teacher": np.nan,
    "original_scores": np.nan,
}


def arranged(batch: ListBatch, rows: np.ndarray, columns: np.ndarray, pad_id: int) -> ListBatch:
    """The lists of `batch` at the positions `rows`, `related` to those at `columns`; -1 is an empty list."""
    parts = {}
    for name, values in vars(batch).items():
        fill = pad_id if name == "input_ids" else _EMPTY.get(name, 0)
        parts[name] = _with_empty(values, fill)[rows]  # -1 is the last row
    parts["related"] = _with_empty(parts["related"].T, 0)[columns].T
    return ListBatch(**parts)


def _with_empty(values: np.ndarray, fill: float) -> np.ndarray:
    """The rows, and behind them one that is `fill` throughout."""
    return np.concatenate((values, np.full((1, *values.shape[1:]), fill, values.dtype)))


def _lengthened(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """Token ids or sides [B, L, S] with `length` positions, the new ones at their end."""
    missing = ((0, 0), (0, 0), (0, length - values.shape[-1]))
    return np.pad(values, missing, constant_values=fill)


def _teacher_of(item: TrainingList) -> np.ndarray:
    size = len(item.positives) + len(item.negatives)
    return np.asarray(item.teacher or [np.nan] * size, np.float32)


def _numbered(texts: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """The number of each text, new ones counted on; int64 [n]."""
    return np.asarray([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)


def _longest(group: Sequence[_PlannedList]) -> int:
    return max(item.length for item in group)
