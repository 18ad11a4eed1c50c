"""Several sources as one ranking data set: ids stand behind `source/`, retrieval stays within a source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

from common.data.records import Qrels, RankingData, Run, stable_id

Item = TypeVar("Item")


def combine(parts: Mapping[str, RankingData], limits: Mapping[str, int] | None = None) -> RankingData:
    """One data set of all parts (name -> data); a split has the queries of every part that has it.

    Of a part named in `limits` at most so many training queries are kept, a fixed sample of those with a
    relevant passage. The parts themselves stay whole: what is cached of them serves their other uses too.
    """
    corpus, queries = dict[str, str](), dict[str, str]()
    negatives: dict[str, tuple[str, ...]] = {}
    qrels: dict[str, Qrels] = {}
    dropped: Counter[str] = Counter()
    teacher: Run = {}
    for name, part in parts.items():
        corpus |= _behind(name, part.corpus)
        queries |= _behind(name, part.queries)
        given = {query: tuple(f"{name}/{p}" for p in passages) for query, passages in part.negatives.items()}
        negatives |= _behind(name, given)
        teacher |= _behind(name, {query: _behind(name, scores) for query, scores in part.teacher.items()})
        dropped.update(part.dropped)
        for split, judged in part.qrels.items():
            limit = (limits or {}).get(name) if split == "train" else None
            kept = {query: _behind(name, judged[query]) for query in _sample(judged, limit)}
            qrels.setdefault(split, {}).update(_behind(name, kept))
    title = " + ".join(f"{name}@{limits[name]}" if limits and name in limits else name for name in parts)
    return RankingData(title, corpus, queries, qrels, negatives, dict(dropped), teacher, dict(parts))


def source_name(title: str, taken: Mapping[str, object]) -> str:
    """A part's name: its data's, without what ids must not hold, and numbered when it is taken."""
    name = re.sub(r"[\s/]+", "-", title)
    numbers = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(free for free in numbers if free not in taken)


def source_of(identity: str) -> str:
    """The part that an id of combined data belongs to."""
    return identity.partition("/")[0]


def own_id(identity: str) -> str:
    """The id within its part."""
    return identity.partition("/")[2]


def runs_by_part(
    data: RankingData,
    items: Mapping[str, Item],
    find: Callable[[RankingData, dict[str, Item]], Mapping[str, Run]],
) -> dict[str, Run]:
    """`find` (first stage -> run) for each part and its own of `items` (by query id), put together again."""
    found: dict[str, Run] = {}
    for name, part in data.parts.items():
        own = {own_id(query): item for query, item in items.items() if source_of(query) == name}
        for stage, run in find(part, own).items() if own else ():
            found.setdefault(stage, {}).update(
                {f"{name}/{query}": _behind(name, scores) for query, scores in run.items()}
            )
    return found


def _behind(name: str, items: Mapping[str, Item]) -> dict[str, Item]:
    return {f"{name}/{key}": value for key, value in items.items()}


def _sample(judged: Qrels, limit: int | None) -> list[str]:
    if limit is None:
        return list(judged)
    useful = (query for query, grades in judged.items() if any(grade > 0 for grade in grades.values()))
    return sorted(sorted(useful, key=lambda query: stable_id("", query))[:limit])
