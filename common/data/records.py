"""Ranking data in memory, its checks, and the JSON triples format."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError, listed

Run = dict[str, dict[str, float]]  # query id -> passage id -> score, higher first
Qrels = dict[str, dict[str, int]]  # query id -> passage id -> grade, grade > 0 is relevant
OnBadRow = Literal["error", "skip"]
MAX_GRADE = 1000  # trec_eval adds up grades in 32 bits
TRIPLE_FIELDS = ("query", "positive", "negative", "scores", "positive_scores", "negative_scores")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # a pair of these escapes is one character


@dataclass(frozen=True)
class RankingData:
    """A corpus, queries and one set of judgements per split. All splits search the whole corpus."""

    name: str
    corpus: dict[str, str]  # passage id -> text
    queries: dict[str, str]  # query id -> text, all splits
    qrels: dict[str, Qrels]  # split -> judgements
    negatives: dict[str, tuple[str, ...]] = field(default_factory=dict)  # query id -> given negatives
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out
    teacher: Run = field(default_factory=dict)  # a teacher's scores of pairs, which training may learn from
    parts: dict[str, RankingData] = field(default_factory=dict)  # of combined data: ids stand behind `part/`

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of what is ranked; order, name and a teacher's scores do not count."""
        digest = hashlib.sha256()
        for part in (self.corpus, self.queries, self.qrels, self.negatives):
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def training_fingerprint(self) -> str:
        """`fingerprint`, and behind it that of the teacher's scores where there are any."""
        if not self.teacher:
            return self.fingerprint
        digest = hashlib.sha256(json.dumps(self.teacher, sort_keys=True).encode()).hexdigest()
        return f"{self.fingerprint}-{digest[:16]}"

    def split(self, name: str) -> Qrels:
        """Judgements of one split. Raises UserError when there is none of this name."""
        if name not in self.qrels:
            raise UserError(
                f"{self.name}: no split {name!r}; it has {', '.join(sorted(self.qrels)) or 'none'}. Name one "
                "of these (in a recipe data.train_split, data.dev_split, data.test_split, retrain.old_split; "
                "elsewhere --split), or give the data judgements of this name."
            )
        return self.qrels[name]

    def judges_irrelevant(self, split: str) -> bool:
        """Whether queries of a split come with passages judged irrelevant: with candidates of their own."""
        return any(grade <= 0 for grades in self.split(split).values() for grade in grades.values())

    def validate(self) -> RankingData:
        """Return self; UserError unless every id resolves, no text is empty and each split has a positive."""
        problems = []
        for what, texts in (("passage", self.corpus), ("query", self.queries)):
            problems += [
                f"{what} {key!r}: the text is empty" for key, text in texts.items() if not text.strip()
            ]
        for split, qrels in self.qrels.items():
            problems += self._unknown_ids(split, qrels)
            if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
                problems.append(f"split {split!r}: no query has a passage with a grade above 0")
        for query, passages in self.negatives.items():
            problems += [
                f"negatives of {query!r}: unknown passage {p!r}" for p in passages if p not in self.corpus
            ]
        if problems:
            raise UserError(f"{self.name}: {len(problems)} problem(s):\n{listed(problems)}\nMend the data.")
        return self

    def shared_queries(self, split: str, other: str) -> int:
        """How many queries of `other` are asked in `split` too, in the same words."""
        asked = {same_words(self.queries[query]) for query in self.split(split)}
        return sum(same_words(self.queries[query]) in asked for query in self.split(other))

    def _unknown_ids(self, split: str, qrels: Qrels) -> Iterator[str]:
        for query, grades in qrels.items():
            if query not in self.queries:
                yield f"qrels {split!r}: unknown query {query!r}"
            for passage in grades:
                if passage not in self.corpus:
                    yield f"qrels {split!r}, query {query!r}: unknown document {passage!r}"


class BadRows:
    """Collects `file:line: what`; raises them all at the end, or counts and skips them."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row is {on_bad_row!r}; allowed: 'error', 'skip'.")
        self.skip = on_bad_row == "skip"
        self.problems: list[str] = []
        self.dropped: Counter[str] = Counter()

    def add(self, where: str, what: str, reason: str) -> None:
        """Note one bad row; `reason` is the class of fault it is counted under."""
        self.dropped[reason] += 1
        self.problems.append(f"{where}: {what}")

    def raise_if_any(
        self,
        remedy: str = "Mend them, or leave them out: --on-bad-row skip (of train and prepare_data "
        "--data.on-bad-row skip; in Python on_bad_row='skip').",
    ) -> None:
        """Raise one UserError with the first 20 rows and the remedy, unless rows are to be skipped."""
        if self.problems and not self.skip:
            raise UserError(f"{len(self.problems)} bad row(s):\n{listed(self.problems)}\n{remedy}")


@dataclass(frozen=True)
class Triple:
    """One training row: a query, its positives with grades, and negatives (texts, not ids)."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    grades: tuple[int, ...]
    positive_scores: tuple[float, ...] = ()  # a teacher's, one for each passage, or none
    negative_scores: tuple[float, ...] = ()


def relevant_passages(grades: Mapping[str, int]) -> list[str]:
    """Passages with a grade above 0, best grade first, ties by id."""
    return sorted((p for p, grade in grades.items() if grade > 0), key=lambda p: (-grades[p], p))


def same_words(text: str) -> str:
    """The text in lower case with single spaces: equal for queries that differ in nothing else."""
    return " ".join(text.casefold().split())


def stable_id(prefix: str, text: str) -> str:
    """An id that depends on the text alone, so that it never moves when rows are added."""
    return f"{prefix}{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, gzip-compressed if its name ends in .gz. Raises UserError if it cannot be read."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None


def hub_library(name: str) -> Any:
    """The library `datasets`, which loads the data of a name on the hub; UserError where it is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: hub datasets need the library `datasets`: pip install -e '.[hub]'."
        ) from None
    return datasets


def json_rows(path: Path, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", value) for each row of JSONL, or of one JSON array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from _array_rows(path, text, bad)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.add(f"{path}:{number}", f"not JSON: {_why(error)}", "not JSON")
            continue
        if _HALF_CHARACTER.search(line) and not is_unicode(value):
            bad.add(f"{path}:{number}", "half a character (a lone \\ud800-\\udfff escape)", "not Unicode")
            continue
        yield f"{path}:{number}", value


def _why(error: ValueError | RecursionError) -> str:
    """What Python's parser did not take: a mistake, a number of too many digits, brackets too deep."""
    if isinstance(error, RecursionError):
        return "brackets are nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def is_unicode(value: Any) -> bool:
    """Whether every text of a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _array_rows(path: Path, text: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not a JSON array: {error.msg}. Mend it.") from None
    except (ValueError, RecursionError):
        pass  # its row is found below
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while True:
        start = _next_value(text, at)
        if text[start] == "]":
            return
        line += text.count("\n", at, start)
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # where the row ends is not known either
            raise UserError(f"{path}:{line}: not JSON: {_why(error)}. Mend it.") from None
        if _HALF_CHARACTER.search(text, start, at) and not is_unicode(value):
            bad.add(f"{path}:{line}", "half a character (a lone \\ud800-\\udfff escape)", "not Unicode")
        else:
            yield f"{path}:{line}", value
        line += text.count("\n", start, at)


def _next_value(text: str, at: int) -> int:
    while text[at] in " \t\r\n,":
        at += 1
    return at


def parse_triples(path: str | Path, on_bad_row: OnBadRow = "error") -> tuple[list[Triple], dict[str, int]]:
    """Rows `{"query", "positive", "negative"?, "scores"?}` of JSONL or a JSON array, and the dropped counts.

    `scores` are grades of the positives; `positive_scores` and `negative_scores` a teacher's. Raises
    UserError with every bad row as `file:line: what` (20 shown).
    """
    bad = BadRows(on_bad_row)
    triples = []
    for where, row in json_rows(Path(path), bad):
        try:
            triples.append(parse_triple(row))
        except ValueError as error:
            bad.add(where, str(error), "bad triple")
    bad.raise_if_any()
    if not triples:
        raise UserError(f'{path}: no usable row. Expected {{"query": ..., "positive": ...}} on each line.')
    return triples, dict(bad.dropped)


def parse_triple(row: Any) -> Triple:
    """One row as a Triple. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    unknown = set(row) - set(TRIPLE_FIELDS)
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}; allowed: {', '.join(TRIPLE_FIELDS)}")
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError("'query' must be a text that is not empty")
    positives, negatives = _texts_of(row, "positive"), _texts_of(row, "negative")
    if not positives:
        raise ValueError("'positive' has no passage")
    both = set(positives) & set(negatives)
    if both:
        raise ValueError(f"passage {min(both)[:40]!r} is both positive and negative")
    return Triple(
        query.strip(),
        positives,
        negatives,
        _grades_of(row, len(positives)),
        _teacher_of(row, "positive_scores", len(positives)),
        _teacher_of(row, "negative_scores", len(negatives)),
    )


def _texts_of(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"{key!r} must be a text or a list of texts")
    if not all(text.strip() for text in values):
        raise ValueError(f"{key!r} holds an empty passage")
    return tuple(text.strip() for text in values)


def _grades_of(row: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """`scores`: a whole-number grade from 1 to MAX_GRADE for each positive; 1 without it."""
    scores = row.get("scores")
    if scores is None:
        return (1,) * count
    scores = scores if isinstance(scores, list | tuple) else [scores]
    whole = all(type(s) in (int, float) and 0 < s <= MAX_GRADE and s % 1 == 0 for s in scores)
    if len(scores) != count or not whole:
        raise ValueError(
            f"'scores' must be {count} whole number(s) from 1 to {MAX_GRADE}, one for each positive"
        )
    return tuple(int(s) for s in scores)


def _teacher_of(row: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    scores = row.get(key)
    if scores is None:
        return ()
    scores = scores if isinstance(scores, list | tuple) else [scores]
    if len(scores) != count or not all(type(s) in (int, float) and math.isfinite(s) for s in scores):
        raise ValueError(f"{key!r} must be {count} number(s), a teacher's score for each passage")
    return tuple(map(float, scores))


def triples_data(name: str, splits: Mapping[str, list[Triple]], dropped: dict[str, int]) -> RankingData:
    """Ranking data whose corpus is every passage of the triples; ids are hashes of the texts.

    Rows of one query are one query; a passage that one row calls positive is no negative of that query.
    """
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {split: {} for split in splits}
    negatives: dict[str, dict[str, None]] = {}
    teacher: Run = {}
    for split, triples in splits.items():
        for triple in triples:
            query = _keep(queries, "q", triple.query)
            grades = qrels[split].setdefault(query, {})
            for text, grade in zip(triple.positives, triple.grades, strict=True):
                passage = _keep(corpus, "p", text)
                grades[passage] = max(grade, grades.get(passage, 0))
            given = negatives.setdefault(query, {})
            given.update({_keep(corpus, "p", text): None for text in triple.negatives})
            for texts, scores in (
                (triple.positives, triple.positive_scores),
                (triple.negatives, triple.negative_scores),
            ):
                known = {stable_id("p", text): score for text, score in zip(texts, scores, strict=False)}
                if known:
                    teacher.setdefault(query, {}).update(known)
    relevant = {(q, p) for part in qrels.values() for q, grades in part.items() for p in grades}
    useful = {q: tuple(p for p in given if (q, p) not in relevant) for q, given in negatives.items()}
    return RankingData(name, corpus, queries, qrels, {q: p for q, p in useful.items() if p}, dropped, teacher)


def _keep(texts: dict[str, str], prefix: str, text: str) -> str:
    key = stable_id(prefix, text)
    texts[key] = text
    return key
