"""The command that serves: what it refuses, and a whole life of it, with a signal at the end."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from scripts import serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "RESONANCE_API_KEY"),
        (["--reranker", "a", "--registry", "b"], "both name a reranker"),
        (["--port", "99999"], "--port is 99999; allowed: 0 to 65535"),
        (["--retriever", "bm25", "--threads", "0"], "threads is 0; allowed: >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESONANCE_API_KEY", raising=False)
    with pytest.raises(UserError, match=said):
        serve.main(words)


def test_it_indexes_serves_and_ends_with_a_signal(tmp_path: Path) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"id": "a", "text": "About sorting lists."}\n{"id": "b", "text": "About json."}\n')
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--retriever", "bm25", "--port", "0"]
    command += ["--documents", str(documents), "--index", str(tmp_path / "index")]
    command += ["--feedback", str(tmp_path / "feedback.sqlite")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), line
        connection = http.client.HTTPConnection("127.0.0.1", int(line.rpartition(":")[2]), timeout=30)
        body = json.dumps({"query": "json"})
        connection.request("POST", "/search", body, {"content-type": "application/json"})
        found = json.loads(connection.getresponse().read())
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert [hit["id"] for hit in found["hits"]] == ["b"] and not found["reranked"]
