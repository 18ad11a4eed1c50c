"""Query expansions as training rows: QMD's schema, its older forms, the original's split, no leaks."""

from __future__ import annotations

import glob
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.data.records import BadRows, OnBadRow, hub_library, json_rows, read_text, same_words
from common.errors import UserError

Line = tuple[str, str]  # type, text
TYPES = ("hyde", "lex", "vec")  # in the order of training targets
SEED, VAL_FRACTION = 42, 0.1  # of the original's prepare_data
HYDE_PAID = 200  # characters of a hyde that the original's score pays for
MARKER = "Expand this search query:"
INTENT = "Query intent:"
_CONTROL = re.compile(r"<\|[^|<>\s]*\|>|</?think>")
_ONLY = re.compile(r"\s+/?only:\s*(lex|vec|hyde)\s*$", re.IGNORECASE)  # today's spelling and both older ones
_REMEDY = "Mend them, or leave them out: on_bad_row=skip."


@dataclass(frozen=True)
class ExpansionRow:
    """A query and its golden lines, in the order hyde, lex, vec; `intent` and `category` may be empty."""

    query: str
    lines: tuple[Line, ...]
    intent: str = ""
    category: str = ""


@dataclass(frozen=True)
class EvalQuery:
    """A query to evaluate on, and the group that it belongs to."""

    query: str
    category: str


@dataclass(frozen=True)
class ExpansionData:
    """Training and validation rows without repeated queries, and what was left out."""

    name: str
    train: tuple[ExpansionRow, ...]
    val: tuple[ExpansionRow, ...]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows left out
    leaked: tuple[str, ...] = ()  # queries of rows left out because they are evaluated on

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of all rows, in order."""
        rows = [repr([astuple(row) for row in part]) for part in (self.train, self.val)]
        return hashlib.sha256("|".join(rows).encode()).hexdigest()[:16]

    def summary(self) -> str:
        """Counts for a log: rows of each split, what was dropped, evaluation queries found in the data."""
        lines = [f"{self.name}: {len(self.train):,} training and {len(self.val):,} validation rows"]
        lines += [f"left out, {reason}: {count:,}" for reason, count in self.dropped.items() if count]
        if self.leaked:
            lines.append(f"evaluation queries in the data: {'; '.join(self.leaked)}")
        return "\n".join(lines)


def load_expansions(
    name: str,
    *,
    split: str = "train",
    eval_split: str = "",
    held_out: Sequence[str] = (),
    trim_hyde: bool = False,
    seed: int = SEED,
    val_fraction: float = VAL_FRACTION,
    on_bad_row: OnBadRow = "error",
) -> ExpansionData:
    """Rows named "generated", at a path (file, folder, or a pattern with `*`), or of a hub dataset.

    A folder is its train.jsonl (and val.jsonl), else all its .jsonl files in sorted order. Rows with the
    query of an earlier one are left out; without a validation set `val_fraction` in [0, 1) of the rows is cut
    off after a shuffle by `seed`: with the defaults the original's split. Rows that ask one of the `held_out`
    queries, with any `/only` suffix, are then left out of both. `trim_hyde` cuts hydes to the 200 characters
    that the score pays for. `split` and `eval_split` name the splits of a hub dataset (no eval_split:
    "validation" or "val" where there is one). Raises UserError with every bad row as `file:line: what`.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; allowed: 0 <= val_fraction < 1.")
    bad = BadRows(on_bad_row)
    parts = _sources(name, split, eval_split, bad)
    bad.raise_if_any(_REMEDY)
    dropped = bad.dropped
    train, val = _distinct(parts, dropped)
    if not train:
        raise UserError(
            f'{name}: no usable row. Expected {{"query", "output": [[type, text], ...]}} on each.'
        )
    if not val and val_fraction:
        rows = list(train)
        random.Random(seed).shuffle(rows)
        cut = int(len(rows) * (1 - val_fraction))
        train, val = rows[:cut], rows[cut:]
    train, val, leaked = _without(train, val, held_out, dropped)
    if trim_hyde:
        train, val = ([_trimmed(row) for row in rows] for rows in (train, val))
    return ExpansionData(name, tuple(train), tuple(val), dict(dropped), leaked)


def parse_row(row: Any) -> ExpansionRow:
    """One row of QMD's schema or of an older form. Raises ValueError saying what is wrong with it.

    Forms: {"query", "output": [[type, text], ...]} (today's), {"query", "searches": [{"type", "query"}]},
    {"input", "output": "type: text\\n..."}, {"messages": [user, assistant]}, {"prompt", "completion"}. Other
    fields are ignored, as the original does.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    query, intent = _asked(row)
    lines = tuple(_checked(kind, text) for kind, text in _given_lines(row))
    if not lines:
        raise ValueError("the expansion has no line")
    return ExpansionRow(query, in_order(lines), intent, _optional(row, "category"))


def in_order(lines: Iterable[Line]) -> tuple[Line, ...]:
    """The lines in the order of training targets: hyde, lex, vec; within a type as they were."""
    return tuple(sorted(lines, key=lambda line: TYPES.index(line[0])))


def render_lines(lines: Iterable[Line]) -> str:
    """`type: text`, a line each, without a newline at the end."""
    return "\n".join(f"{kind}: {text}" for kind, text in lines)


def without_only(query: str) -> str:
    """The query without its `/only:TYPE`, in any of the spellings that the data has."""
    return _ONLY.sub("", query)


def trim_hyde(text: str, limit: int = HYDE_PAID) -> str:
    """At most `limit` characters: whole sentences where these are 50 or more, else whole words."""
    if len(text) <= limit:
        return text
    sentences = [m.end() for m in re.finditer(r"[.!?](?=\s)|[。！？]", text) if 50 <= m.end() <= limit]
    if sentences:
        return text[: sentences[-1]]
    head = text[:limit]
    return (head if text[limit].isspace() or " " not in head else head[: head.rindex(" ")]).rstrip(" ,;:")


def read_queries(path: str | Path) -> list[EvalQuery]:
    """Queries, one a line; the first comment line of a block (`# ...` after a blank line) names its group."""
    found, category, fresh = [], "", True
    for line in map(str.strip, read_text(path).splitlines()):
        if line.startswith("#"):
            category = line.lstrip("# ") if fresh else category
        elif line:
            found.append(EvalQuery(line, re.sub(r"\s+(\(|- ).*$", "", category) or "all"))
        fresh = not line
    if not found:
        raise UserError(f"{path}: no query. Expected one a line; lines that begin with # name a group.")
    return found


# --- one row ---


def _asked(row: Mapping[str, Any]) -> tuple[str, str]:
    """The query and its intent, from a field of its own or out of a rendered prompt."""
    for key in ("query", "input"):
        if key in row:
            return _one_line(row[key], f"{key!r}"), _optional(row, "intent")
    prompt = row.get("prompt")
    if "messages" in row:
        prompt = _message(row["messages"], "user")
    if not isinstance(prompt, str) or MARKER not in prompt:
        raise ValueError(f"no query: expected 'query' or 'input', or a prompt with {MARKER!r}")
    asked = prompt.partition(MARKER)[2].partition("<|im_end|>")[0]
    query, _, intent = asked.partition(f"\n{INTENT}")
    return _one_line(query, "the prompt's query"), intent.strip()


def _given_lines(row: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    if "searches" in row:
        yield from _searches(row["searches"])
    elif isinstance(row.get("output"), list | tuple):
        for number, pair in enumerate(row["output"], 1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"line {number} of 'output' must be [type, text]")
            yield pair[0], pair[1]
    else:
        yield from _text_lines(row)


def _searches(searches: object) -> Iterator[tuple[object, object]]:
    if not isinstance(searches, list | tuple):
        raise ValueError('\'searches\' must be a list of {"type", "query"}')
    for number, item in enumerate(searches, 1):
        if not isinstance(item, Mapping) or not {"type", "query"} <= set(item):
            raise ValueError(f'search {number} must be {{"type", "query"}}')
        yield item["type"], item["query"]


def _text_lines(row: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    text = row.get("output", row.get("completion"))
    if text is None and "messages" in row:
        text = _message(row["messages"], "assistant")
    if not isinstance(text, str):
        raise ValueError("'output' must be a list of [type, text]")
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).replace("<|im_end|>", "")
    for line in filter(str.strip, text.split("\n")):
        kind, colon, content = line.partition(":")
        if not colon:
            raise ValueError(f"the line {line[:40]!r} has no type; expected `type: text`")
        yield kind.strip(), content


def _message(messages: object, role: str) -> object:
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError('\'messages\' must be a list of {"role", "content"}')
    found = [message.get("content") for message in messages if message.get("role") == role]
    if len(found) != 1:
        raise ValueError(f"'messages' must have one message of the {role}, it has {len(found)}")
    return found[0]


def _checked(kind: object, text: object) -> Line:
    if kind not in TYPES:
        raise ValueError(f"unknown type {kind!r}; allowed: {', '.join(sorted(TYPES))}")
    return str(kind), _one_line(text, f"the text of a {kind} line")


def _one_line(text: object, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} must be a text that is not blank")
    text = text.strip()
    if len(text.splitlines()) > 1:
        raise ValueError(f"{what} has a line break: {text[:40]!r}")
    control = _CONTROL.search(text)
    if control:
        raise ValueError(f"{what} has the control token {control[0]}")
    return text


def _optional(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text")
    return " ".join((value or "").split())


# --- sources ---


def _sources(
    name: str, split: str, eval_split: str, bad: BadRows
) -> tuple[list[ExpansionRow], list[ExpansionRow]]:
    if name == "generated":
        from common.data.generated import generated_rows

        return generated_rows()
    path = Path(name).expanduser()
    if path.is_dir():
        files = _jsonl(path)
        if not files and any(path.rglob("*.parquet")):
            return _hub(str(path), split, eval_split, bad)
        train, val = (
            [f for f in files if f.name.split(".")[0] in names] for names in (["train"], _VAL_NAMES)
        )
        if train:
            return _parsed(train, bad), _parsed(val, bad)
        if files:
            return _parsed(files, bad), []
        raise UserError(f"{path}: has no .jsonl file. Give a file, or a folder of rows.")
    files = [Path(found) for found in sorted(glob.glob(str(path)))] if "*" in name else [path]
    if files and all(file.is_file() for file in files):
        return _parsed(files, bad), []
    if path.suffix in (".jsonl", ".json", ".gz") or name.startswith((".", "/", "~", "data/")) or "*" in name:
        raise UserError(
            f"data {name!r}: no file or folder {path.absolute()}. Check the path, or name a hub dataset "
            "(owner/name) or 'generated', the rows that need no download."
        )
    return _hub(name, split, eval_split, bad)


_VAL_NAMES = ["val", "valid", "validation", "dev"]


def _jsonl(folder: Path) -> list[Path]:
    return sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(pattern))


def _parsed(files: Sequence[Path], bad: BadRows) -> list[ExpansionRow]:
    return list(_rows((pair for file in files for pair in json_rows(file, bad)), bad))


def _rows(pairs: Iterable[tuple[str, Any]], bad: BadRows) -> Iterator[ExpansionRow]:
    for where, row in pairs:
        try:
            yield parse_row(row)
        except ValueError as error:
            bad.add(where, str(error), "bad row")


def _hub(
    name: str, split: str, eval_split: str, bad: BadRows
) -> tuple[list[ExpansionRow], list[ExpansionRow]]:
    """A hub dataset, `owner/name`, or a local folder of its files."""
    datasets = hub_library(name)
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError) as error:  # not found, not reachable
        raise UserError(
            f"data {name!r}: not found. Tried the path {Path(name).absolute()} and the hub dataset "
            f"({type(error).__name__}: {error}). Check the spelling and the network, or give a .jsonl file, "
            "a folder of them, or 'generated', the rows that need no download."
        ) from error
    val = eval_split or next((part for part in _VAL_NAMES if part in found), "")
    for wanted in filter(None, (split, val)):
        if wanted not in found:
            raise UserError(
                f"data {name!r}: no split {wanted!r}; it has {', '.join(found)}. Name one of these."
            )
    parts = [
        list(_rows(((f"{name}:{part}:{n}", _given(row)) for n, row in enumerate(found[part], 1)), bad))
        if part
        else []
        for part in (split, "" if val == split else val)
    ]
    return parts[0], parts[1]


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table without the columns that are empty in it."""
    return {key: value for key, value in row.items() if value is not None}


# --- splits ---


def _distinct(
    parts: tuple[list[ExpansionRow], list[ExpansionRow]], dropped: Counter[str]
) -> tuple[list[ExpansionRow], list[ExpansionRow]]:
    """The first row of each query, case ignored; training rows come before validation rows."""
    seen: set[str] = set()
    kept: list[list[ExpansionRow]] = []
    for rows in parts:
        first = {row.query.lower(): row for row in reversed(rows) if row.query.lower() not in seen}
        kept.append([row for row in rows if first.get(row.query.lower()) is row])
        seen |= first.keys()
        dropped["a query that an earlier row has"] += len(rows) - len(kept[-1])
    return kept[0], kept[1]


def _without(
    train: list[ExpansionRow], val: list[ExpansionRow], held_out: Sequence[str], dropped: Counter[str]
) -> tuple[list[ExpansionRow], list[ExpansionRow], tuple[str, ...]]:
    """Rows that ask no held-out query; queries that differ in their `/only` alone are the same."""
    same = {same_words(query) for query in held_out}
    stems = {same_words(without_only(query)) for query in held_out}
    leaked = [row for row in (*train, *val) if same_words(without_only(row.query)) in stems]
    exact = sum(same_words(row.query) in same for row in leaked)
    dropped["an evaluation query"] += exact
    dropped["an evaluation query but for /only"] += len(leaked) - exact
    queries = {row.query for row in leaked}
    kept = ([row for row in rows if row.query not in queries] for rows in (train, val))
    return *kept, tuple(row.query for row in leaked)  # type: ignore[return-value]


def _trimmed(row: ExpansionRow) -> ExpansionRow:
    lines = tuple((kind, trim_hyde(text) if kind == "hyde" else text) for kind, text in row.lines)
    return replace(row, lines=lines)
