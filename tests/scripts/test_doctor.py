"""scripts/doctor.py and scripts/cost.py: what is healthy, and each thing that is not."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common.errors import UserError
from common.rag import RAGPipeline
from common.service.feedback import FeedbackStore, Scored
from common.service.registry import Registry
from scripts import cost, doctor
from tests.common.service.test_registry import model


def statuses(**named: object) -> dict[str, str]:
    return {item.item: item.status for item in doctor.examine(doctor.Args(**named))}  # type: ignore[arg-type]


def test_the_machine_is_always_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"Python", "packages", "processor", "disk"} <= statuses().keys()
    monkeypatch.setattr(doctor, "FREE_DISK", 1e9)
    monkeypatch.setattr(doctor, "SERVING", ("no_such_package",))
    assert (statuses()["disk"], statuses()["packages"]) == ("FAIL", "FAIL")


def test_a_registry_without_a_current_version_fails(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    assert statuses(registry=registry.root)["registry"] == "FAIL"
    registry.add("ranker", model(tmp_path / "a"))
    assert statuses(registry=registry.root)["current ranker"] == "FAIL"
    registry.promote("ranker")
    found = statuses(registry=registry.root)
    assert found["current ranker"] == "ok" and found["rollback of ranker"] == "note"
    registry.add("ranker", model(tmp_path / "b", b"two"))
    registry.promote("ranker")
    assert statuses(registry=registry.root)["rollback of ranker"] == "ok"
    (registry.versions("ranker")[0].path / "config.json").write_text("[]")
    assert statuses(registry=registry.root)["registry"] == "FAIL"


def test_an_index_is_read_whole(tmp_path: Path) -> None:
    rag = RAGPipeline("bm25", index_dir=tmp_path / "index", say=lambda _: None)
    assert statuses(index=tmp_path / "index", encoder="bm25")["index"] == "FAIL"
    rag.index_documents(["some words"])
    assert statuses(index=tmp_path / "index", encoder="bm25")["index"] == "ok"
    assert statuses(index=tmp_path, encoder="bm25")["index"] == "FAIL"


def test_feedback_tells_of_fallbacks(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite")
    for number in range(50):
        late = "reranker failed" if number == 0 else None
        store.record_search("q", [Scored("a", 1.0)], fallback=late, at=time.time() - number)
    found = statuses(feedback=store.path)
    assert (found["feedback"], found["fallbacks"], found["quality"]) == ("ok", "FAIL", "ok")


@pytest.mark.parametrize("ready", [200, 503])
def test_a_service_is_asked(ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization"))
            self.send_response(ready if self.path == "/ready" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("RESONANCE_API_KEY", "secret")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = statuses(url=f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        server.server_close()
    assert [found[path] for path in ("/health", "/ready", "/metrics")] == [
        "ok",
        "ok" if ready == 200 else "FAIL",
        "ok",
    ]
    assert keys == ["Bearer secret"] * 3


def test_nobody_at_the_address_and_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--url", "http://127.0.0.1:9"]) == 1
    assert "no answer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_scores_and_its_export_was_verified(tmp_path: Path) -> None:
    from tests.rerankers import reranker

    trained = reranker(tmp_path, 0)
    found = statuses(model=str(trained))
    assert (found["model scores"], found["confidence"], found["export"]) == ("ok", "note", "note")
    report = {"verification": {"loss": 0.02, "queries": 5}, "forced": True}
    (trained / "export.json").write_text(json.dumps(report))
    assert statuses(model=str(trained))["export"] == "FAIL"


def test_cost_of_a_million_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = {
        "source": {"ndcg": 0.7, "pairs_per_second": 100.0},
        "export": {"ndcg": 0.69, "pairs_per_second": 500.0},
    }
    (tmp_path / "export.json").write_text(json.dumps({"verification": sides}))
    table = cost.cost_table(cost.Args((tmp_path,), price=0.36, depth=50, load=0.5))
    # 10 searches a second at half load: 200,000 s for a million, 55.6 hours at 0.36
    assert table["rows"][1][1:] == [0.69, 500.0, 10.0, "432,000", 20.0]
    assert table["rows"][0][-1] == 100.0
    cost.main([str(tmp_path), "--price", "0.36", "--markdown"])
    with pytest.raises(UserError, match=r"export\.json: a file; name the folder that holds export\.json"):
        cost.main([str(tmp_path / "export.json"), "--price", "1"])
    assert "| 432,000 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="allowed are"):
        cost.main([str(tmp_path), "--price", "1", "--load", "0"])


def test_the_checklist_names_commands_that_are_there() -> None:
    root = Path(__file__).parents[2]
    named = set(
        re.findall(r"(?:scripts|benchmarks|configs)/\w+\.py", (root / "docs" / "production.md").read_text())
    )
    assert len(named) >= 8 and [name for name in named if not (root / name).exists()] == []
