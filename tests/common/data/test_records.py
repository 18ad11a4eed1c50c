"""Ranking data: its checks, its fingerprint, and the JSON triples format with its bad rows."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.data.records import RankingData, parse_triples, triples_data
from common.errors import UserError

GOOD = {"query": "sort a list", "positive": "list.sort orders in place", "negative": ["open a file"]}


def small_data() -> RankingData:
    return RankingData(
        name="small",
        corpus={"p1": "one", "p2": "two", "p3": "three"},
        queries={"q1": "first", "q2": "second"},
        qrels={"train": {"q1": {"p1": 1, "p2": 0}}, "test": {"q2": {"p3": 2}}},
    )


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_fingerprint_ignores_order_and_name() -> None:
    data = small_data()
    corpus, qrels = dict(reversed(data.corpus.items())), dict(reversed(data.qrels.items()))
    other = replace(data, name="other", corpus=corpus, qrels=qrels)
    assert other.fingerprint == data.fingerprint
    assert len(data.fingerprint) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": {"p1": "one!", "p2": "two", "p3": "three"}},
        {"queries": {"q1": "first", "q2": "second?"}},
        {"qrels": {"train": {"q1": {"p1": 1, "p2": 1}}, "test": {"q2": {"p3": 2}}}},
        {"negatives": {"q1": ("p2",)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_changes_with_content(change: dict[str, Any]) -> None:
    assert replace(small_data(), **change).fingerprint != small_data().fingerprint


def test_unknown_split_names_those_there_are() -> None:
    assert small_data().split("test") == {"q2": {"p3": 2}}
    with pytest.raises(UserError, match=r"no split 'dev'.*test, train\..*data\.dev_split.*--split") as caught:
        small_data().split("dev")
    assert "no-evaluate-test" not in str(caught.value)  # no way out for dev, nor a flag of every command


def test_qrels_of_unknown_documents_are_listed_up_to_twenty() -> None:
    grades = {"p1": 1} | {f"missing{n}": 1 for n in range(25)}
    with pytest.raises(UserError) as caught:
        replace(small_data(), qrels={"test": {"q1": grades, "q9": {"p1": 1}}}).validate()
    message = str(caught.value)
    assert "26 problem(s)" in message
    assert message.count("unknown document 'missing") == 20
    assert "and 6 more" in message


def test_qrels_of_an_unknown_query_are_refused() -> None:
    with pytest.raises(UserError, match="qrels 'test': unknown query 'q9'"):
        replace(small_data(), qrels={"test": {"q9": {"p1": 1}}}).validate()


@pytest.mark.parametrize("qrels", [{}, {"q1": {"p1": 0}}], ids=["empty", "only zeros"])
def test_split_without_a_positive_is_refused(qrels: dict[str, dict[str, int]]) -> None:
    with pytest.raises(UserError, match="split 'dev': no query has a passage with a grade above 0") as caught:
        replace(small_data(), qrels={"dev": qrels}).validate()
    assert "on-bad-row" not in str(caught.value)  # leaving rows out gives no positive


def test_queries_of_the_same_words_in_two_splits_are_counted() -> None:
    assert small_data().shared_queries("train", "test") == 0
    data = replace(small_data(), queries={"q1": "Sort a  list", "q2": "sort a list"})
    assert data.shared_queries("train", "test") == 1


def test_empty_passages_and_queries_are_refused() -> None:
    broken = replace(small_data(), corpus={**small_data().corpus, "p2": " \n"}, queries={"q1": "", "q2": "x"})
    with pytest.raises(UserError) as caught:
        broken.validate()
    assert "passage 'p2': the text is empty" in str(caught.value)
    assert "query 'q1': the text is empty" in str(caught.value)


def test_negatives_of_unknown_passages_are_refused() -> None:
    with pytest.raises(UserError, match="negatives of 'q1': unknown passage 'p7'"):
        replace(small_data(), negatives={"q1": ("p7",)}).validate()


def test_jsonl_and_array_hold_the_same_triples(tmp_path: Path) -> None:
    rows = [GOOD, {"query": "read", "positive": ["a", "b"], "scores": [2, 1]}]
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=2))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    triples, dropped = parse_triples(lines)
    assert dropped == {}
    assert parse_triples(array)[0] == triples == parse_triples(packed)[0]
    assert triples[1].positives == ("a", "b") and triples[1].grades == (2, 1)


def test_rows_of_one_query_are_merged_and_its_positives_are_no_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "a", "negative": ["b", "c"]},
        {"query": "q", "positive": ["b", "b"], "scores": [1, 3]},
    ]
    triples, _ = parse_triples(write_rows(tmp_path / "rows.jsonl", rows))
    data = triples_data("rows", {"train": triples}, {}).validate()
    [query] = data.queries
    grades = {data.corpus[p]: grade for p, grade in data.qrels["train"][query].items()}
    assert grades == {"a": 1, "b": 3}
    assert [data.corpus[p] for p in data.negatives[query]] == ["c"]


BAD_ROWS: list[tuple[Any, str]] = [
    ("{not json", "not JSON"),
    (["list"], "expected an object, found list"),
    ({"positive": "a"}, "'query' must be a text that is not empty"),
    ({"query": " ", "positive": "a"}, "'query' must be a text that is not empty"),
    ({"query": "q"}, "'positive' has no passage"),
    ({"query": "q", "positive": []}, "'positive' has no passage"),
    ({"query": "q", "positive": ["a", ""]}, "'positive' holds an empty passage"),
    ({"query": "q", "positive": 3}, "'positive' must be a text or a list of texts"),
    ({"query": "q", "positive": "a", "negative": [None]}, "'negative' must be a text or a list of texts"),
    ({"query": "q", "positive": "a", "negative": "a"}, "passage 'a' is both positive and negative"),
    ({"query": "q", "positive": "a", "negatives": "b"}, "unknown field 'negatives'"),
    ({"query": "q", "positive": "a", "scores": [1, 2]}, "'scores' must be 1 whole number"),
    ({"query": "q", "positive": "a", "scores": [0]}, "'scores' must be 1 whole number"),
    ({"query": "q", "positive": "a", "scores": [3e9]}, "'scores' must be 1 whole number(s) from 1 to 1000"),
    (f'{{"query": "q", "positive": {"1" * 5000}}}', "not JSON: a number has too many digits"),
    ("[" * 100_000, "not JSON: brackets are nested too deep"),
    ({"query": "q", "positive": "a", "scores": [True]}, "'scores' must be 1 whole number"),
    ({"query": "q", "positive": "a", "positive_scores": [1, 2]}, "'positive_scores' must be 1 number"),
    ({"query": "q", "positive": "a", "negative_scores": "high"}, "'negative_scores' must be 0 number"),
]


@pytest.mark.parametrize("row, what", BAD_ROWS)
def test_bad_row_is_reported_with_file_and_line(tmp_path: Path, row: Any, what: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, "", row])
    with pytest.raises(UserError) as caught:
        parse_triples(path)
    assert f"{path}:3: {what}" in str(caught.value)
    assert "--data.on-bad-row skip" in str(caught.value)


def test_all_bad_rows_are_reported_up_to_twenty(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, *[{"query": "q"}] * 23, "]"])
    with pytest.raises(UserError) as caught:
        parse_triples(path)
    message = str(caught.value)
    assert message.startswith("24 bad row(s)")
    assert f"{path}:2: " in message and f"{path}:21: " in message
    assert f"{path}:22: " not in message and "and 4 more" in message


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"query": "q"}, "]", {"query": "", "positive": "a"}])
    triples, dropped = parse_triples(path, on_bad_row="skip")
    assert len(triples) == 1
    assert dropped == {"bad triple": 2, "not JSON": 1}


def test_bad_row_of_a_json_array_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"query": "a",\n  "positive": "b"},\n\n {"query": "c"}\n]\n')
    with pytest.raises(UserError, match=r"rows\.json:5: 'positive' has no passage"):
        parse_triples(path)


@pytest.mark.parametrize(
    "value, what", [("1" * 5000, "a number has too many digits"), ("[" * 100_000, "nested too deep")]
)
def test_a_value_of_a_json_array_that_python_cannot_hold_has_its_line(
    tmp_path: Path, value: str, what: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f'[\n {{"query": "a", "positive": "b"}},\n {{"query": {value}}}\n]\n')
    with pytest.raises(UserError, match=rf"rows\.json:3: not JSON: .*{what}"):
        parse_triples(path, "skip")


def test_broken_json_array_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"query": "a", "positive": "b"},\n {"query" "c"}\n]\n')
    with pytest.raises(UserError, match=r"rows\.json:3: not a JSON array"):
        parse_triples(path)


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("empty.jsonl", b"\n", "no usable row"),
        ("latin.jsonl", b'{"query": "caf\xe9"}', "not UTF-8 at byte 14"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"query": "q", "positive": "p"}\n' * 50, mtime=0)[:-20],
            "cannot be read",
        ),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{what}"):
        parse_triples(path)


def test_unknown_choice_for_bad_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on_bad_row is 'ignore'; allowed: 'error', 'skip'"):
        parse_triples(tmp_path / "rows.jsonl", on_bad_row="ignore")  # type: ignore[arg-type]


def test_half_a_character_is_a_bad_row_and_a_whole_one_is_not(tmp_path: Path) -> None:
    lines = ['{"query": "\\ud83d\\ude00", "positive": "a"}', '{"query": "\\ud83d", "positive": "a"}']
    for name, text in (("rows.jsonl", "\n".join(lines)), ("rows.json", "[" + ",\n".join(lines) + "]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}:2: half a character"):
            parse_triples(tmp_path / name)
        triples, dropped = parse_triples(tmp_path / name, "skip")
        assert [triple.query for triple in triples] == ["😀"] and dropped == {"not Unicode": 1}
