"""scripts/monitor.py as a user types it, over an index of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.rag import RAGPipeline
from common.service.feedback import FeedbackStore, Scored
from common.service.monitoring import DAY
from scripts import monitor

PASSAGES = [{"id": f"d{n}", "title": "T", "text": f"passage {n} of some words"} for n in range(5)]


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """A folder as a service leaves it: an index, and searches of two weeks, of which the last one was bad."""
    rag = RAGPipeline("bm25", index_dir=tmp_path / "index", say=lambda _: None)
    rag.index_documents([*PASSAGES, {"id": "long#1", "text": "A sentence of its own. " * 60}])
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    for week, liked in ((1, "d0"), (0, "d3")):
        for number in range(40):
            at = time.time() - (7 * week + 1) * DAY - number
            order = [Scored(f"d{n}", 1.0 - n / 10) for n in range(4)] + [Scored("long#1#2", 0.1)]
            search = store.record_search(f"query {number % 7}", order, latency={"total": 0.01}, at=at)
            store.record_feedback(search, liked, 1, at=at)
            if week == 0:
                store.record_feedback(search, "long#1#2", -1, at=at)
    return tmp_path


def test_tables_files_and_the_verdict(service: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(service / "feedback.sqlite"), "--json", str(service / "out" / "m.json")]
    arguments += ["--page", str(service / "out" / "m.html")]
    arguments += ["--hard-cases", str(service / "out" / "hard.jsonl"), "--index", str(service / "index")]
    assert monitor.main(arguments) == 0
    said = capsys.readouterr().out
    assert "retrain: NDCG@10 0.431 in the last window, 1.000 before (-56.9%, p = " in said
    assert "7 hard cases" in said
    assert json.loads((service / "out" / "m.json").read_text())["verdict"]["verdict"] == "retrain"
    assert "<h1>Retrain</h1>" in (service / "out" / "m.html").read_text()
    rows = [json.loads(line) for line in (service / "out" / "hard.jsonl").read_text().splitlines()]
    assert rows[0]["positive"] == ["T passage 3 of some words"] and len(rows[0]["negative"]) == 4
    assert any(text.startswith("A sentence of its own.") for text in rows[0]["negative"])
    assert monitor.main([str(service / "feedback.sqlite"), "--check"]) == 1


def test_what_is_missing_is_named(service: Path) -> None:
    with pytest.raises(UserError, match="--hard-cases needs the texts"):
        monitor.main([str(service / "feedback.sqlite"), "--hard-cases", "x.jsonl"])
    with pytest.raises(UserError, match="there is no such file"):
        monitor.main([str(service / "nowhere.sqlite")])
    with pytest.raises(UserError, match=r"no index, there is no index.sqlite"):
        monitor.main(
            [str(service / "feedback.sqlite"), "--hard-cases", str(service / "x"), "--index", str(service)]
        )
