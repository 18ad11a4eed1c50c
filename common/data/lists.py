"""Training lists: a query, its positives, a pool of hard negatives, its related queries; kept as ArrayRecord.

Written by a TFDS builder and read by random access, both without TensorFlow.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from common.data.array_records import Records, write_once
from common.data.combined import runs_by_part
from common.data.records import RankingData, Run, relevant_passages, same_words
from common.errors import UserError

WHAT = "the training lists"
NO_POSITIVE = "queries without a relevant passage"
NOT_RETRIEVED = "queries whose relevant passages the first stage does not find"
NO_NEGATIVE = "queries without a negative"
_REMEDIES = {
    NO_POSITIVE: "give passages a grade above 0",
    NOT_RETRIEVED: "set --data.positives all, or another --data.negatives",
    NO_NEGATIVE: "give more passages, or draw from others: --data.negatives rrf or random",
}
FEW_CANDIDATES = "queries with fewer than two candidates"
Related = Mapping[str, Mapping[str, float]]  # query id -> related query id -> weight in (0, 1]


@dataclass(frozen=True)
class TrainingList:
    """What training may show for one query. Passages are texts."""

    query_id: str
    query: str
    positives: tuple[str, ...]  # best grade first
    grades: tuple[float, ...]  # one per positive, > 0
    negatives: tuple[str, ...]  # the pool, hardest first
    related: tuple[int, ...] = ()  # positions of related queries' lists in the same file
    related_weight: tuple[float, ...] = ()  # in (0, 1], one per related list
    teacher: tuple[float, ...] = ()  # its scores of positives, then negatives, NaN where unknown; or none


def build_lists(
    data: RankingData,
    split: str,
    negatives_run: Run,
    pool_size: int,
    related: Related | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    retrieved: Run | None = None,
) -> tuple[list[TrainingList], dict[str, int]]:
    """Training lists of a split's queries, and how many queries were dropped for what reason.

    Positives are the relevant passages, with `retrieved` those that it holds. Negatives are the best of
    `negatives_run` that are not relevant, neither for the query nor for another of the same words (nor have
    such a passage's text), at most `pool_size`. `max_samples` keeps a random subset, drawn with `seed`.
    Raises UserError when no list remains.
    """
    dropped: Counter[str] = Counter()
    found: list[TrainingList] = []
    relevant: dict[str, set[str]] = defaultdict(set)  # words of a query -> texts of relevant passages
    for query_id, grades in data.split(split).items():
        texts = (data.corpus[passage] for passage, grade in grades.items() if grade > 0)
        relevant[same_words(data.queries[query_id])].update(texts)
    for query_id, grades in sorted(data.split(split).items()):
        shown = relevant[same_words(data.queries[query_id])]
        reason = NO_NEGATIVE if any(grade > 0 for grade in grades.values()) else NO_POSITIVE
        if retrieved is not None:
            near = retrieved.get(query_id, {})
            grades = {passage: grade for passage, grade in grades.items() if passage in near}
        item = _one_list(data, query_id, grades, negatives_run.get(query_id, {}), pool_size, shown)
        if reason == NO_NEGATIVE and not item.positives:
            reason = NOT_RETRIEVED
        if item.positives and item.negatives:
            found.append(item)
        else:
            dropped[reason] += 1
    if not found:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        remedy = "; ".join(_REMEDIES[reason] for reason in dropped) or "give it queries"
        raise UserError(
            f"{data.name}: no training list in split {split!r} ({counts or 'it is empty'}). A list needs a "
            f"relevant passage and another one: {remedy}."
        )
    if max_samples is not None and max_samples < len(found):
        kept = np.random.default_rng(seed).permutation(len(found))[:max_samples]
        found = [found[i] for i in sorted(kept)]
    return _with_related(found, related or {}), dict(dropped)


def unlabelled_lists(
    data: RankingData,
    queries: Iterable[str],
    run: Run,
    pool_size: int,
    max_queries: int | None = None,
    seed: int = 0,
) -> tuple[list[TrainingList], dict[str, int]]:
    """Lists of queries (ids) whose labels are not read, and how many were dropped for what reason.

    The candidates are the `pool_size` best of `run`; all stand as negatives. `max_queries` keeps a random
    subset, drawn with `seed`. Raises UserError when no list remains.
    """
    ids = sorted(queries)
    if max_queries is not None and max_queries < len(ids):
        ids = sorted(ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:max_queries])
    found = [_one_list(data, query, {}, run.get(query, {}), pool_size, set()) for query in ids]
    kept = [replace(item, teacher=()) for item in found if len(item.negatives) > 1]
    if not kept:
        raise UserError(
            f"{data.name}: none of its {len(ids):,} queries has two candidates to preserve an order of; give "
            "queries, and a corpus in which they find passages"
        )
    return kept, {FEW_CANDIDATES: len(found) - len(kept)} if len(kept) < len(found) else {}


def given_negatives(data: RankingData) -> Run:
    """The negatives that came with the data, as a run: first given, hardest."""
    return {query: _ranked(passages) for query, passages in data.negatives.items()}


def random_negatives(data: RankingData, split: str, depth: int, seed: int) -> Run:
    """`depth` random passages for each query of a split, as a run; in combined data of the query's own part.
    Relevant ones are left to build_lists."""
    if data.parts:
        return runs_by_part(
            data,
            data.split(split),
            lambda part, own: {"random": _random_passages(part, own, depth, seed)},
        )["random"]
    return _random_passages(data, data.split(split), depth, seed)


def _random_passages(data: RankingData, queries: Iterable[str], depth: int, seed: int) -> Run:
    passages = sorted(data.corpus)
    rng = np.random.default_rng(seed)
    depth = min(depth, len(passages))
    return {
        query: _ranked([passages[i] for i in rng.choice(len(passages), depth, replace=False)])
        for query in sorted(queries)
    }


def flip_labels(lists: Sequence[TrainingList], share: float, seed: int) -> list[TrainingList]:
    """The lists with wrong labels in `share` of them (rounded), drawn with `seed`.

    Their best positive and a random negative of the pool change places; a teacher's scores go with them.
    """
    rng = np.random.default_rng((seed, len(lists)))
    wrong = set(rng.permutation(len(lists))[: round(share * len(lists))].tolist())
    return [_flipped(item, rng) if number in wrong else item for number, item in enumerate(lists)]


def _flipped(item: TrainingList, rng: np.random.Generator) -> TrainingList:
    place = int(rng.integers(len(item.negatives)))
    positives, negatives, teacher = list(item.positives), list(item.negatives), list(item.teacher)
    positives[0], negatives[place] = negatives[place], positives[0]
    if teacher:
        other = len(positives) + place
        teacher[0], teacher[other] = teacher[other], teacher[0]
    return replace(item, positives=tuple(positives), negatives=tuple(negatives), teacher=tuple(teacher))


def related_queries(
    query_embeddings: np.ndarray, query_ids: Sequence[str], threshold: float, top: int = 8
) -> dict[str, dict[str, float]]:
    """The `top` most similar other queries of each query, with their cosine as weight.

    query_embeddings [N, D] of unit norm. A cosine below `threshold` (in (0, 1]) is unrelated; a query without
    related ones is absent.
    """
    related: dict[str, dict[str, float]] = {}
    for start in range(0, len(query_ids), 1024):  # blocks bound the memory of the similarities
        cosines = query_embeddings[start : start + 1024] @ query_embeddings.T  # [n, N]
        for row, cosine in enumerate(cosines):
            cosine[start + row] = -1.0
            near = np.flatnonzero(cosine >= threshold)
            near = near[np.argsort(-cosine[near], kind="stable")][:top]
            if len(near):
                weights = {query_ids[int(i)]: min(1.0, float(cosine[i])) for i in near}
                related[query_ids[start + row]] = weights
    return related


def write_lists(lists: Sequence[TrainingList], directory: str | Path) -> Path:
    """Write the lists to a folder of `directory` named by their content, and return it.

    The same lists are written once; several processes may write at the same time. UserError when the folder
    cannot be written.
    """
    place = Path(directory) / hashlib.sha256("".join(map(repr, lists)).encode()).hexdigest()[:16]
    return write_once(place, functools.partial(_builder_class(), lists), WHAT)


class StoredLists:
    """Random access to written lists: len(lists), lists[i]. UserError where a file is unreadable."""

    def __init__(self, records: Records) -> None:
        self.directory = records.directory
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> TrainingList:
        record = self._records[index]
        try:
            return _from_record(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._records.unreadable(f"list {index}: {error}") from error

    def __iter__(self) -> Iterator[TrainingList]:
        return (self[i] for i in range(len(self)))


def read_lists(directory: str | Path) -> StoredLists:
    """Open what write_lists returned. Raises UserError when it is missing or damaged."""
    return StoredLists(Records(directory, "train", WHAT))


def _one_list(
    data: RankingData,
    query_id: str,
    grades: Mapping[str, int],
    candidates: Mapping[str, float],
    pool_size: int,
    shown: set[str],
) -> TrainingList:
    relevant = relevant_passages(grades)
    pool: dict[str, None] = {}  # texts in order, each once
    for passage in sorted(candidates, key=lambda p: (-candidates[p], p)):
        if len(pool) < pool_size and data.corpus[passage] not in shown:
            pool[data.corpus[passage]] = None
    return TrainingList(
        query_id=query_id,
        query=data.queries[query_id],
        positives=tuple(data.corpus[p] for p in relevant),
        grades=tuple(float(grades[p]) for p in relevant),
        negatives=tuple(pool),
        teacher=_teacher_scores(data, query_id, (*(data.corpus[p] for p in relevant), *pool)),
    )


def _teacher_scores(data: RankingData, query_id: str, texts: Sequence[str]) -> tuple[float, ...]:
    """A teacher's scores of a query's passages, NaN where it has none; empty when it has none at all."""
    known = {data.corpus[passage]: score for passage, score in data.teacher.get(query_id, {}).items()}
    found = tuple(float(np.float32(known.get(text, np.nan))) for text in texts)
    return found if np.isfinite(found).any() else ()


def _with_related(lists: list[TrainingList], related: Related) -> list[TrainingList]:
    """The lists with related query ids turned into positions; queries without a list here fall away."""
    position = {item.query_id: i for i, item in enumerate(lists)}
    placed = []
    for item in lists:
        weights = {position[q]: w for q, w in related.get(item.query_id, {}).items() if q in position}
        fields = asdict(item) | {
            "related": tuple(weights),
            "related_weight": tuple(float(np.float32(w)) for w in weights.values()),  # as it is stored
        }
        placed.append(TrainingList(**fields))
    return placed


def _ranked(passages: Sequence[str]) -> dict[str, float]:
    return {passage: float(len(passages) - i) for i, passage in enumerate(passages)}


@cache
def _builder_class() -> Any:
    """The TFDS builder; made on first use, since TFDS is slow to import."""
    import tensorflow_datasets as tfds

    class TrainingLists(tfds.core.GeneratorBasedBuilder):
        """Training lists of a ranking data set."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = ()

        def __init__(self, lists: Sequence[TrainingList], **kwargs: Any) -> None:
            self._lists = lists
            super().__init__(**kwargs)

        def _info(self) -> Any:
            text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
            floats, integers = tfds.features.Sequence(np.float32), tfds.features.Sequence(np.int32)
            features = {
                "query_id": text,
                "query": text,
                "positives": texts,
                "grades": floats,
                "negatives": texts,
                "related": integers,
                "related_weight": floats,
                "teacher": floats,
            }
            # Related lists are named by position, so the order must be kept.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, item in enumerate(self._lists):
                yield i, {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(item).items()}

    return TrainingLists


def _from_record(record: Mapping[str, Any]) -> TrainingList:
    def texts(name: str) -> tuple[str, ...]:
        return tuple(text.decode() for text in record[name])

    return TrainingList(
        query_id=record["query_id"].decode(),
        query=record["query"].decode(),
        positives=texts("positives"),
        grades=tuple(float(grade) for grade in record["grades"]),
        negatives=texts("negatives"),
        related=tuple(int(i) for i in record["related"]),
        related_weight=tuple(float(weight) for weight in record["related_weight"]),
        teacher=tuple(float(score) for score in record["teacher"]),
    )
