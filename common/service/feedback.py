"""What a service was asked and what its users thought of the answers: SQLite (WAL), read by monitoring.

store = FeedbackStore("feedback.sqlite")
search = store.record_search("sort a list", [Scored("a", 0.1), Scored("b", 0.2)], latency={"total": 0.02})
store.record_feedback(search, "b", 1)
for item in store.feedback(since=time.time() - 86_400): ...
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError

FORMAT = 1
_SCHEMA = """
create table searches (
    id text primary key, time real not null, query text not null, first_stage text not null,
    reranked text not null, latency text not null, cache_hit integer not null, fallback text) without rowid;
create index searches_at on searches (time);
create table feedback (
    search text not null references searches(id), document text not null, value integer not null,
    time real not null, primary key (search, document)) without rowid;
create index feedback_at on feedback (time);
"""


@dataclass(frozen=True)
class Scored:
    """A passage by its id, with the score that ordered its list."""

    id: str
    score: float


@dataclass(frozen=True)
class Search:
    """A query as it was answered: both orders, best first (`reranked` is empty where only the first stage
    ranked); seconds by stage; whether every score came from the cache; why the reranker did not answer."""

    id: str
    time: float  # seconds since 1970
    query: str
    first_stage: tuple[Scored, ...]
    reranked: tuple[Scored, ...]
    latency: dict[str, float]  # seconds: retrieve, rerank, total, ...
    cache_hit: bool
    fallback: str | None


@dataclass(frozen=True)
class Feedback:
    """What a user said of a passage that a search gave; the last word counts."""

    search: str
    document: str  # the passage's id, as the search gave it
    value: Literal[-1, 1]
    time: float  # seconds since 1970


class UnknownSearchError(UserError):
    """Feedback on a search that is not stored."""


class UnwritableError(UserError):
    """The file takes no more, as on a full disk."""


class FeedbackStore:
    """Searches and feedback in one SQLite file, which threads and processes may write and read at once.

    Raises UserError for a file that is none of ours, and for a place that cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connection() as sql:
                sql.execute("begin immediate")
                stored = int(sql.execute("pragma user_version").fetchone()[0])
                foreign = stored == 0 and sql.execute("select count(*) from sqlite_master").fetchone()[0]
                if foreign or stored not in (0, FORMAT):
                    raise UserError(
                        f"{self.path}: no feedback of format {FORMAT} (it says {stored}); name another file."
                    )
                if stored == 0:
                    for statement in _SCHEMA.split(";"):
                        sql.execute(statement)
                    sql.execute(f"pragma user_version = {FORMAT}")
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"{self.path}: cannot hold feedback ({error}). Name a file in a folder that can be written."
            ) from error

    def record_search(
        self,
        query: str,
        first_stage: Sequence[Scored],
        reranked: Sequence[Scored] = (),
        *,
        latency: Mapping[str, float] | None = None,
        cache_hit: bool = False,
        fallback: str | None = None,
        at: float | None = None,
    ) -> str:
        """Store an answered query; returns its id. `at`: seconds since 1970, now when absent."""
        identity = uuid.uuid4().hex
        row = (
            identity,
            time.time() if at is None else at,
            query,
            _as_json(first_stage),
            _as_json(reranked),
            json.dumps(dict(latency or {})),
            int(cache_hit),
            fallback,
        )
        self._write("insert into searches values (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return identity

    def record_feedback(self, search: str, document: str, value: int, *, at: float | None = None) -> None:
        """Store +1 or -1 for a passage of a search, instead of what was said of it before.

        UserError for another value and a passage that the search did not give, UnknownSearchError,
        UnwritableError.
        """
        if isinstance(value, bool) or value not in (1, -1):
            raise UserError(f"the feedback is {value!r}; allowed: 1 and -1")
        found = self.search(search)
        if found is None:
            raise UnknownSearchError(
                f"no search {search[:80]!r} is known: give the id that came with the hits"
            )
        if document not in {item.id for item in (*found.first_stage, *found.reranked)}:
            raise UserError(f"search {search} gave no passage {document[:80]!r}; name one of its hits")
        row = (search, document, value, time.time() if at is None else at)
        self._write("insert or replace into feedback values (?, ?, ?, ?)", row)

    def search(self, identity: str) -> Search | None:
        """The search of an id; None when there is none."""
        with self._connection() as sql:
            row = sql.execute("select * from searches where id = ?", (identity,)).fetchone()
        return None if row is None else _search(row)

    def searches(self, since: float | None = None, until: float | None = None) -> Iterator[Search]:
        """The searches of since <= time < until (seconds since 1970; None: any), oldest first."""
        return map(_search, self._rows("searches", since, until))

    def feedback(self, since: float | None = None, until: float | None = None) -> Iterator[Feedback]:
        """The feedback of since <= time < until (seconds since 1970; None: any), oldest first."""
        return (Feedback(*row) for row in self._rows("feedback", since, until))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._open is not None:
                self._open.close()
            self._open = None

    def _rows(self, table: str, since: float | None, until: float | None) -> Iterator[tuple]:
        """Rows of a time range, read a block at a time, so that a writer is never kept waiting."""
        places = {"searches": (1, 0), "feedback": (3, 0, 1)}[table]  # of time and the key in a row
        order = {"searches": "time, id", "feedback": "time, search, document"}[table]
        begin, end = ("-inf" if since is None else since), ("inf" if until is None else until)
        marks = ", ".join("?" * len(places))
        query = f"select * from {table} where ({order}) > ({marks}) and time < ? order by {order} limit 1000"
        after: tuple[Any, ...] = (float(begin), *[""] * (len(places) - 1))  # no key is empty
        while True:
            with self._connection() as sql:
                block = sql.execute(query, (*after, float(end))).fetchall()
            yield from block
            if len(block) < 1000:
                return
            after = tuple(block[-1][place] for place in places)

    def _write(self, statement: str, row: tuple) -> None:
        try:
            with self._connection() as sql:
                sql.execute(statement, row)
        except sqlite3.Error as error:
            raise UnwritableError(
                f"{self.path}: cannot be written ({error}). Free some space there."
            ) from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time; committed at the end, taken back after an error."""
        with self._lock:
            if self._open is None:
                self._open = sqlite3.connect(self.path, timeout=30.0, check_same_thread=False)
                self._open.execute("pragma journal_mode = wal")
                self._open.execute("pragma synchronous = normal")
            with self._open:
                yield self._open


def _as_json(items: Sequence[Scored]) -> str:
    return json.dumps([[item.id, item.score] for item in items], ensure_ascii=False)


def _search(row: tuple) -> Search:
    identity, at, query, first_stage, reranked, latency, cache_hit, fallback = row
    first, second = (tuple(Scored(*item) for item in json.loads(part)) for part in (first_stage, reranked))
    return Search(identity, at, query, first, second, json.loads(latency), bool(cache_hit), fallback)
