"""Monitoring: values that can be checked by hand, a fall that is seen, chance that is not, hard cases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from common.data.records import parse_triples
from common.errors import UserError
from common.service.feedback import FeedbackStore, Scored, Search
from common.service.monitoring import DAY, hard_cases, judge, monitor, monitoring_page, monitoring_tables

NOW = 1_760_000_000.0


def store_of(path: Path, weeks: dict[int, list[int]], words: int = 3) -> FeedbackStore:
    """Week (0 the last) -> for each search the rank (from 1) of the liked passage, among five."""
    store = FeedbackStore(path)
    for week, ranks in weeks.items():
        for number, rank in enumerate(ranks):
            at = NOW - week * 7 * DAY - 1000 - number
            order = [Scored(f"p{place}", 5.0 - place) for place in range(1, 6)]
            search = store.record_search(
                " ".join(["word"] * words),
                order[::-1],
                order,
                latency={"retrieve": 0.01, "total": 0.02 + 0.001 * number},
                cache_hit=number % 2 == 0,
                fallback="reranker past its deadline" if number == 0 else None,
                at=at,
            )
            store.record_feedback(search, f"p{rank}", 1, at=at + 1)
    return store


def test_values_of_a_window(tmp_path: Path) -> None:
    store = store_of(tmp_path / "f.sqlite", {0: [1, 2, 2, 4]})
    silent = store.record_search("nobody judged", [Scored("p1", 1.0)], at=NOW - 5)
    store.record_feedback(silent, "p1", -1, at=NOW - 4)
    (window,) = monitor(store, until=NOW).windows
    assert (window.searches, window.judged) == (5, 4)
    assert window.ndcg == pytest.approx((1 + 2 / math.log2(3) + 1 / math.log2(5)) / 4)
    assert window.mrr == pytest.approx((1 + 0.5 + 0.5 + 0.25) / 4)
    assert window.mrr_interval is not None and window.mrr_interval[0] < window.mrr < window.mrr_interval[1]
    assert window.liked == 0.8 and window.cache_hits == 0.4 and window.fallbacks == 0.2
    assert window.latency["total"]["p50"] == pytest.approx(21.5) and window.latency["retrieve"]["p99"] == 10.0


def test_windows_are_cut_by_time(tmp_path: Path) -> None:
    found = monitor(store_of(tmp_path / "f.sqlite", {0: [1], 2: [1, 2]}), until=NOW)
    assert [(w.searches, w.ndcg is None) for w in found.windows] == [(2, False), (0, True), (1, False)]
    assert found.windows[-1].end == NOW and found.windows[0].begin == NOW - 21 * DAY
    assert found.fallbacks == {"reranker past its deadline": 2}


def test_a_fall_is_seen_and_chance_is_not(tmp_path: Path) -> None:
    good, bad = [1] * 50 + [2] * 10, [1] * 20 + [3] * 40
    fallen = monitor(store_of(tmp_path / "a.sqlite", {1: good, 0: bad}), until=NOW).verdict
    assert fallen.verdict == "retrain" and fallen.fall is not None and fallen.fall > 0.05
    assert fallen.p is not None and fallen.p < 0.01
    same = monitor(store_of(tmp_path / "b.sqlite", {1: good, 0: good}), until=NOW).verdict
    assert same.verdict == "fine" and same.fall == pytest.approx(0.0)
    better = monitor(store_of(tmp_path / "c.sqlite", {1: bad, 0: good}), until=NOW).verdict
    assert better.verdict == "fine" and better.fall is not None and better.fall < 0
    # a fall of 6 % over a spread that large is within chance
    spread = monitor(store_of(tmp_path / "d.sqlite", {1: [1, 5] * 20, 0: [1, 5] * 16 + [5] * 6}), until=NOW)
    assert spread.verdict.verdict == "watch" and spread.verdict.p is not None and spread.verdict.p > 0.05
    few = monitor(store_of(tmp_path / "e.sqlite", {1: good, 0: bad[:29]}), until=NOW).verdict
    assert few.verdict == "too few" and "29 judged searches in the last window and 60 before" in few.why


def test_the_test_seldom_cries_without_a_cause(tmp_path: Path) -> None:
    """Of 20 pairs of weeks from one distribution the test rejects about one; half of them would be broken."""
    rng = np.random.default_rng(7)
    cries = 0
    for _ in range(20):
        values = {str(n): float(1 / math.log2(1 + rng.integers(1, 6))) for n in range(80)}
        made = [Search(name, 0.0, "q", (), (), {}, False, None) for name in values]
        cries += judge(made[:40], made[40:], values).verdict == "retrain"
    assert cries <= 4


def test_drift_of_query_lengths(tmp_path: Path) -> None:
    store = store_of(tmp_path / "f.sqlite", {1: [1] * 40})
    store_of(tmp_path / "f.sqlite", {0: [1] * 40}, words=9)
    drift = {item.what: item for item in monitor(store, until=NOW).drift}
    assert drift["words of a query"].drifted and drift["words of a query"].now == 9.0
    assert not drift["reranked score of the first hit"].drifted


def test_hard_cases_are_rows_that_training_takes(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite")
    order = [Scored(name, 1.0) for name in ("a", "b", "c", "d")]

    def search(query: str, **votes: int) -> None:
        identity = store.record_search(query, order, at=NOW)
        for document, value in votes.items():
            store.record_feedback(identity, document, value)

    search("late", c=1)  # a and b stood above it
    search("disliked", a=1, d=-1)
    search("disliked", b=1, a=-1)  # another user: what one likes is no negative
    search("right", a=1)
    search("nothing liked", a=-1)
    search("gone", d=1, a=-1)
    texts = {name: f"text {name}" for name in "abc"} | {"d": "text d"}
    rows, lost = hard_cases(list(store.searches()), list(store.feedback()), texts)
    assert {row["query"]: (set(row["positive"]), set(row["negative"])) for row in rows} == {
        "late": ({"text c"}, {"text a", "text b"}),
        "disliked": ({"text a", "text b"}, {"text d"}),
        "gone": ({"text d"}, {"text a", "text b", "text c"}),
    }
    assert lost == 0
    rows, lost = hard_cases(list(store.searches()), list(store.feedback()), {"a": "x", "b": "y", "c": "z"})
    assert lost == 2 and [row["query"] for row in rows] == ["late"]
    path = tmp_path / "hard.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    triples, _ = parse_triples(path)
    assert triples[0].query == "late" and len(triples[0].negatives) == 2


def test_the_page_is_whole(tmp_path: Path) -> None:
    found = monitor(store_of(tmp_path / "f.sqlite", {1: [1] * 40, 0: [3] * 40}), until=NOW)
    assert monitoring_tables(found)[0]["title"] == "Quality: retrain"
    shown = monitoring_page(found)
    assert "<h1>Retrain</h1>" in shown and shown.count("<svg") == 2 and "http" not in shown.split("<svg")[0]
    assert found.json()["verdict"]["verdict"] == "retrain"


def test_what_cannot_be_watched_is_said(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite")
    with pytest.raises(UserError, match="no searches yet"):
        monitor(store)
    store_of(tmp_path / "f.sqlite", {0: [1], 50: [1]})
    with pytest.raises(UserError, match="days is 0"):
        monitor(store, days=0)
    with pytest.raises(UserError, match=r"makes [\d,]+ windows"):
        monitor(store, days=1e-3, until=NOW)
