"""What is stored of searches and feedback: it comes back, in its time range, from every thread."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from common.errors import UserError
from common.service.feedback import Feedback, FeedbackStore, Scored

FIRST, SECOND = (Scored("a", 2.0), Scored("b", 1.0)), (Scored("b", 0.7), Scored("ü#2", 0.1))


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    return FeedbackStore(tmp_path / "logs" / "feedback.sqlite")


def test_a_search_comes_back_as_it_was_stored(store: FeedbackStore) -> None:
    seconds = {"retrieve": 0.01, "rerank": 0.2}
    one = store.record_search(
        "wörter", FIRST, SECOND, latency=seconds, cache_hit=True, fallback="late", at=5.0
    )
    found = FeedbackStore(store.path).search(one)
    assert found is not None and (found.id, found.time, found.query) == (one, 5.0, "wörter")
    assert (found.first_stage, found.reranked) == (FIRST, SECOND)
    assert (found.latency, found.cache_hit, found.fallback) == (seconds, True, "late")
    assert store.search("unknown") is None


def test_both_tables_are_read_by_time(store: FeedbackStore) -> None:
    made = [store.record_search(f"query {n}", FIRST, at=float(n)) for n in range(2500)]
    for n in (3, 1, 2):
        store.record_feedback(made[n], "a", 1, at=10.0 + n)
    assert [item.query for item in store.searches(10, 13)] == ["query 10", "query 11", "query 12"]
    assert [item.time for item in store.searches()] == [float(n) for n in range(2500)]
    assert [item.search for item in store.feedback()] == [made[1], made[2], made[3]]
    assert [item.time for item in store.feedback(12.0, 13.0)] == [12.0]


def test_searches_of_one_moment_are_all_read_once(store: FeedbackStore) -> None:
    made = {store.record_search("q", FIRST, at=7.0) for _ in range(1500)}  # more than a block
    found = [item.id for item in store.searches(7.0, 8.0)]
    assert len(found) == 1500 and set(found) == made


def test_the_last_word_of_a_passage_counts(store: FeedbackStore) -> None:
    one = store.record_search("q", FIRST, SECOND)
    store.record_feedback(one, "ü#2", 1, at=1.0)
    store.record_feedback(one, "ü#2", -1, at=2.0)
    assert list(store.feedback()) == [Feedback(one, "ü#2", -1, 2.0)]


@pytest.mark.parametrize(
    ("search", "document", "value", "said"),
    [
        ("", "a", 0, "allowed: 1 and -1"),
        ("", "a", True, "allowed: 1 and -1"),
        ("", "c", 1, "gave no passage 'c'"),
        ("nothing", "a", 1, "no search 'nothing' is known"),
    ],
)
def test_feedback_that_means_nothing_is_refused(
    store: FeedbackStore, search: str, document: str, value: int, said: str
) -> None:
    known = store.record_search("q", FIRST)
    with pytest.raises(UserError, match=said):
        store.record_feedback(search or known, document, value)
    assert list(store.feedback()) == []


def test_threads_write_at_once_and_nothing_is_lost(store: FeedbackStore) -> None:
    def write(number: int) -> None:
        for n in range(20):
            store.record_feedback(store.record_search(f"{number} {n}", FIRST), "b", -1)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {item.query for item in store.searches()} == {f"{a} {b}" for a in range(8) for b in range(20)}
    assert len(list(store.feedback())) == 160


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, foreign = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("no database, but a text that someone needs " * 30)
    with sqlite3.connect(foreign) as sql:
        sql.execute("create table theirs (a)")
    before = text.read_text()
    for path in (text, foreign, text / "below"):
        with pytest.raises(UserError, match=str(path)):
            FeedbackStore(path)
    assert text.read_text() == before


def test_closed_connections_are_opened_again(store: FeedbackStore) -> None:
    one = store.record_search("q", FIRST)
    store.close()
    assert store.search(one) is not None
