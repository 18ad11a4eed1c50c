"""The service under load: 64 clients for two minutes on loopback, each answer held to one that was computed
alone before.

A peer would say nothing here: the result is counts (200, 503, anything else, wrong answers), latencies and
memory of the service and its reranker's process. Searches repeat, so their scores come from the cache, while
/rerank computes every time. It exits with 1 for a wrong answer, an error but 503, and memory that grows.
    python benchmarks/serving_load.py --reranker exports/mine/int8        # 2 minutes and the start
    python benchmarks/serving_load.py --seconds 10 --clients 16           # does it run? the packaged MiniLM
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from common.checkpoint import to_json, write_file
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.metrics.latency import percentiles
from common.retrieval.lexical import bm25_run
from common.runs import environment, git_commit

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-2  # of a raw score: int8 and padding differ from batch to batch
GROWTH = 1.15  # memory of the last quarter against the second
Asked = tuple[str, dict[str, Any]]  # path and body


@dataclass
class Counts:
    """What the clients saw; `seconds` of the answers with 200 by path."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    fallbacks: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    data = load_ranking_data(options.data)
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "documents.jsonl"
        documents.write_text(
            "".join(
                json.dumps({"id": name, "text": text}) + "\n"
                for name, text in list(data.corpus.items())[: options.documents]
                if text.strip()
            )
        )
        process, port = started(options, Path(folder), documents)
        try:
            asked = questions(data, options)
            expected = [ask(port, *question)[2] for question in asked]
            counts, memory = loaded(port, process, asked, expected, options)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    found = summary(counts, memory, options)
    print(json.dumps(found, indent=2))
    if options.results:
        write_file(Path(options.results) / "serving_load.cpu.json", to_json(found))
    return 0 if found["passed"] else 1


def started(options: argparse.Namespace, folder: Path, documents: Path) -> tuple[subprocess.Popen[str], int]:
    """The service and its port, once it listens."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port", "0"]
    command += ["--reranker", options.reranker, "--retriever", options.retriever]
    command += ["--index", str(folder / "index"), "--feedback", str(folder / "feedback.sqlite")]
    command += ["--documents", str(documents), "--depth", str(options.depth)]
    command += ["--queue", str(options.queue)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving on "):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, int(line.rpartition(":")[2])
    raise UserError(f"the service did not start (exit {process.wait()}); its message stands above")


def questions(data: Any, options: argparse.Namespace) -> list[Asked]:
    """Half searches, half passages to rerank."""
    split = "test" if "test" in data.qrels else next(iter(data.qrels))
    queries = {name: data.queries[name] for name in sorted(data.split(split))[: options.queries]}
    run = bm25_run(data.corpus, queries, 10)
    found: list[Asked] = []
    for name, passages in run.items():
        if passages:
            texts = [data.corpus[passage] for passage in passages]
            found.append(("/rerank", {"query": queries[name], "texts": texts, "raw_scores": True}))
        found.append(("/search", {"query": queries[name], "top_k": 5}))
    return found


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[int, int, Any]:
    """Status, seconds to wait, answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, int(answer.getheader("retry-after") or 0), json.loads(answer.read())
    finally:
        connection.close()


def loaded(
    port: int,
    process: subprocess.Popen[str],
    asked: list[Asked],
    expected: list[Any],
    options: argparse.Namespace,
) -> tuple[Counts, list[int]]:
    """What every client saw until the time was over, and the service's memory in bytes, every second."""
    counts, lock, until = Counts(), threading.Lock(), time.monotonic() + options.seconds

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        while time.monotonic() < until:
            place = int(rng.integers(len(asked)))
            path, body = asked[place]
            began = time.perf_counter()
            try:
                status, pause, found = ask(port, path, body)
            except (OSError, ValueError, http.client.HTTPException) as error:
                with lock:
                    counts.statuses[type(error).__name__] += 1
                continue
            with lock:
                counts.statuses[str(status)] += 1
                if status == 200:
                    counts.seconds.setdefault(path, []).append(time.perf_counter() - began)
                    counts.fallbacks += path == "/search" and found["fallback"] is not None
                    if problem := difference(path, body, expected[place], found):
                        counts.wrong.append(problem)
            if status == 503:
                time.sleep(min(pause, 1) * rng.random())

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(options.clients)]
    for thread in threads:
        thread.start()
    memory: list[int] = []
    while any(thread.is_alive() for thread in threads):
        memory.append(_memory(process.pid))
        time.sleep(1.0)
    return counts, memory


def difference(path: str, body: dict[str, Any], expected: Any, found: Any) -> str:
    """How an answer differs from the one that was computed alone; empty where it does not."""
    if path == "/rerank":
        scores = {item["index"]: item["score"] for item in expected}
        got = {item["index"]: item["score"] for item in found}
        if scores.keys() != got.keys() or max(abs(scores[key] - got[key]) for key in scores) > TOLERANCE:
            return f"{body['query'][:40]!r}: scores {got} instead of {scores}"
        return ""
    if found["query"] != body["query"]:
        return f"{body['query'][:40]!r}: the answer is to {found['query'][:40]!r}"
    first = [[hit["id"] for hit in answer["first_stage"]] for answer in (expected, found)]
    if first[0] != first[1]:
        return f"{body['query'][:40]!r}: first stage {first[1]} instead of {first[0]}"
    scores = {hit["id"]: hit["reranker"] for hit in expected["hits"]}
    got = {hit["id"]: hit["reranker"] for hit in found["hits"]}
    both = [key for key in scores.keys() & got.keys() if None not in (scores[key], got[key])]
    if any(abs(scores[key] - got[key]) > TOLERANCE for key in both):
        return f"{body['query'][:40]!r}: scores {got} instead of {scores}"
    return ""


def summary(counts: Counts, memory: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """The counts, the latencies in ms, the memory in MB, and whether all of it is as it must be."""
    quarter = max(1, len(memory) // 4)
    early, late = np.median(memory[quarter : 2 * quarter] or memory), np.median(memory[-quarter:])
    others = {status for status in counts.statuses if status not in ("200", "503")}
    answered = bool(counts.seconds)
    return {
        "name": "serving_load",
        "commit": git_commit(),
        "environment": environment(),
        "workload": vars(options),
        "statuses": dict(counts.statuses),
        "wrong": counts.wrong[:10],
        "fallbacks": counts.fallbacks,
        "milliseconds": {path: percentiles(seconds) for path, seconds in counts.seconds.items()},
        "memory_mb": {"early": early / 1e6, "late": late / 1e6, "most": max(memory) / 1e6},
        "passed": answered and not others and not counts.wrong and bool(late < GROWTH * early),
    }


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it has just been replaced
            continue
    return total


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reranker", default="default")
    parser.add_argument("--retriever", default="default")
    parser.add_argument("--data", default="pydocs")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--results", default="", help="a folder for serving_load.cpu.json")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return options


if __name__ == "__main__":
    run_command(main)
