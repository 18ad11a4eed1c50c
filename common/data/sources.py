"""Ranking data by name or path: pydocs, JSON triples, BEIR and TREC folders, hub datasets; TREC run files."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.data.combined import combine, source_name
from common.data.records import (
    MAX_GRADE,
    BadRows,
    OnBadRow,
    Qrels,
    RankingData,
    Run,
    Triple,
    hub_library,
    json_rows,
    parse_triple,
    parse_triples,
    read_text,
    same_words,
    triples_data,
)
from common.errors import UserError, listed

AT_LEAST = 5  # queries of a split that is cut, where its share has so many
Texts = tuple[Mapping[str, str], Mapping[str, str]]  # of queries and of passages, by id
SPLIT_NAMES = {"qrels": "test", "valid": "dev", "validation": "dev", "val": "dev", "development": "dev"}
_LIMITED = re.compile(r"(.+)@(\d+)$")  # a source and how many of its training queries are kept
TRIPLE_COLUMNS = {"query": ("query", "anchor", "question"), "positive": ("positive", "answer", "passage")}


def load_ranking_data(
    name: str,
    *,
    on_bad_row: OnBadRow = "error",
    dev_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    labels: bool = True,
) -> RankingData:
    """Ranking data named "pydocs" or "generated", at a path (triples, BEIR or TREC folder), or on the hub.

    Several of them, joined by `+`, are combined (common.data.combined); `@N` behind one keeps at most N of
    its training queries: "pydocs + $DATA/conala + $DATA/scifact@500". Environment variables are filled in.
    Splits that are not published are cut from train by a hash of the query id and `seed`: `dev_fraction`, and
    `test_fraction` when train is the only split (each in [0, 1)). Without `labels` a BEIR folder may lack its
    judgements: the data then has no splits. Raises UserError naming what was tried, or each bad row.
    """
    for option, value in (("dev_fraction", dev_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(f"{option} is {value}; allowed: 0 <= {option} < 1.")
    if ("+" in name or _LIMITED.match(name)) and not Path(os.path.expandvars(name)).expanduser().exists():

        def load(part: str) -> RankingData:
            return load_ranking_data(
                part,
                on_bad_row=on_bad_row,
                dev_fraction=dev_fraction,
                test_fraction=test_fraction,
                seed=seed,
                cache_dir=cache_dir,
                labels=labels,
            )

        return _load_several(name, load)
    path = Path(name := _filled_in(name)).expanduser()
    if name == "pydocs":
        from common.data.pydocs import build_pydocs

        return build_pydocs()
    if name == "generated":
        from common.data.generated import generated_collection

        return cut_splits(generated_collection(), dev_fraction, test_fraction, seed).validate()
    if path.is_dir():
        bad = BadRows(on_bad_row)
        hub = _is_hub_folder(path)
        data = _load_hub(str(path), bad, cache_dir) if hub else _load_folder(path, bad, labels)
    elif path.is_file():
        triples, dropped = parse_triples(path, on_bad_row)
        data = triples_data(path.name.split(".")[0], {"train": triples}, dropped)
    elif "/" not in name or path.suffix in (".jsonl", ".json", ".gz") or name.startswith((".", "/", "~")):
        raise UserError(
            f"data {name!r}: no file or folder {path.absolute()}, and the built-in sets are 'pydocs' and "
            "'generated'. Hub datasets are written owner/name. Check the spelling, or give a .jsonl file or "
            "a BEIR folder."
        )
    else:
        data = _load_hub(name, BadRows(on_bad_row), cache_dir)
    return cut_splits(data, dev_fraction, test_fraction, seed).validate()


def _filled_in(name: str) -> str:
    """The name with its environment variables. Raises UserError for those that are not set."""
    found = os.path.expandvars(name)
    unset = dict.fromkeys(re.findall(r"\$(?:\w+|\{\w+\})", found))
    if unset and not Path(found).exists():
        raise UserError(
            f"data {name!r}: the environment variable {', '.join(unset)} is not set. Set it to the folder "
            "that holds the data, or name the data by their paths."
        )
    return found


def _load_several(name: str, load: Callable[[str], RankingData]) -> RankingData:
    """Sources joined by `+`, combined. Raises one UserError that names every source that cannot be loaded."""
    parts: dict[str, RankingData] = {}
    limits: dict[str, int] = {}
    problems = []
    wanted = [part.strip() for part in name.split("+")]
    for part in wanted:
        limit = _LIMITED.match(part)
        try:
            if not part:
                raise UserError(f"data {name!r}: a source is missing beside a `+`.")
            if limit and int(limit[2]) < 1:
                raise UserError(f"data {part!r}: keeps {limit[2]} training queries; allowed: @1 or more.")
            data = load(limit[1] if limit else part)
        except UserError as error:
            problems.append(str(error))
            continue
        title = source_name(data.name, parts)
        parts[title] = data
        if limit:
            limits[title] = int(limit[2])
    if problems:
        raise UserError(
            f"{len(problems)} of the {len(wanted)} sources cannot be loaded:\n{listed(problems)}\n"
            "Mend them, or leave them out of data.name."
        )
    return combine(parts, limits)


def load_split_data(name: str, split: str, *, on_bad_row: OnBadRow = "error") -> RankingData:
    """Ranking data to rank a split of. The split `all` is all judged queries of a file, or of a folder with
    judgements of one split: nothing is cut. Raises UserError where there are several splits.
    """
    if split != "all":
        return load_ranking_data(name, on_bad_row=on_bad_row)
    data = load_ranking_data(name, on_bad_row=on_bad_row, dev_fraction=0.0, test_fraction=0.0)
    if len(data.qrels) > 1 and "all" not in data.qrels:
        raise UserError(
            f"{data.name}: --split all is for data of one split, and this has "
            f"{', '.join(sorted(data.qrels))}. Name one of these."
        )
    return data if "all" in data.qrels else replace(data, qrels={"all": next(iter(data.qrels.values()))})


def cut_splits(data: RankingData, dev_fraction: float, test_fraction: float, seed: int) -> RankingData:
    """Cut the splits that `data` lacks from its train split: `test` only when it has no split but train.

    Queries of the same words, or with a relevant passage in common, fall into the same split, so that what is
    cut tells how passages are ranked that no training label names. A group that is larger than a split to be
    cut is parted by query all the same. Where a group goes depends on its own texts and `seed` alone, but for
    what fills a small split up to its share or AT_LEAST queries.
    """
    fractions = {"dev": dev_fraction} if "dev" not in data.qrels else {}
    if set(data.qrels) == {"train"}:
        fractions["test"] = test_fraction
    if "train" not in data.qrels or not fractions:
        return data
    parts: dict[str, Qrels] = {split: {} for split in ("train", *fractions)}
    room = min((share for share in fractions.values() if share > 0), default=0.0) * len(data.qrels["train"])
    spokesmen = _spokesmen(data, int(room))
    part = _parts(spokesmen, fractions, seed)
    for query, text in spokesmen.items():
        parts[part[text]][query] = data.qrels["train"][query]
    empty = [split for split, share in fractions.items() if share > 0 and not parts[split]]
    if empty or not parts["train"]:
        raise UserError(
            f"{data.name}: {len(data.qrels['train'])} training queries are too few to cut "
            f"{', '.join(fractions)} from: some 30 are needed. Give more rows, or a BEIR folder with "
            "judgements for these splits."
        )
    return replace(data, qrels={**data.qrels, **{s: q for s, q in parts.items() if q}})


def _spokesmen(data: RankingData, room: int) -> dict[str, str]:
    """Training query -> the text that decides its split: its group's first; its own above `room`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    train = data.qrels["train"]
    texts = {query: same_words(data.queries[query]) for query in train}
    text_node = {text: n for n, text in enumerate(dict.fromkeys(texts.values()))}
    node: dict[str, int] = {}  # of relevant passages, behind those of the texts
    ties = np.asarray(
        [
            (text_node[texts[query]], node.setdefault(passage, len(text_node) + len(node)))
            for query, grades in train.items()
            for passage, grade in grades.items()
            if grade > 0
        ],
        int,
    ).reshape(-1, 2)
    size = len(text_node) + len(node)
    group = connected_components(coo_array((np.ones(len(ties)), ties.T), (size, size)), directed=False)[1]
    members: dict[int, list[str]] = {}
    for text in texts.values():
        members.setdefault(int(group[text_node[text]]), []).append(text)
    first = {text: min(found) for found in members.values() if len(found) <= room for text in found}
    return {query: first.get(text, text) for query, text in texts.items()}


def _parts(spokesmen: Mapping[str, str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Deciding text -> its split: by its hash; a split that chance leaves too small takes the next ones."""
    sizes = Counter(spokesmen.values())
    digests = {text: hashlib.sha256(f"{seed}:{text}".encode()).hexdigest() for text in sizes}
    place = {text: int(digest[:8], 16) / 2**32 for text, digest in digests.items()}  # in [0, 1)
    part, start = dict.fromkeys(sorted(place, key=place.__getitem__), "train"), 0.0
    for split, share in fractions.items():
        part |= {text: split for text in part if start <= place[text] < start + share}
        start += share
    for split, share in fractions.items():
        lacking = min(AT_LEAST, int(share * len(spokesmen)))
        lacking -= sum(sizes[text] for text in part if part[text] == split)
        for text in [text for text in part if part[text] == "train"]:
            if lacking > 0:
                part[text], lacking = split, lacking - sizes[text]
    return part


# --- BEIR and TREC folders ---


def _load_folder(folder: Path, bad: BadRows, labels: bool = True) -> RankingData:
    corpus_file, queries_file = _one_of(folder, "corpus"), _one_of(folder, "queries")
    qrels_files = _qrels_files(folder)
    missing = [
        what
        for what, found in (
            ("corpus.jsonl[.gz]", corpus_file),
            ("queries.jsonl[.gz]", queries_file),
            ("qrels/<split>.tsv or <split>.qrels", qrels_files or not labels),
        )
        if not found
    ]
    if missing or corpus_file is None or queries_file is None:
        raise UserError(
            f"{folder}: not a BEIR or TREC folder, it lacks {', '.join(missing)}. "
            "Expected corpus.jsonl, queries.jsonl and qrels/<split>.tsv (or <split>.qrels, qrels.txt)."
        )
    corpus = _texts(json_rows(corpus_file, bad), bad, "passage")
    queries = _texts(json_rows(queries_file, bad), bad, "query")
    _refuse_empty(corpus, f"{corpus_file}: the corpus is", bad)
    if qrels_files:
        _refuse_empty(queries, f"{queries_file}: the queries are", bad)
    qrels = {split: _judgements(path, bad, (queries, corpus)) for split, path in qrels_files.items()}
    bad.raise_if_any()
    return RankingData(folder.name, corpus, queries, qrels, dropped=dict(bad.dropped))


def _one_of(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"]
    return next((path for path in found if path.is_file()), None)


def _qrels_files(folder: Path) -> dict[str, Path]:
    """Split name -> file. A bare qrels.txt is `test`: nothing was set aside to train on."""
    files = sorted((folder / "qrels").glob("*.tsv")) or [
        path for pattern in ("*.qrels", "qrels.txt", "qrels.*.txt") for path in sorted(folder.glob(pattern))
    ]
    found: dict[str, Path] = {}
    for path in files:
        first, *others = path.name.split(".")
        split = others[0] if first == "qrels" and len(others) > 1 else first
        split = SPLIT_NAMES.get(split, split)
        if split in found:
            raise UserError(
                f"{found[split]} and {path}: both are judgements of the split {split!r}. Join them, or move "
                "one away."
            )
        found[split] = path
    return found


def _texts(rows: Iterable[tuple[str, Any]], bad: BadRows, what: str) -> dict[str, str]:
    """Id -> text of BEIR rows; the title comes first, joined by one space."""
    found: dict[str, str] = {}
    for where, row in rows:
        fields = row if isinstance(row, Mapping) else {}
        identity, text, title = (
            fields.get("_id", fields.get("id")),
            fields.get("text"),
            fields.get("title", ""),
        )
        if not (isinstance(identity, str | int) and isinstance(text, str) and isinstance(title, str | None)):
            bad.add(where, 'expected an object {"_id", "text", "title"?} of strings', "not a text row")
            continue
        joined = " ".join(part.strip() for part in (title or "", text) if part.strip())
        if not joined:
            bad.add(where, f"{what} {identity!r} is empty", f"empty {what}")
        elif str(identity) in found:
            bad.add(where, f"{what} {identity!r} appears twice", f"repeated {what}")
        else:
            found[str(identity)] = joined
    return found


def _refuse_empty(texts: Mapping[str, str], what: str, bad: BadRows) -> None:
    if not texts:
        bad.raise_if_any()
        raise UserError(f'{what} empty. Give one row {{"_id", "text", "title"?}} for each text.')


def _known(query: str, passage: str, texts: Texts, where: str, bad: BadRows) -> bool:
    """Whether a judgement's query and passage have a text; a bad row otherwise."""
    queries, corpus = texts
    if query in queries and passage in corpus:
        return True
    unknown = f"document {passage!r}" if query in queries else f"query {query!r}"
    bad.add(where, f"unknown {unknown}", "judgement of an unknown id")
    return False


# --- judgements and runs ---


def read_tsv_qrels(path: str | Path) -> Qrels:
    """BEIR judgements `query-id<TAB>corpus-id<TAB>score`, with or without the header. Errors as file:line."""
    return _read_qrels(Path(path), _tsv_judgement)


def read_trec_qrels(path: str | Path) -> Qrels:
    """TREC judgements `query iteration passage grade`; negative grades become 0. Errors as file:line."""
    return _read_qrels(Path(path), _trec_judgement)


def read_qrels(path: str | Path) -> Qrels:
    """Judgements of a file: BEIR form when its name says .tsv, else TREC form. Errors as file:line."""
    path = Path(path)
    return read_tsv_qrels(path) if ".tsv" in path.suffixes else read_trec_qrels(path)


def _read_qrels(path: Path, parse: Callable[[str], tuple[str, str, int]]) -> Qrels:
    bad = BadRows("error")
    qrels = _collect_qrels(path, parse, bad)
    bad.raise_if_any("Mend them.")
    return qrels


def _judgements(path: Path, bad: BadRows, texts: Texts) -> Qrels:
    return _collect_qrels(path, _tsv_judgement if path.suffix == ".tsv" else _trec_judgement, bad, texts)


def _collect_qrels(
    path: Path, parse: Callable[[str], tuple[str, str, int]], bad: BadRows, texts: Texts | None = None
) -> Qrels:
    """Judgements of a file; with `texts`, those of ids that these lack are bad rows."""
    qrels: Qrels = {}
    for number, line in _lines(path):
        if number == 1 and line.split("\t")[0].strip().lower() in ("query-id", "query_id", "qid"):
            continue
        try:
            query, passage, grade = parse(line)
        except ValueError as error:
            bad.add(f"{path}:{number}", str(error), "not a judgement")
            continue
        if texts is not None and not _known(query, passage, texts, f"{path}:{number}", bad):
            continue
        known = qrels.setdefault(query, {}).setdefault(passage, max(grade, 0))
        if known != max(grade, 0):
            problem = f"query {query}, passage {passage} was judged {known} before, here {grade}"
            bad.add(f"{path}:{number}", problem, "a contradicting judgement")
    return qrels


def _tsv_judgement(line: str) -> tuple[str, str, int]:
    fields = line.rstrip("\r").split("\t")
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} tab-separated fields, expected 3: query-id, corpus-id, score")
    return fields[0], fields[1], _grade(fields[2])


def _trec_judgement(line: str) -> tuple[str, str, int]:
    fields = line.split()
    if len(fields) != 4:
        raise ValueError(f"{len(fields)} fields, expected 4: query, iteration, passage, grade")
    return fields[0], fields[2], _grade(fields[3])


def _grade(text: str) -> int:
    try:
        grade = float(text)
        if grade == int(grade) and grade <= MAX_GRADE:
            return int(grade)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"the grade {text.strip()!r} is not a whole number up to {MAX_GRADE}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def read_trec_run(path: str | Path) -> Run:
    """A TREC run, `query Q0 passage rank score tag`, as scores by query and passage. Errors as file:line."""
    path, run, bad = Path(path), Run(), BadRows("error")
    for number, line in _lines(path):
        fields = line.split()
        try:
            query, _, passage, _, score, _ = fields
            if not math.isfinite(float(score)):
                raise ValueError
        except ValueError:
            what = f"expected `query Q0 passage rank score tag` with a number as score, found {line!r}"
            bad.add(f"{path}:{number}", what, "not a run line")
            continue
        if passage in run.setdefault(query, {}):
            bad.add(f"{path}:{number}", f"passage {passage!r} twice for query {query!r}", "repeated passage")
        run[query][passage] = float(score)
    bad.raise_if_any("Mend them.")
    return run


def write_trec_run(run: Run, path: str | Path, tag: str) -> None:
    """Write a run in TREC form, best first, ties by passage id; gzip-compressed when the name ends in .gz.

    Raises UserError for an id with white space, which the format cannot hold.
    """
    lines = []
    for query, scores in run.items():
        ordered = sorted(scores, key=lambda passage: (-scores[passage], passage))
        spaced = [identity for identity in (query, *ordered) if len(identity.split()) != 1]
        if spaced:
            raise UserError(
                f"{path}: the id {spaced[0]!r} is empty or has white space; rename it in the data."
            )
        for rank, passage in enumerate(ordered, 1):
            lines.append(f"{query} Q0 {passage} {rank} {float(scores[passage])!r} {tag}\n")
    raw = "".join(lines).encode()
    Path(path).write_bytes(gzip.compress(raw, mtime=0) if Path(path).suffix == ".gz" else raw)


# --- hub ---


def _is_hub_folder(folder: Path) -> bool:
    """A downloaded hub dataset: Parquet or JSON lines, and no file of the BEIR or TREC layout."""
    beir = _one_of(folder, "corpus") or _one_of(folder, "queries") or _qrels_files(folder)
    return not beir and any(any(folder.rglob(pattern)) for pattern in ("*.parquet", "*.jsonl"))


def _load_hub(name: str, bad: BadRows, cache_dir: str | Path | None) -> RankingData:
    """A hub dataset, `owner/name` or `owner/name:config`, or a local folder of its Parquet or JSON files."""
    datasets = hub_library(name)
    path = Path(name).absolute()
    place, _, config = (name, "", "") if path.exists() else name.partition(":")
    cache = None if cache_dir is None else str(cache_dir)

    def load(repository: str, part: str | None) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        return datasets.load_dataset(repository, part, cache_dir=cache)

    try:
        configs = set() if config else set(datasets.get_dataset_config_names(place))
        if {"corpus", "queries"} <= configs:
            parts = load(place, "corpus"), load(place, "queries")
            qrels = load(place, "default") if "default" in configs else load(f"{place}-qrels", None)
            return _hub_collection(name, *parts, qrels, bad)
        return _hub_triples(name, load(place, config or None), bad)
    except (OSError, ValueError) as error:  # not found, not reachable, or a config that is missing
        raise UserError(
            f"data {name!r}: not found. Tried the path {path} and the hub dataset {place!r} "
            f"({type(error).__name__}: {error}). Check the spelling and the network, or give 'pydocs', "
            "a .jsonl file of triples, or a BEIR folder."
        ) from error


def _hub_triples(name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], bad: BadRows) -> RankingData:
    """Columns query, positive, negative or negative_1, negative_2, ... (sentence-transformers' habit)."""
    triples: dict[str, list[Triple]] = {}
    for split, rows in splits.items():
        found = triples.setdefault(SPLIT_NAMES.get(split, split), [])
        for number, row in enumerate(rows, 1):
            try:
                found.append(parse_triple(_triple_columns(row)))
            except ValueError as error:
                bad.add(f"{name}:{split}:{number}", str(error), "bad triple")
    bad.raise_if_any()
    return triples_data(name, triples, dict(bad.dropped))


def _triple_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for field, names in TRIPLE_COLUMNS.items():
        given = [column for column in names if row.get(column) is not None]
        if len(given) > 1:
            raise ValueError(f"columns {' and '.join(given)} both stand for {field!r}")
        if given:
            columns[field] = row[given[0]]
    negatives = [row[c] for c in row if c.startswith("negative") and row[c] is not None]
    columns["negative"] = [text for n in negatives for text in ([n] if isinstance(n, str) else n)]
    if not {"query", "positive"} <= set(columns):
        raise ValueError(
            f"columns {', '.join(row)}: expected query ({', '.join(TRIPLE_COLUMNS['query'])}) and positive "
            f"({', '.join(TRIPLE_COLUMNS['positive'])})"
        )
    return columns


def _hub_collection(
    name: str,
    corpus: Mapping[str, Iterable[Mapping[str, Any]]],
    queries: Mapping[str, Iterable[Mapping[str, Any]]],
    judgements: Mapping[str, Iterable[Mapping[str, Any]]],
    bad: BadRows,
) -> RankingData:
    """BEIR on the hub: corpus and queries of _id, title, text; judgements query-id, corpus-id, score."""
    passages = _texts(_numbered(f"{name}:corpus", corpus), bad, "passage")
    asked = _texts(_numbered(f"{name}:queries", queries), bad, "query")
    _refuse_empty(passages, f"{name}:corpus: the corpus is", bad)
    _refuse_empty(asked, f"{name}:queries: the queries are", bad)
    qrels: dict[str, Qrels] = {}
    for split, rows in judgements.items():
        found = qrels.setdefault(SPLIT_NAMES.get(split, split), {})
        for where, row in _numbered(name, {split: rows}):
            try:
                grade = max(_grade(str(row["score"])), 0)
                query, passage = str(row["query-id"]), str(row["corpus-id"])
            except (KeyError, ValueError) as error:
                bad.add(where, f"expected query-id, corpus-id, score: {error}", "not a judgement")
                continue
            if _known(query, passage, (asked, passages), where, bad):
                found.setdefault(query, {})[passage] = grade
    bad.raise_if_any()
    return RankingData(name, passages, asked, qrels, dropped=dict(bad.dropped))


def _numbered(
    name: str, splits: Mapping[str, Iterable[Mapping[str, Any]]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for split, rows in splits.items():
        yield from ((f"{name}:{split}:{number}", row) for number, row in enumerate(rows, 1))
