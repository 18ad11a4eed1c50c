"""Documents as they are indexed: records, their sentences, and chunks of those that an encoder can read
whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.data.records import is_unicode, stable_id
from common.errors import UserError, listed

# An end mark with what closes it, before white space and no small letter; or an East Asian one; or a free
# line. Each run of marks or of white space is looked at once: the time is linear in the text.
_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’)\]]*+(?=\s++[^\sa-z])|[。！？]++["”’」』）]*+"""
    r"""|(?<=\S)(?=[^\S\n]*+\n[^\S\n]*+\n)"""
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Z]|e\.g|i\.e|cf|vs|al|Dr|Mr|Mrs|Ms|Prof|St|No|Fig|Figs|Eq|Sec|Vol|pp|approx|resp)\.$"
)
_LONGEST = 16  # characters, more than any abbreviation and what stands before it
_PIECE = re.compile(r"[a-zA-Z]{1,4}|\d{1,3}|[^\W\da-zA-Z]|[^\w\s]|_+")


@dataclass(frozen=True)
class Document:
    """What a user indexes. `metadata` is any JSON object and comes back with every hit."""

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hex digits that change with the content."""
        content = json.dumps([self.text, self.title, self.metadata], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chunking:
    """How a long document is cut: whole sentences up to `max_tokens` (as `count_tokens`, >= 16), the last
    `overlap` sentences repeated in the next chunk (>= 0)."""

    max_tokens: int = 180
    overlap: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < 16:
            raise UserError(f"chunking: max_tokens is {self.max_tokens}; allowed: >= 16")
        if self.overlap < 0:
            raise UserError(f"chunking: overlap is {self.overlap}; allowed: >= 0 sentences")


def as_documents(items: Iterable[object]) -> list[Document]:
    """Documents of strings and of records {"id"?, "text", "title"?, "metadata"?}; `Document`s pass through.

    A text without an id gets one of its own content, so that giving it twice is the same document. Other keys
    of a record belong to its metadata. UserError lists what is no document, and ids that appear twice.
    """
    if isinstance(items, str | bytes | Mapping | Document) or not isinstance(items, Iterable):
        raise UserError(
            f"documents come in a list, this is a {type(items).__name__}: [document], where there is one"
        )
    bad: list[str] = []
    found: dict[str, Document] = {}
    for number, item in enumerate(items, 1):
        try:
            document = item if isinstance(item, Document) else _document(item)
        except ValueError as error:
            bad.append(f"document {number}: {error}")
            continue
        known = found.setdefault(document.id, document)
        if known != document:
            bad.append(f"document {number}: the id {document.id!r} appears twice with different content")
    if bad:
        raise UserError(f"{len(bad)} documents cannot be indexed:\n{listed(bad)}")
    return list(found.values())


def _document(item: object) -> Document:
    record = {"text": item} if isinstance(item, str) else item
    if not isinstance(record, Mapping):
        raise ValueError(f"is a {type(item).__name__}; give a text or an object with `text`")
    rest = {
        key: value for key, value in record.items() if key not in ("id", "_id", "text", "title", "metadata")
    }
    text, title = record.get("text"), record.get("title") or ""
    metadata = record.get("metadata") or {}
    given = next((record[key] for key in ("id", "_id") if record.get(key) is not None), None)
    if not isinstance(text, str) or not isinstance(title, str) or not text.strip():
        raise ValueError("needs a `text` with some words, and a `title` that is a text where there is one")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int) or given == ""):
        raise ValueError(f"the id {given!r} is neither a text nor a whole number")
    if not isinstance(metadata, Mapping):
        raise ValueError(f"`metadata` is a {type(metadata).__name__}, an object is needed")
    together = {**rest, **metadata}
    try:
        unicode = is_unicode([given, text, title, together])
    except (TypeError, ValueError) as error:
        raise ValueError(f"`metadata` is not JSON ({error})") from None
    if not unicode or "\0" in f"{given}{title}":
        raise ValueError("holds what is no Unicode text")
    return Document(
        stable_id("d", f"{title}\n{text}") if given is None else str(given), text, title, together
    )


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, white space around them gone. What ends with an abbreviation or an
    initial is no end; a free line always is."""
    found: list[str] = []
    start = 0
    for end in _END.finditer(text):
        if end.group() == "." and _ABBREVIATION.search(text[max(start, end.end() - _LONGEST) : end.end()]):
            continue
        part = text[start : end.end()].strip()
        if not part:
            continue
        found.append(part)
        start = end.end()
    return [*found, rest] if (rest := text[start:].strip()) else found


def count_tokens(text: str) -> int:
    """An estimate of a language model's tokens that seldom falls short: letters in fours, digits in threes,
    every other sign and every letter that is not Latin alone."""
    return sum(1 for _ in _PIECE.finditer(text))


def chunks(text: str, chunking: Chunking) -> list[str]:
    """The text in chunks of whole sentences. A sentence that is longer than a chunk is cut between words,
    and a word that is longer between its letters."""
    limit = chunking.max_tokens
    parts = [piece for sentence in sentences(text) for piece in _cut(sentence, limit)]
    sizes = [count_tokens(part) for part in parts]
    made: list[str] = []
    first = 0
    while first < len(parts):
        last, size = first, 0
        while last < len(parts) and (last == first or size + sizes[last] <= limit):
            size += sizes[last]
            last += 1
        made.append(" ".join(parts[first:last]))
        if last == len(parts):
            break
        again = _repeated(sizes, first, last, chunking)
        first = last - again
    return made or [text.strip()]


def _repeated(sizes: Sequence[int], first: int, last: int, chunking: Chunking) -> int:
    """How many sentences before `last` begin the next chunk: fewer where they would fill half of it."""
    again = min(chunking.overlap, last - first - 1)
    while again and sum(sizes[last - again : last]) > chunking.max_tokens // 2:
        again -= 1
    return again


def _cut(sentence: str, limit: int) -> list[str]:
    """Pieces of a sentence of at most `limit` tokens."""
    if count_tokens(sentence) <= limit:
        return [sentence]
    words: list[str] = []
    for word in sentence.split():
        step = limit if count_tokens(word) > limit else len(word)  # a token has a letter at least
        words += [word[at : at + step] for at in range(0, len(word), step)]
    pieces: list[list[str]] = [[]]
    size = 0
    for word in words:
        tokens = count_tokens(word)
        if pieces[-1] and size + tokens > limit:
            pieces.append([])
            size = 0
        pieces[-1].append(word)
        size += tokens
    return [" ".join(piece) for piece in pieces]
