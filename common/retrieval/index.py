"""A passage index on disk: documents in SQLite, vectors in a memory-mapped file, searched by BM25 and faiss.

A change is one SQLite transaction; vectors are appended and synced before it and count only after it, so a
crash at any moment leaves the version before. A passage's row is its place among the vectors and moves when
these are written anew; its number never changes and is never given again. What can be made again (faiss
index, BM25) is named by what it was made of and ignored when that is not of now.

    index.sqlite           documents, passages, the version, the model, checksums of the vectors
    vectors-G.f32          float32 [rows, dim] of generation G
    near-G-N-KIND.faiss    HNSW or IVF-PQ over the first N rows, above FLAT_LIMIT passages
    bm25-V/                the BM25 index of version V
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.backends import Encoder
from common.checkpoint import alive
from common.errors import UserError
from common.retrieval.dense import embed
from common.retrieval.documents import Chunking, Document, chunks
from common.retrieval.lexical import BM25

FORMAT = 1
FLAT_LIMIT = 50_000  # passages: below, every vector is compared
GRAPH_LIMIT = 500_000  # below HNSW, from here IVF-PQ
DEAD_SHARE = 0.2  # of rows that deleted passages may keep before the vectors are written anew
_WIDE = 16  # candidates of a faiss index for each passage wanted: among near-equal ones it errs
_EFFORT = {"HNSW": ("efSearch", 1024), "IVF-PQ": ("nprobe", 128)}  # benchmarks/index_growth.py
_BLOCK = 1024  # passages between two commits of a long `add`
_SHARED = 20_000  # rows from which building a faiss index is worth several threads
_REMAKE = "the next change of the index makes it again"
_SCHEMA = """
create table about (key text primary key, value text not null) without rowid;
create table documents (
    id text primary key, digest text not null, title text not null, metadata text not null) without rowid;
create table passages (
    number integer primary key autoincrement, row integer not null,
    document text not null references documents(id), chunk integer not null, chunks integer not null,
    text text not null);
create index passages_at on passages (row);
create index passages_of on passages (document);
create table blocks (first integer primary key, rows integer not null, checksum integer not null);
"""


@dataclass(frozen=True)
class Passage:
    """A chunk of a document; `id` is the document's, with #number behind it where there are several."""

    number: int
    document: str
    chunk: int  # from 0
    chunks: int
    title: str
    text: str
    metadata: dict[str, Any]

    @property
    def id(self) -> str:
        return self.document if self.chunks == 1 else f"{self.document}#{self.chunk + 1}"

    @property
    def read(self) -> str:
        """What retrieval and rerankers read: title and text."""
        return _read(self.title, self.text)


@dataclass(frozen=True)
class Changes:
    """How many documents a call added, replaced and found unchanged, and the version that it left."""

    added: int
    updated: int
    unchanged: int
    version: int


@dataclass(frozen=True)
class _View:
    """One version in memory; it stays valid while others write."""

    version: int
    generation: int
    rows: int  # in the vectors' file, dead ones too
    alive: NDArray[np.int64]  # sorted rows of the passages
    numbers: NDArray[np.int64]  # of the passages in those rows
    vectors: NDArray[np.float32]  # [rows, dim], mapped


class PassageIndex:
    """An index in a directory, for the vectors of one encoder (None: BM25 alone).

    Threads may search and change it at once; so may processes, one of which writes at a time. `say` gets a
    line for what takes long. Raises UserError for a directory that holds an index of another model or a
    broken one.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: Encoder | None,
        *,
        chunking: Chunking | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.directory = Path(directory)
        self.chunking = chunking or Chunking()
        self._encoder, self._say = encoder, say
        self._dim = encoder.dim if encoder is not None else 0
        self._lock, self._write_lock = threading.RLock(), threading.RLock()
        self._inside = False
        self._local = threading.local()
        self._near: tuple[tuple[int, int], Any] | None = None
        self._lexical: tuple[int, NDArray[np.int64], BM25] | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot hold an index ({error.strerror}); name a folder."
            ) from error
        with self._writing():
            self._begin()
        self._view = self._read_view()

    @property
    def version(self) -> int:
        """Rises with every change."""
        return self._now().version

    @property
    def size(self) -> int:
        """Passages that can be found."""
        return len(self._now().alive)

    @property
    def documents(self) -> int:
        with self._reading() as sql:
            return int(sql.execute("select count(*) from documents").fetchone()[0])

    @property
    def kind(self) -> str:
        """How vectors are searched: flat, HNSW or IVF-PQ; none without an encoder."""
        return _kind(self.size) if self._encoder is not None else "none"

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file())

    def add(self, documents: Sequence[Document]) -> Changes:
        """Add documents, and replace those whose id is there with other content.

        Long additions are committed in blocks, each whole; the same call again goes on where a crash fell.
        Raises UserError for a full disk: what was committed stays, nothing is half there.
        """
        added = updated = unchanged = 0
        with self._writing():
            known = self._digests(document.id for document in documents)
            waiting: list[tuple[Document, list[str]]] = []
            passages = 0
            for document in documents:
                if known.get(document.id) == self._digest(document):
                    unchanged += 1
                    continue
                updated, added = updated + (document.id in known), added + (document.id not in known)
                waiting.append((document, chunks(document.text, self.chunking)))
                passages += len(waiting[-1][1])
                if passages >= _BLOCK:
                    self._commit(waiting)
                    waiting, passages = [], 0
            self._commit(waiting)
            self._tidy()
        return Changes(added, updated, unchanged, self.version)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; returns how many of them there were."""
        with self._writing():
            found = list(self._digests(iter(ids)))
            if found:
                with self._transaction() as sql:
                    self._forget(sql, found)
                    _bump(sql)
                self._tidy()
        return len(found)

    def get(self, document: str) -> list[Passage]:
        """The passages of a document, in order; none when it is not there."""
        with self._reading() as sql:
            query = "select number from passages where document = ? order by chunk"
            numbers = [number for (number,) in sql.execute(query, (document,))]
        return list(self.passages(numbers).values())

    def passages(self, numbers: Sequence[int]) -> dict[int, Passage]:
        """Number -> passage; one that was deleted in the meantime is left out."""
        found: dict[int, Passage] = {}
        with self._reading() as sql:
            for start in range(0, len(numbers), 500):
                part = list(numbers[start : start + 500])
                query = (
                    "select number, document, chunk, chunks, title, text, metadata from passages "
                    f"join documents on documents.id = document where number in ({','.join('?' * len(part))})"
                )
                for *fields, metadata in sql.execute(query, part):
                    found[fields[0]] = Passage(*fields, json.loads(metadata))  # type: ignore[call-arg]
        return {number: found[number] for number in numbers if number in found}

    def dense(self, text: str, depth: int, kind: Any = "query") -> dict[int, float]:
        """Number -> inner product of the `depth` nearest passages, nearest first. Exact in flat search;
        above it candidates come from HNSW or IVF-PQ and their products are exact."""
        if self._encoder is None:
            raise UserError(
                "this index has no vectors: it was made without a retriever model, for BM25 alone"
            )
        view = self._now()
        if not len(view.alive):
            return {}
        return self._nearest(view, embed_one(self._encoder, text, kind), depth)

    def lexical(self, text: str, depth: int) -> dict[int, float]:
        """Number -> BM25 score of the `depth` best passages that share a word with the text, best first.

        After a change the whole BM25 index is built anew by the first search.
        """
        numbers, index = self._bm25(self._now())
        scores = index.scores(text)
        places = np.flatnonzero(scores > 0.0)
        order = np.lexsort((places, -scores[places]))[:depth]
        return {int(numbers[place]): float(scores[place]) for place in places[order]}

    def verify(self) -> None:
        """Read everything; UserError when a byte of vectors or documents is not as it was written."""
        view = self._now()
        with self._reading() as sql:
            state = sql.execute("pragma integrity_check").fetchone()[0]
            blocks = (
                sql.execute("select first, rows, checksum from blocks").fetchall() if state == "ok" else []
            )
        if state != "ok":
            raise UserError(self._broken(f"SQLite says {state}"))
        for first, rows, checksum in blocks:
            if _checksum(view.vectors[first : first + rows]) != checksum:
                raise UserError(
                    self._broken(f"the vectors of rows {first} to {first + rows - 1} have changed")
                )

    # what is written

    def _begin(self) -> None:
        """Make the tables of a new index, or check those that are there."""
        name, identity = (self._encoder.name, self._encoder.identity) if self._encoder else ("none", "none")
        with self._transaction() as sql:
            if not sql.execute("select 1 from sqlite_master where name = 'about'").fetchone():
                if rest := [
                    item.name for item in self.directory.iterdir() if item.suffix in (".f32", ".faiss")
                ]:
                    raise UserError(self._broken(f"it has {rest[0]} but no documents"))
                for statement in _SCHEMA.split(";"):
                    sql.execute(statement)
                fields: dict[str, object] = {"format": FORMAT, "version": 0, "generation": 0, "rows": 0}
                fields |= {"dim": self._dim, "model": name, "identity": identity}
                sql.executemany("insert into about values (?, ?)", [(k, str(v)) for k, v in fields.items()])
            stored = _about(sql)
        if int(stored["format"]) != FORMAT:
            raise UserError(
                f"{self.directory}: an index of format {stored['format']}, this version reads {FORMAT}."
            )
        if stored["identity"] != identity:
            raise UserError(
                f"{self.directory}: its vectors are of {stored['model']} ({stored['identity']}), the "
                f"retriever is {name} ({identity}). Name that model, or index into another folder."
            )

    def _commit(self, waiting: Sequence[tuple[Document, list[str]]]) -> None:
        """Write documents and their passages: vectors first, then all in one transaction."""
        if not waiting:
            return
        texts = [_read(document.title, part) for document, parts in waiting for part in parts]
        vectors = embed(texts, self._encoder, "passage") if self._encoder is not None else None
        first = int(self._stored()["rows"])
        if vectors is not None:
            self._append(first, vectors)
        with self._transaction() as sql:
            self._forget(sql, [document.id for document, _ in waiting])
            row = first
            for document, parts in waiting:
                metadata = json.dumps(document.metadata, ensure_ascii=False)
                fields = (document.id, self._digest(document), document.title, metadata)
                sql.execute("insert into documents values (?, ?, ?, ?)", fields)
                for number, part in enumerate(parts):
                    fields_of = (row, document.id, number, len(parts), part)
                    sql.execute("insert into passages values (null, ?, ?, ?, ?, ?)", fields_of)
                    row += 1
            if vectors is not None:
                sql.execute("insert into blocks values (?, ?, ?)", (first, len(vectors), _checksum(vectors)))
            sql.execute("update about set value = ? where key = 'rows'", (str(row),))
            _bump(sql)

    def _append(self, first: int, vectors: NDArray[np.float32]) -> None:
        """Put vectors from row `first` on; what a crash left there is written over."""
        path = self._vectors_file(int(self._stored()["generation"]))
        try:
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.truncate(first * self._dim * 4)
                file.seek(0, os.SEEK_END)
                file.write(vectors.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(self._no_room(error)) from error

    def _forget(self, sql: sqlite3.Connection, ids: Sequence[str]) -> None:
        for table, column in (("passages", "document"), ("documents", "id")):
            sql.executemany(f"delete from {table} where {column} = ?", [(name,) for name in ids])

    def _tidy(self) -> None:
        """After a change: write the vectors anew without too many dead rows, bring the faiss index up to
        date, remove files that no version needs."""
        view = self._view = self._read_view()
        dead = view.rows - len(view.alive)
        if self._encoder is not None and dead > max(64, DEAD_SHARE * view.rows):
            self._compact(view)
            view = self._view = self._read_view()
        keep = {self._vectors_file(view.generation).name, f"bm25-{view.version}"}
        if self._encoder is not None:
            keep.add(self._build_near(view))
        for item in self.directory.iterdir():
            ours = item.name.startswith(("vectors-", "near-", "bm25-", ".")) and item.name != ".lock"
            if not ours or item.name in keep or _in_the_making(item):
                continue
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)  # another may remove it too
            else:
                item.unlink(missing_ok=True)

    def _compact(self, view: _View) -> None:
        """The living rows in a new generation of the file, numbered anew in the same order."""
        path = self._vectors_file(view.generation + 1)
        checksum = 0
        try:
            with open(path, "wb") as file:
                for start in range(0, len(view.alive), 65536):
                    part = view.vectors[view.alive[start : start + 65536]]
                    checksum = _checksum(part, checksum)
                    file.write(part.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UserError(self._no_room(error)) from error
        with self._transaction() as sql:
            moved = [
                (new, int(old)) for new, old in enumerate(view.alive)
            ]  # rising, so that no two ever meet
            sql.executemany("update passages set row = ? where row = ?", moved)
            sql.execute("delete from blocks")
            if moved:
                sql.execute("insert into blocks values (0, ?, ?)", (len(moved), checksum))
            for key, value in (("rows", len(moved)), ("generation", view.generation + 1)):
                sql.execute("update about set value = ? where key = ?", (str(value), key))
            _bump(sql)

    def _build_near(self, view: _View) -> str:
        """The name of the faiss index of this view; made, or grown, when the rows that it lacks are too
        many to be compared one by one."""
        import faiss

        kind, old = _kind(len(view.alive)), self._near_file(view)
        if kind == "flat":
            return ""
        if old is not None and old[1] == kind and view.rows - old[0] < max(FLAT_LIMIT // 2, old[0] // 5):
            return self._near_path(view.generation, old[0], kind).name
        faiss.omp_set_num_threads((os.cpu_count() or 1) if view.rows > _SHARED else 1)
        if old is not None and old[1] == kind:
            index, first = faiss.read_index(str(self._near_path(view.generation, old[0], kind))), old[0]
        else:
            self._say(
                f"index: {len(view.alive):,} passages, {kind} is built (flat search below {FLAT_LIMIT:,})"
            )
            index, first = _new_index(kind, self._dim, view.vectors), 0
        for start in range(first, view.rows, 65536):
            index.add(np.ascontiguousarray(view.vectors[start : min(start + 65536, view.rows)]))
        path = self._near_path(view.generation, view.rows, kind)
        try:
            faiss.write_index(index, str(partial := path.with_name(f".{path.name}")))
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            raise UserError(
                self._no_room(error if isinstance(error, OSError) else OSError(str(error)))
            ) from error
        return path.name

    # what is read

    def _nearest(self, view: _View, query: NDArray[np.float32], depth: int) -> dict[int, float]:
        """More candidates are asked for until `depth` of them are alive."""
        import faiss

        faiss.omp_set_num_threads(1)  # of this thread: one query is too little to share
        wanted = min(depth, len(view.alive))
        asked = min(wanted + min(view.rows - len(view.alive), 64), view.rows)
        while True:
            rows = self._candidates(view, query, asked)
            places = np.searchsorted(view.alive, rows)
            living = rows[view.alive[np.minimum(places, len(view.alive) - 1)] == rows]
            if len(living) >= wanted or asked >= view.rows:
                break
            asked = min(2 * asked, view.rows)
        scores = view.vectors[living] @ query
        order = np.lexsort((living, -scores))[:wanted]
        numbers = view.numbers[np.searchsorted(view.alive, living[order])]
        return dict(zip(numbers.tolist(), scores[order].tolist(), strict=True))

    def _candidates(self, view: _View, query: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Rows near the query [dim], dead ones among them: of the faiss index and of the rows behind it."""
        import faiss

        near, covered = self._near_index(view)
        found: list[NDArray[np.int64]] = []
        if near is not None:
            wide = near.search(query[None], min(_WIDE * count, covered))[1][0]
            found.append(np.asarray(wide[wide >= 0], np.int64))
        if covered < view.rows:
            rest = view.vectors[covered:]
            rows = faiss.knn(query[None], rest, min(count, len(rest)), faiss.METRIC_INNER_PRODUCT)[1][0]
            found.append(np.asarray(rows, np.int64) + covered)
        return np.sort(np.concatenate(found))

    def _near_index(self, view: _View) -> tuple[Any, int]:
        """The faiss index, mapped into memory, and how many rows it covers; (None, 0) in flat search."""
        import faiss

        stored = self._near_file(view)
        if stored is None:
            return None, 0
        covered, kind = stored
        with self._lock:
            if self._near is None or self._near[0] != (view.generation, covered):
                path = self._near_path(view.generation, covered, kind)
                try:
                    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
                except RuntimeError as error:
                    if not path.exists():  # another process has just made a newer one
                        return None, 0
                    raise UserError(f"{path}: cannot be read ({error}). Delete it: {_REMAKE}.") from error
                faiss.ParameterSpace().set_index_parameter(index, *_EFFORT[kind])
                self._near = (view.generation, covered), index
            return self._near[1], covered

    def _near_file(self, view: _View) -> tuple[int, str] | None:
        """Rows and kind of the largest faiss index of this generation that covers no row beyond the view."""
        found = []
        for path in self.directory.glob(f"near-{view.generation}-*.faiss"):
            _, _, rows, kind = path.stem.split("-", 3)
            found += [(int(rows), kind)] if int(rows) <= view.rows else []
        return max(found, default=None)

    def _bm25(self, view: _View) -> tuple[NDArray[np.int64], BM25]:
        """The passages' numbers and the BM25 index over them in that order, of this version or a newer
        one."""
        with self._lock:
            if self._lexical is None or self._lexical[0] < view.version:
                folder = self.directory / f"bm25-{view.version}"
                try:
                    self._lexical = view.version, view.numbers, BM25.load(folder)
                except FileNotFoundError:
                    self._lexical = self._make_bm25()
                except (OSError, ValueError, KeyError) as error:
                    raise UserError(
                        f"{folder}: cannot be read ({error}). Delete it; it is made again."
                    ) from error
            return self._lexical[1:]

    def _make_bm25(self) -> tuple[int, NDArray[np.int64], BM25]:
        with self._reading() as sql:
            query = (
                "select number, title, text from passages join documents on documents.id = document "
                "order by row"
            )
            sql.execute("begin")  # the version and the passages of one moment
            try:
                version, rows = int(_about(sql)["version"]), sql.execute(query).fetchall()
            finally:
                sql.execute("rollback")
        index = BM25([_read(title, text) for _, title, text in rows])
        folder = self.directory / f"bm25-{version}"
        partial = folder.with_name(f".{folder.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            index.save(partial)
            partial.rename(folder)
        except OSError as error:  # searching works without the file
            self._say(f"{folder}: not kept ({error.strerror or error}); BM25 is built again next time")
            shutil.rmtree(partial, ignore_errors=True)
        return version, np.asarray([number for number, _, _ in rows], np.int64), index

    def _now(self) -> _View:
        """The newest version, also when another process wrote it."""
        with self._lock:
            with self._reading() as sql:
                row = sql.execute("select value from about where key = 'version'").fetchone()
            if row is None or int(row[0]) != self._view.version:
                self._view = self._read_view()
            return self._view

    def _read_view(self) -> _View:
        with self._reading() as sql:
            sql.execute("begin")  # all of one moment
            try:
                stored = _about(sql)
                found = sql.execute("select row, number from passages order by row").fetchall()
            finally:
                sql.execute("rollback")
        alive, numbers = np.asarray(found, np.int64).reshape(-1, 2).T
        rows, generation = int(stored["rows"]), int(stored["generation"])
        vectors: NDArray[np.float32] = np.zeros((rows, self._dim), np.float32)
        if self._dim and rows:
            path, needed = self._vectors_file(generation), rows * self._dim * 4
            held = path.stat().st_size if path.exists() else 0
            if held < needed:
                if self._stored()["generation"] != stored["generation"]:  # another process has just moved on
                    return self._read_view()
                raise UserError(self._broken(f"{path.name} holds {held:,} bytes of {needed:,}"))
            vectors = np.memmap(path, np.float32, "r", shape=(rows, self._dim))
        version = int(stored["version"])
        return _View(
            version, generation, rows, np.ascontiguousarray(alive), np.ascontiguousarray(numbers), vectors
        )

    def _digest(self, document: Document) -> str:
        """Changes with the document and with how it is cut."""
        return f"{document.digest}-{self.chunking.max_tokens}-{self.chunking.overlap}"

    def _digests(self, ids: Iterator[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        with self._reading() as sql:
            for name in ids:
                row = sql.execute("select digest from documents where id = ?", (name,)).fetchone()
                if row is not None:
                    found[name] = row[0]
        return found

    def _stored(self) -> dict[str, str]:
        with self._reading() as sql:
            return _about(sql)

    # connections and locks

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, over threads and processes; the system lets go when a process ends."""
        with self._write_lock:
            if self._inside:
                yield
                return
            descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._inside = True
                yield
            finally:
                self._inside = False
                os.close(descriptor)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as sql:
            sql.execute("begin immediate")
            try:
                yield sql
                sql.execute("commit")
            finally:
                if sql.in_transaction:
                    sql.execute("rollback")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection. What SQLite says of a broken file or a full disk is a UserError."""
        try:
            if not hasattr(self._local, "sql"):
                sql = sqlite3.connect(self.directory / "index.sqlite", timeout=60, isolation_level=None)
                sql.execute("pragma journal_mode = wal")
                sql.execute("pragma synchronous = full")
                self._local.sql = sql
            yield self._local.sql
        except sqlite3.OperationalError as error:
            raise UserError(self._no_room(OSError(errno.EIO, str(error)))) from error
        except sqlite3.DatabaseError as error:
            raise UserError(self._broken(str(error))) from error

    def _vectors_file(self, generation: int) -> Path:
        return self.directory / f"vectors-{generation}.f32"

    def _near_path(self, generation: int, rows: int, kind: str) -> Path:
        return self.directory / f"near-{generation}-{rows}-{kind}.faiss"

    def _broken(self, what: str) -> str:
        return (
            f"{self.directory}: a broken index ({what}). Bring it back from a copy, or delete the folder "
            "and index the documents again."
        )

    def _no_room(self, error: OSError) -> str:
        free = shutil.disk_usage(self.directory).free / 2**20
        return (
            f"{self.directory}: could not be written ({error.strerror or error}; {free:.0f} MiB free). "
            "What was committed before is kept. Free some space or mend the folder, then index again: it "
            "goes on there."
        )


def passage_texts(directory: str | Path, ids: Iterable[str]) -> dict[str, str]:
    """Passage id -> title and text, of an index that needs no encoder to be read; ids it lacks are left out.

    Raises UserError when there is no index.
    """
    file = Path(directory) / "index.sqlite"
    if not file.exists():
        raise UserError(f"{directory}: no index, there is no {file.name}; name the folder of one (--index).")
    query = (
        "select title, text from passages join documents on documents.id = document "
        "where document = ? and chunk = ? and (chunks = 1) = ?"
    )
    found: dict[str, str] = {}
    try:
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as sql:
            for name in dict.fromkeys(ids):
                document, _, number = name.rpartition("#")
                row = sql.execute(query, (name, 0, 1)).fetchone()
                if row is None and document and number.isdecimal():
                    row = sql.execute(query, (document, int(number) - 1, 0)).fetchone()
                if row is not None:
                    found[name] = _read(*row)
    except sqlite3.Error as error:
        raise UserError(f"{file}: cannot be read ({error}). Bring it back from a copy.") from error
    return found


def embed_one(encoder: Encoder, text: str, kind: Any = "query") -> NDArray[np.float32]:
    """The vector [dim] of one text."""
    return np.ascontiguousarray(encoder.encode([text], kind=kind)[0], np.float32)


def _read(title: str, text: str) -> str:
    return f"{title} {text}" if title else text


def _checksum(vectors: NDArray[np.float32], before: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(vectors).data, before)


def _kind(passages: int) -> str:
    if passages < FLAT_LIMIT:
        return "flat"
    return "HNSW" if passages < GRAPH_LIMIT else "IVF-PQ"


def _new_index(kind: str, dim: int, vectors: NDArray[np.float32]) -> Any:
    """A trained, empty faiss index for inner products."""
    import faiss

    if kind == "HNSW":
        index = faiss.index_factory(dim, "HNSW32,SQ8", faiss.METRIC_INNER_PRODUCT)
    else:
        lists = 1 << int(np.log2(4 * np.sqrt(len(vectors))))
        parts = next(m for m in (dim // 8, dim // 4, dim // 2, 1) if m and dim % m == 0)
        index = faiss.index_factory(dim, f"IVF{lists},PQ{parts}", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(len(vectors))[: 40 * 4096]
    index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
    return index


def _about(sql: sqlite3.Connection) -> dict[str, str]:
    return dict(sql.execute("select key, value from about").fetchall())


def _bump(sql: sqlite3.Connection) -> None:
    sql.execute("update about set value = cast(value as integer) + 1 where key = 'version'")


def _in_the_making(item: Path) -> bool:
    """Whether a thread that searches, here or in another living process, is writing this BM25 folder."""
    name = item.name.split("-")  # .bm25-VERSION-PROCESS-THREAD
    return name[0] == ".bm25" and len(name) == 4 and alive(name[2])
