"""The generated rows: the same each time, sound, no topic on both sides, and worth expanding for."""

from __future__ import annotations

from common.data.expansion import load_expansions, parse_row, without_only
from common.data.generated import generated_collection, generated_queries, generated_rows
from common.data.records import same_words
from common.data.sources import load_ranking_data


def test_rows_are_the_same_each_time_and_valid() -> None:
    train, val = generated_rows()
    assert (train, val) == generated_rows()
    assert len(train) > 400 and len(val) > 80
    for row in (*train, *val):
        again = parse_row({"query": row.query, "output": [list(line) for line in row.lines]})
        assert again.lines == row.lines
    data = load_expansions("generated")
    assert data.train == tuple(train) and data.val == tuple(val)  # nothing repeated, nothing cut


def test_no_query_is_trained_on_and_held_out() -> None:
    train, val = generated_rows()
    asked = {same_words(without_only(row.query)) for row in train}
    assert not asked & {same_words(without_only(row.query)) for row in val}
    queries = [same_words(without_only(query.query)) for query in generated_queries()]
    assert not asked & set(queries)
    assert {"entity", "negation", "/only", "CJK"} <= {query.category for query in generated_queries()}


def test_only_rows_have_lines_of_that_type_alone() -> None:
    rows = [row for row in generated_rows()[0] if row.category == "/only"]
    assert {row.query.rpartition(":")[2] for row in rows} == {"lex", "vec", "hyde"}
    assert all({kind for kind, _ in row.lines} == {row.query.rpartition(":")[2]} for row in rows)


def test_the_collection_judges_the_validation_topics_in_test() -> None:
    data = generated_collection()
    assert data == generated_collection() and len(data.qrels["test"]) >= 60
    held = {row.query for row in generated_rows()[1]}
    trained = {row.query for row in generated_rows()[0]}
    assert {data.queries[query] for query in data.qrels["test"]} <= held
    assert {data.queries[query] for query in data.qrels["train"]} <= trained


def test_passages_lack_the_words_that_queries_have() -> None:
    data = generated_collection()
    for query, grades in data.split("test").items():
        action, thing = data.queries[query].removeprefix("how to ").replace(" the ", " ").split()
        words = data.corpus[next(iter(grades))].lower().split()
        assert thing not in words and action not in words[:6]


def test_the_collection_is_ranking_data_by_name() -> None:
    data = load_ranking_data("generated")
    whole = generated_collection()
    assert data.corpus == whole.corpus and data.qrels["test"] == whole.qrels["test"]
    assert set(data.qrels["train"]) | set(data.qrels["dev"]) == set(whole.qrels["train"])
