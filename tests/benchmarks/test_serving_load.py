"""The load benchmark counts what it must: wrong answers, other errors and growing memory fail it."""

from __future__ import annotations

import pytest

from benchmarks.serving_load import Counts, _options, difference, summary

BODY = {"query": "q"}
RERANKED = [{"index": 0, "score": 1.0}, {"index": 1, "score": 0.5}]
SEARCHED = {"query": "q", "hits": [{"id": "a", "reranker": 2.0}], "first_stage": [{"id": "a"}, {"id": "b"}]}


def test_an_answer_of_another_request_is_seen() -> None:
    assert difference("/rerank", BODY, RERANKED, RERANKED[::-1]) == ""
    assert difference("/rerank", BODY, RERANKED, [{"index": 0, "score": 1.0}, {"index": 1, "score": 0.9}])
    assert difference("/search", BODY, SEARCHED, SEARCHED) == ""
    for other in (
        {"query": "other"},
        {"first_stage": [{"id": "b"}, {"id": "a"}]},
        {"hits": [{"id": "a", "reranker": 3.0}]},
    ):
        assert difference("/search", BODY, SEARCHED, SEARCHED | other)
    fallback = SEARCHED | {"hits": [{"id": "a", "reranker": None}]}
    assert difference("/search", BODY, SEARCHED, fallback) == ""


@pytest.mark.parametrize(
    ("status", "wrong", "late", "passed"),
    [("503", [], 105, True), ("500", [], 100, False), ("503", ["x"], 100, False), ("503", [], 150, False)],
)
def test_only_503_is_forgiven(status: str, wrong: list[str], late: int, passed: bool) -> None:
    counts = Counts(wrong=wrong, seconds={"/search": [0.1]})
    counts.statuses.update(["200", status])
    assert summary(counts, [100] * 6 + [late] * 2, _options([]))["passed"] is passed
