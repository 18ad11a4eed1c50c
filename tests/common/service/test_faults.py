"""The service under load and when something breaks: nothing is mixed or lost, and the fallback is visible."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.errors import UserError
from common.rag import RAGPipeline
from common.service.app import ServiceConfig
from common.service.core import Reloader, start_reranker
from common.service.registry import Registry
from tests.retrieval_fakes import MoodyScorer, SecondScorer, WordEncoder
from tests.services import DOCUMENTS, running

CLIENTS = 64


def test_many_clients_get_their_own_answers_or_503(tmp_path: Path) -> None:
    """Each answer is recomputed; the queue is small, so that a slow machine tells some to come again."""
    config = ServiceConfig(threads=8, queue=24)
    statuses: Counter[int] = Counter()
    memory: list[int] = []

    def client(number: int) -> None:
        for turn in range(1, 9):
            word = f"w{number}x{turn}"
            passages = [f"{word} " * ((number + turn + n) % 7) + "end" for n in range(5)]
            status, headers, found = service.ask(
                "POST", "/rerank", {"query": word, "texts": passages, "raw_scores": True}
            )
            statuses[status] += 1
            if status == 503:
                assert int(headers["retry-after"]) >= 1
                time.sleep(0.05)
                continue
            assert status == 200, found
            counts = [float((number + turn + n) % 7) for n in range(5)]
            order = sorted(range(5), key=lambda n: (-counts[n], n))
            assert [(item["index"], item["score"]) for item in found] == [(n, counts[n]) for n in order]
            if turn % 4 == 0:
                name = f"filler{number % 20}"
                status, _, found = service.ask("POST", "/search", {"query": f"{name} {word}"})
                assert status in (200, 503), found
                if status == 200:
                    assert found["query"] == f"{name} {word}"
                    assert found["hits"][0]["id"] == f"other{number % 20}"
                statuses[status] += 1

    with running(tmp_path, config=config) as service, ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(client, number) for number in range(CLIENTS)]
        process = psutil.Process()
        while not all(future.done() for future in futures):
            memory.append(process.memory_info().rss)
            time.sleep(0.25)
        for future in futures:
            future.result()
        text = service.ask("GET", "/metrics")[2]
    assert set(statuses) <= {200, 503} and statuses[200] >= CLIENTS  # a fast machine refuses nobody
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    shared = float(values["resonance_batch_requests_sum"]) / float(values["resonance_batch_requests_count"])
    assert shared > 1.0, "no batch held pairs of several requests"
    assert max(memory) - memory[len(memory) // 2] < 100 * 2**20


@pytest.mark.parametrize("kind", ["hang", "die", "killed"])
def test_a_reranker_that_dies_or_hangs_is_replaced_and_searches_go_on(tmp_path: Path, kind: str) -> None:
    with running(tmp_path, patience=0.5) as service:
        first = service.service.scorer.process_id  # type: ignore[union-attr]
        if kind == "killed":
            assert first is not None
            os.kill(first, signal.SIGKILL)
        found = service.post("/search", query=f"{'keys' if kind == 'killed' else kind} values")
        assert found["hits"] and found["reranked"] == (found["fallback"] is None)
        if kind != "killed":  # there the new process may be ready before the question
            assert "reranker failed" in found["fallback"]
            assert 'reason="reranker failed"' in service.ask("GET", "/metrics")[2]
        assert service.ask("POST", "/rerank", {"query": "hang die", "texts": ["a"]})[0] == 503
        while service.ask("GET", "/ready")[2]["reranker"] != "up":
            time.sleep(0.05)
        again = service.post("/search", query="keys again")
        assert again["reranked"] and again["hits"][0]["id"] == "dict"
        assert service.service.scorer.process_id != first  # type: ignore[union-attr]


def test_a_slow_reranker_is_left_behind_at_the_deadline(tmp_path: Path) -> None:
    with running(tmp_path, deadline=0.3, patience=1.0) as service:
        found = service.post("/search", query="hang on")
        assert found["fallback"] == "reranker past its deadline" and found["hits"]


def test_one_bad_request_of_a_batch_fails_alone(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(16) as pool:
        asked = [("refuse" if n % 4 == 0 else f"word{n}") for n in range(32)]
        found = list(
            pool.map(lambda q: service.ask("POST", "/rerank", {"query": q, "texts": ["a", q]}), asked)
        )
        assert [item[0] for item in found] == [422 if query == "refuse" else 200 for query in asked]
        assert all(item[2][0]["index"] == 1 for item in found if item[0] == 200)


def test_a_full_disk_while_indexing_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [{"id": f"new{n}", "text": f"Fresh text {n}."} for n in range(5)]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running(tmp_path) as service:
        with monkeypatch.context() as patch:
            patch.setattr("common.retrieval.index.os.fsync", full)
            status, _, said = service.ask("POST", "/documents", {"documents": more})
        assert status == 507 and "No space left" in said["error"]["message"]
        assert service.post("/search", query="sorted list")["hits"][0]["id"] == "sort"
        assert service.ask("GET", "/ready")[2]["documents"] == len(DOCUMENTS)
        assert service.post("/documents", documents=more)["added"] == 5
        service.service.rag.index.verify()


def test_a_search_that_cannot_be_stored_is_answered_without_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise UserError("feedback.sqlite: cannot be written (disk full)")

    with running(tmp_path) as service:
        monkeypatch.setattr(service.service.feedback, "record_search", full)
        found = service.post("/search", query="sorted list")
        assert found["id"] is None and found["hits"]
        assert "resonance_unrecorded_searches_total 1.0" in service.ask("GET", "/metrics")[2]


def test_a_broken_index_is_503_and_not_ready(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        index = service.service.rag.index
        index._local = threading.local()
        for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
            if (file := tmp_path / "index" / name).exists():
                file.write_bytes(b"no database at all, " * 500)
        # threads that have read before keep what they hold open: new ones see it
        status, _, said = service.ask("POST", "/search", {"query": "keys"})
        assert status == 503 and "broken index" in said["error"]["message"]
        status, _, ready = service.ask("GET", "/ready")
        assert status == 503 and "broken index" in ready["problem"]
        assert service.ask("GET", "/health")[0] == 200


def test_a_promoted_model_is_taken_up_without_a_dropped_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "models")
    for number in (1, 2):
        source = tmp_path / f"model{number}"
        source.mkdir()
        (source / "config.json").write_text(f'{{"number": {number}}}')
        (source / "model.safetensors").write_bytes(b"weights")
        registry.add("ranker", source)
    first = registry.promote("ranker", 1)

    def reloader(service: Any, metrics: Any) -> Reloader:
        return Reloader(
            service, registry, "ranker", lambda _: start_reranker(SecondScorer, metrics), first, every=0.1
        )

    found: list[tuple[int, str, list[int]]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            status, _, said = service.ask("POST", "/rerank", {"query": "b", "documents": ["a", "b"]})
            found.append((status, said["model"], [item["index"] for item in said["results"]]))

    with running(tmp_path, MoodyScorer, reloader=reloader) as service, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        old = service.service.scorer
        registry.promote("ranker", 2)
        while service.service.scorer is old or not any(item[1] == "second" for item in found):
            time.sleep(0.02)
        stop.set()
        for future in clients:
            future.result()
        while old.up and old.process_id:  # type: ignore[union-attr]
            time.sleep(0.02)
    assert {item[0] for item in found} == {200}
    assert {tuple(item[2]) for item in found} == {(1, 0), (0, 1)}


def test_a_shutdown_answers_what_was_accepted(tmp_path: Path) -> None:
    with running(tmp_path, deadline=None, patience=2.0) as service, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.ask, "POST", "/search", {"query": "hang keys"})
        while service.server.config.loaded_app is None or service.service._active == set():
            time.sleep(0.01)
        service.server.should_exit = True
        status, _, found = waiting.result(30)
    assert status == 200 and "hung" in found["fallback"]


def test_a_restart_in_the_middle_of_an_add_keeps_whole_blocks(tmp_path: Path) -> None:
    """A process that is killed while it adds leaves an index that is whole, and the same add goes on."""
    import subprocess
    import sys

    program = f"""
import sys; sys.path.insert(0, {os.getcwd()!r})
from common.rag import RAGPipeline
from tests.retrieval_fakes import WordEncoder
rag = RAGPipeline(WordEncoder(), index_dir={str(tmp_path / "index")!r}, say=lambda _: None)
print("begun", flush=True)
rag.index_documents([{{"id": str(n), "text": f"document {{n}} of many"}} for n in range(20000)])
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"begun\n"
    rag = RAGPipeline(WordEncoder(), index_dir=tmp_path / "index", say=lambda _: None)
    while rag.index.documents == 0:
        time.sleep(0.01)
    child.kill()
    child.wait()
    rag.index.verify()
    kept = rag.index.documents
    assert 0 < kept < 20000 and rag.index.size == kept
    changes = rag.index_documents(
        [{"id": str(n), "text": f"document {n} of many"} for n in range(kept + 100)]
    )
    assert (changes.added, changes.unchanged) == (100, kept)
