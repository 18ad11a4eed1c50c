"""The index as it grows: build time, search, recall, size and memory at 10k, 100k and 1M passages.

Real embeddings (of pydocs, or --data) are multiplied: each passage is one of them with a little noise, so
that their clusters remain; queries are real ones. The whole index is built (SQLite, vectors, faiss: flat
below 50,000 passages, HNSW below 500,000, IVF-PQ from there), in a process of its own. Beside it stands exact
search over the same vectors by faiss' flat index: its time, and what recall@50 is measured against.
    python benchmarks/index_growth.py --sizes 10000                    # a minute or two on 2 cores
    python benchmarks/index_growth.py --sizes 10000 100000 1000000     # 1M: 1.5 GB of vectors on disk
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer import Peer, answer_all
from benchmarks.record import RESULTS, Record, compared
from common.backends import load_encoder
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.metrics.latency import percentiles
from common.retrieval.documents import Document
from common.retrieval.index import PassageIndex

DEPTH = 50
NOISE = 0.2  # its length, beside embeddings of length 1
_BLOCK = 20_000  # documents of one `add`


class Multiplied:
    """An encoder whose text is a number: passage n is real embedding n % N, with noise drawn for n."""

    def __init__(self, passages: np.ndarray, queries: np.ndarray) -> None:
        self.name = self.identity = "multiplied"
        self.passages, self.queries, self.dim = passages, queries, passages.shape[1]

    def encode(self, texts: Sequence[str], *, kind: str = "passage") -> np.ndarray:
        numbers = [int(text.split()[-1]) for text in texts]
        if kind == "query":
            return self.queries[numbers]
        return np.stack([self._passage(number) for number in numbers])

    def _passage(self, number: int) -> np.ndarray:
        noise = np.random.default_rng(number).normal(size=self.dim).astype(np.float32)
        vector = self.passages[number % len(self.passages)] + NOISE * noise / np.linalg.norm(noise)
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


def main() -> None:
    options = _options()
    passages, queries = embeddings(options)
    about = {
        "data": Path(options.data).name,
        "embeddings": len(passages),
        "queries": len(queries),
        "noise": NOISE,
        "depth": DEPTH,
        "dim": passages.shape[1],
    }
    record = Record("index_growth", about, folder=Path(options.results))
    for size in options.sizes:
        with Peer(serve_size, passages, queries) as peer:
            row = peer.run("measure", size)
        record.add(row, replace=True)
        more = row["index"]
        print(
            f"{size:,} passages, {more['kind']}: built in {more['build_seconds']:.1f} s, p95 of a search "
            f"{row['ours']:.2f} ms (exact {row['peer']:.2f}), recall@{DEPTH} {more['recall']:.4f}, "
            f"{more['megabytes_on_disk']:.0f} MB on disk, {more['megabytes_of_memory']:.0f} MB of memory",
            flush=True,
        )


def embeddings(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of real passages [N, D] and of real queries [Q, D]."""
    data, encoder = load_ranking_data(options.data), load_encoder(options.encoder, say=lambda _: None)
    passages = [data.corpus[name] for name in sorted(data.corpus)[: options.base]]
    queries = [data.queries[name] for name in sorted(data.queries)[: options.queries]]
    return encoder.encode(passages, kind="passage"), encoder.encode(queries, kind="query")


def serve_size(connection: Any, passages: np.ndarray, queries: np.ndarray) -> None:
    """A process for one size: its memory is that of one index."""
    answer_all(connection, lambda _, size: measured(Multiplied(passages, queries), size))


def measured(encoder: Multiplied, size: int) -> dict[str, Any]:
    """The row of one size."""
    before = _memory()
    with tempfile.TemporaryDirectory() as folder:
        index = PassageIndex(folder, encoder, say=lambda _: None)
        began = time.perf_counter()
        for first in range(0, size, _BLOCK):
            index.add([Document(str(n), str(n)) for n in range(first, min(first + _BLOCK, size))])
        seconds = time.perf_counter() - began
        asked = [str(number) for number in range(len(encoder.queries))]
        index.dense(asked[0], DEPTH)  # loads what is loaded once
        times, found = [], []
        for text in asked:
            began = time.perf_counter()
            numbers = index.dense(text, DEPTH)
            times.append(time.perf_counter() - began)
            found.append({passage.document for passage in index.passages(list(numbers)).values()})
        about = {
            "kind": index.kind,
            "passages": size,
            "build_seconds": seconds,
            "megabytes_on_disk": index.bytes / 1e6,
            "megabytes_of_memory": _memory() - before,
            "milliseconds": percentiles(times),
        }
    exact, exact_times = exact_search(encoder, size)
    about["recall"] = float(
        np.mean([len(own & right) / len(right) for own, right in zip(found, exact, strict=True)])
    )
    p95 = [percentiles(side)["p95"] for side in (times, exact_times)]
    name = f"search among {size:,} passages, p95"
    return compared(
        name, p95[:1], p95[1:], "faiss, flat", "milliseconds", higher_is_better=False, index=about
    )


def exact_search(encoder: Multiplied, size: int) -> tuple[list[set[str]], list[float]]:
    """The true nearest of each query, and seconds of each search by faiss' flat index."""
    import faiss

    flat = faiss.IndexFlatIP(encoder.dim)
    for first in range(0, size, _BLOCK):
        flat.add(encoder.encode([str(n) for n in range(first, min(first + _BLOCK, size))]))
    found, times = [], []
    for query in encoder.queries:
        began = time.perf_counter()
        _, rows = flat.search(query[None], min(DEPTH, size))
        times.append(time.perf_counter() - began)
        found.append({str(row) for row in rows[0]})
    return found, times


def _memory() -> float:
    """The most megabytes that this process has held so far."""
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--data", default="pydocs", help="ranking data, as --data.name")
    parser.add_argument("--encoder", default="default", help="a bi-encoder: directory or name")
    parser.add_argument("--base", type=int, default=2_000, help="real embeddings that are multiplied")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--results", default=str(RESULTS), help="where the JSON goes")
    options = parser.parse_args(arguments)
    if min(*options.sizes, options.base, options.queries) < 1:
        raise UserError("--sizes, --base and --queries: allowed are whole numbers >= 1")
    return options


if __name__ == "__main__":
    run_command(main)
