"""Expansion rows: every form, every fault with its line, the original's split, leaks, trimmed hydes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.expansion import (
    ExpansionRow,
    load_expansions,
    parse_row,
    read_queries,
    render_lines,
    trim_hyde,
    without_only,
)
from common.errors import UserError

GOOD = {"query": "ssh keys", "output": [["lex", "ssh key pair"], ["vec", "how to make ssh keys"]]}
LINES = (("hyde", "a text"), ("lex", "some words"), ("vec", "a sentence"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(query: str) -> dict[str, Any]:
    return {"query": query, "output": [["lex", f"{query} words"]]}


@pytest.mark.parametrize(
    "given",
    [
        {"query": " q ", "output": [["vec", "a sentence"], ["lex", "some words "], ["hyde", "a text"]]},
        {"input": "q", "output": "lex: some words\nvec: a sentence\n\nhyde: a text"},
        {
            "query": "q",
            "searches": [
                {"type": "lex", "query": "some words"},
                {"type": "hyde", "query": "a text"},
                {"type": "vec", "query": "a sentence"},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": "/no_think Expand this search query: q"},
                {"role": "assistant", "content": "hyde: a text\nlex: some words\nvec: a sentence"},
            ]
        },
        {
            "prompt": "<|im_start|>user\n/no_think Expand this search query: q<|im_end|>\n",
            "completion": "<think>\n\n</think>\n\nhyde: a text\nlex: some words\nvec: a sentence<|im_end|>",
        },
    ],
)
def test_every_form_gives_the_same_row_in_the_order_of_targets(given: dict[str, Any]) -> None:
    assert parse_row(given) == ExpansionRow("q", LINES)


def test_intent_comes_from_its_field_or_from_the_prompt() -> None:
    assert parse_row({**GOOD, "intent": "remote\n login"}).intent == "remote login"
    prompt = "/no_think Expand this search query: rust\nQuery intent: the language<|im_end|>"
    found = parse_row({"prompt": prompt, "completion": "lex: rust language"})
    assert (found.query, found.intent) == ("rust", "the language")


BAD_ROWS = [
    ([], "expected an object, found list"),
    ({"output": []}, "no query: expected 'query' or 'input'"),
    ({"query": " ", "output": [["lex", "a"]]}, "'query' must be a text that is not blank"),
    ({"query": "q", "output": []}, "the expansion has no line"),
    ({"query": "q"}, "'output' must be a list of [type, text]"),
    ({"query": "q", "output": [["lex"]]}, "line 1 of 'output' must be [type, text]"),
    ({"query": "q", "output": [["lex", "a"], ["kex", "b"]]}, "unknown type 'kex'; allowed: hyde, lex, vec"),
    ({"query": "q", "output": [[["lex"], "b"]]}, "unknown type ['lex']"),
    ({"query": "q", "output": [["vec", "  "]]}, "the text of a vec line must be a text that is not blank"),
    ({"query": "q", "output": [["vec", 3]]}, "the text of a vec line must be a text"),
    ({"query": "q", "output": [["vec", "a\nb"]]}, "the text of a vec line has a line break"),
    ({"query": "q", "output": [["lex", "a <|im_end|>"]]}, "has the control token <|im_end|>"),
    ({"query": "a <think>", "output": [["lex", "a"]]}, "'query' has the control token <think>"),
    ({"query": "q", "output": [["lex", "a"]], "intent": 3}, "'intent' must be a text"),
    ({"query": "q", "searches": ["lex"]}, 'search 1 must be {"type", "query"}'),
    ({"input": "q", "output": "lex: a\nno type here"}, "the line 'no type here' has no type"),
    ({"messages": [{"role": "user", "content": "Expand this search query: q"}]}, "one message of the"),
]  # fmt: skip


@pytest.mark.parametrize("given, what", BAD_ROWS)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path: Path, given: Any, what: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, "", given])
    with pytest.raises(UserError) as caught:
        load_expansions(str(path))
    assert f"{path}:3: " in str(caught.value) and what in str(caught.value)
    assert "on_bad_row=skip" in str(caught.value)


def test_all_bad_rows_are_reported_up_to_twenty_or_skipped_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, *[{"query": "q"}] * 22, "]"])
    with pytest.raises(UserError) as caught:
        load_expansions(str(path))
    message = str(caught.value)
    assert message.startswith("23 bad row(s)")
    assert f"{path}:21: " in message and f"{path}:22: " not in message and "and 3 more" in message
    data = load_expansions(str(path), on_bad_row="skip", val_fraction=0.0)
    assert len(data.train) == 1 and data.dropped["bad row"] == 22 and data.dropped["not JSON"] == 1


def test_the_first_row_of_a_query_wins_case_ignored_over_sorted_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"query": "SSH Keys ", "output": [["lex", "second"]]}, row("other")])
    write_rows(tmp_path / "a.jsonl", [GOOD])
    for name in (str(tmp_path), str(tmp_path / "*.jsonl")):
        data = load_expansions(name, val_fraction=0.0)
        assert [r.query for r in data.train] == ["ssh keys", "other"]
        assert data.train[0].lines[0] == ("lex", "ssh key pair")
        assert data.dropped["a query that an earlier row has"] == 1


def test_a_prepared_folder_keeps_its_split_and_loses_what_is_in_both(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [row("one"), row("two")])
    write_rows(tmp_path / "val.jsonl", [row("three"), row("Two")])
    write_rows(tmp_path / "train_chat.jsonl", ["not read"])
    data = load_expansions(str(tmp_path))
    assert [r.query for r in data.train] == ["one", "two"] and [r.query for r in data.val] == ["three"]


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(f"query {n}") for n in range(50)])
    first, again = load_expansions(str(path)), load_expansions(str(path))
    other = load_expansions(str(path), seed=7)
    assert first == again and len(first.train) == 45 and len(first.val) == 5
    assert set(first.val) != set(other.val)
    assert {r.query for r in (*first.train, *first.val)} == {f"query {n}" for n in range(50)}


def test_evaluation_queries_are_removed_whatever_their_only_suffix_and_reported(tmp_path: Path) -> None:
    queries = ["auth setup", "Auth  Setup only: lex", "auth setup /only:vec", "auth setups", "other"]
    path = write_rows(tmp_path / "rows.jsonl", [row(query) for query in queries])
    data = load_expansions(str(path), held_out=["Auth setup", "else"], val_fraction=0.0)
    assert [r.query for r in data.train] == ["auth setups", "other"]
    assert set(data.leaked) == set(queries[:3])
    assert data.dropped["an evaluation query"] == 1
    assert data.dropped["an evaluation query but for /only"] == 2
    assert "auth setup /only:vec" in data.summary()


def test_hydes_are_cut_to_what_the_score_pays_for(tmp_path: Path) -> None:
    sentence = "This sentence is of some length, so that three of them are too many for the limit."
    assert trim_hyde(" ".join([sentence] * 3)) == f"{sentence} {sentence}"
    assert trim_hyde("Short.") == "Short."
    words = "word " * 60
    assert trim_hyde(words) == ("word " * 40).strip()
    assert trim_hyde("x" * 300) == "x" * 200
    assert trim_hyde("Too short. " + "y" * 300) == "Too short."
    long = {"query": "q", "output": [["hyde", words.strip()], ["vec", words.strip()]]}
    path = write_rows(tmp_path / "rows.jsonl", [long])
    lines = load_expansions(str(path), trim_hyde=True, val_fraction=0.0).train[0].lines
    assert [len(text) for _, text in lines] == [199, 299]


def test_queries_are_read_with_their_groups(tmp_path: Path) -> None:
    path = tmp_path / "queries.txt"
    path.write_text(
        "# About\n# this file\n\n# Short (one word)\n# more of it\nauth\nconfig\n\n# Long - many\nhow to x\n"
    )
    found = [(query.query, query.category) for query in read_queries(path)]
    assert found == [("auth", "Short"), ("config", "Short"), ("how to x", "Long")]
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="no query"):
        read_queries(path)


def test_every_spelling_of_only_is_known() -> None:
    for suffix in (" /only:lex", " only: vec", " only:hyde", "  /ONLY:Lex "):
        assert without_only(f"ssh keys{suffix}") == "ssh keys"
    assert without_only("read only: files") == "read only: files"


def test_rendered_lines_parse_back() -> None:
    assert parse_row({"input": "q", "output": render_lines(LINES)}).lines == LINES
    assert not render_lines(LINES).endswith("\n")


@pytest.mark.parametrize(
    "name, what",
    [
        ("nowhere.jsonl", "no file or folder"),
        ("data/train", "no file or folder"),
        ("nothing*.jsonl", "no file or folder"),
    ],
)
def test_data_that_is_not_there_is_named(name: str, what: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=what) as caught:
        load_expansions(name)
    assert "'generated'" in str(caught.value)


def test_an_empty_folder_and_a_wrong_fraction_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \.jsonl file"):
        load_expansions(str(tmp_path))
    with pytest.raises(UserError, match=r"val_fraction is 1.0; allowed: 0 <= val_fraction < 1"):
        load_expansions("generated", val_fraction=1.0)


def test_a_hub_dataset_is_read_by_name_with_its_splits(monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    chat = {
        "text": "ignored",
        "messages": [
            {"role": "user", "content": "/no_think Expand this search query: from chat"},
            {"role": "assistant", "content": "lex: words from chat"},
        ],
        "query": None,
        "output": None,
    }
    own = {"text": None, "messages": None, "query": "from text", "output": "lex: words of text"}
    asked = []

    def load_dataset(name: str) -> Any:
        asked.append(name)
        return {
            "train": datasets.Dataset.from_list([chat, own]),
            "validation": datasets.Dataset.from_list([{"query": "v", "output": "lex: v words"}]),
            "extra": datasets.Dataset.from_list([{"query": "x", "output": "kex: x"}]),
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_expansions("tobil/qmd-query-expansion-train-v2")
    assert asked == ["tobil/qmd-query-expansion-train-v2"]
    assert [r.query for r in data.train] == ["from chat", "from text"] and [r.query for r in data.val] == [
        "v"
    ]
    with pytest.raises(UserError, match="no split 'nope'; it has train, validation, extra"):
        load_expansions("owner/name", split="nope")
    with pytest.raises(UserError, match="owner/name:extra:1: unknown type 'kex'"):
        load_expansions("owner/name", eval_split="extra")


def test_a_hub_dataset_that_cannot_be_had_says_what_was_tried(monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hub dataset \(ConnectionError: no network\)"):
        load_expansions("owner/name")


def test_a_folder_of_parquet_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets.Dataset.from_list([row("one"), row("two")]).to_parquet(tmp_path / "data" / "train.parquet")
    data = load_expansions(str(tmp_path / "data"), val_fraction=0.0)
    assert [r.query for r in data.train] == ["one", "two"]


def test_the_originals_data_gives_the_originals_split(data_dir: Path) -> None:
    folder = data_dir / "qmd"
    if not folder.is_dir():
        pytest.skip(f"no QMD data at {folder}")
    data = load_expansions(str(folder / "finetune-data"))
    assert (len(data.train), len(data.val)) == (2806, 312)
    queries = [query.query for query in read_queries(folder / "evals" / "queries.txt")]
    assert len(queries) == 51
    clean = load_expansions(str(folder / "finetune-data"), held_out=queries)
    assert clean.dropped["an evaluation query"] == 22
    asked = {r.query.lower() for r in (*clean.train, *clean.val)}
    assert not asked & {query.lower() for query in queries}
    assert len(clean.train) + len(clean.val) + len(clean.leaked) == 3118
