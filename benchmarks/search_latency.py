"""Time of a whole search by stage, and what depth and passage length buy: index, retrieve, rerank, total.

Queries of a split go through the pipeline one after another, without a cache of scores, with the fp32 and the
INT8 export; each query is asked of both precisions at every depth and passage cut before the next one. The
encoder is exported too (fp32). Documents are passages as they are, not cut into chunks. INT8 stands beside
our fp32, and beside the p95 that is wanted of it (--target, milliseconds, at --depth passages).
    python benchmarks/search_latency.py --model runs/x/best --target 150                     # pydocs
    python benchmarks/search_latency.py --model runs/x/best --data FOLDER/scifact --target 600
    python benchmarks/search_latency.py --model runs/x/best --quick                          # does it run?
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Record, compared
from benchmarks.rerank_serving import OURS, exported, write_exported
from common.backends import Encoder, Scorer, load_encoder, load_scorer
from common.data.records import RankingData
from common.data.sources import load_split_data
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.metrics.latency import percentiles
from common.metrics.ranking import evaluate_run, mean
from common.rag import RAGPipeline
from common.report import Table, tables_text
from common.reranker.evaluation import chosen_qrels
from common.retrieval.documents import Chunking
from common.text import PairTokenizer
from jax_impl.export.onnx import export_bi_encoder

METRIC = "nDCG@10"
STAGES = ("retrieve", "rerank", "total")
WHOLE = Chunking(max_tokens=1 << 20)


@dataclass
class Measured:
    """One precision, depth and passage cut: seconds by stage of each query, and its order."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    run: dict[str, dict[str, float]] = field(default_factory=dict)

    def milliseconds(self, stage: str) -> dict[str, float]:
        return percentiles(self.seconds[stage])


Setting = tuple[str, int, int]  # precision, depth, passage tokens


def main() -> None:
    options = _options()
    directory = resolve_model(options.model, say=lambda _: None)
    data = load_split_data(options.data, options.split)
    qrels = chosen_qrels(data, options.split, None, options.queries)
    with tempfile.TemporaryDirectory() as folder:
        encoder, scorers = contestants(directory, data.corpus, Path(folder), options)
        pipeline, index = built(data, encoder, Path(folder) / "index", options)
        settings = wanted(options)
        found = measure(pipeline, scorers, settings, {query: data.queries[query] for query in qrels})
    ndcg = {key: mean(evaluate_run(one.run, qrels, (METRIC,))[METRIC]) for key, one in found.items()}
    about = {
        "data": data.name,
        "documents": len(data.corpus),
        "queries": len(qrels),
        "retrieval": options.retrieval,
        "cores": len(os.sched_getaffinity(0)),
    }
    record = Record(f"search_latency_{data.name.replace('/', '_')}", about, folder=Path(options.results))
    for row in rows(found, ndcg, options, index):
        record.add(row, replace=True)
    print(tables_text([table(found, ndcg, data, index)]), end="")


def contestants(
    directory: Path, corpus: Mapping[str, str], folder: Path, options: argparse.Namespace
) -> tuple[Encoder, dict[tuple[str, int], Scorer]]:
    """The exported encoder, and a scorer for every precision and passage cut."""
    write_exported(
        folder / "encoder", export_bi_encoder(resolve_model(options.encoder, say=lambda _: None), "fp32")
    )
    scorers: dict[tuple[str, int], Scorer] = {}
    for precision in OURS:
        exported(directory, folder / precision, precision, corpus)
        for cut in sorted({*options.cuts, options.cut}):
            scorer: Any = load_scorer(folder / precision, say=lambda _: None)
            scorer.tokenizer = PairTokenizer(folder / precision, scorer.tokenizer.max_query_tokens, cut)
            scorers[precision, cut] = scorer
    return load_encoder(folder / "encoder", say=lambda _: None), scorers


def built(
    data: RankingData, encoder: Encoder, folder: Path, options: argparse.Namespace
) -> tuple[RAGPipeline, dict[str, float]]:
    """The pipeline over all passages of the data; seconds and megabytes of its index."""
    pipeline = RAGPipeline(
        encoder,
        retrieval=options.retrieval,
        index_dir=folder,
        chunking=WHOLE,
        cache_size=0,
        say=lambda _: None,
    )
    began = time.perf_counter()
    pipeline.index_documents({"id": name, "text": text} for name, text in data.corpus.items())
    pipeline.retrieve("a first query builds BM25")
    return pipeline, {
        "build_seconds": time.perf_counter() - began,
        "megabytes": pipeline.index.bytes / 1e6,
    }


def wanted(options: argparse.Namespace) -> list[Setting]:
    """The asked depth and cut first, then the curve over each."""
    points = [(options.depth, options.cut)]
    points += [(depth, options.cut) for depth in options.depths] + [(options.depth, c) for c in options.cuts]
    return [(precision, *point) for precision in OURS for point in dict.fromkeys(points)]


def measure(
    pipeline: RAGPipeline,
    scorers: dict[tuple[str, int], Scorer],
    settings: Sequence[Setting],
    queries: dict[str, str],
) -> dict[Setting, Measured]:
    """Every query at every setting in turn; the first query goes before, untimed."""
    found = {setting: Measured() for setting in settings}
    for number, (query, text) in enumerate([next(iter(queries.items())), *queries.items()]):
        for setting in settings:
            precision, depth, cut = setting
            pipeline.top_k_retrieval, pipeline.scorer = depth, scorers[precision, cut]
            results = pipeline.retrieve_and_rerank(text, depth)
            if results.fallback:
                raise UserError(f"the reranker failed on query {query}: {results.fallback}")
            if number:
                for stage in STAGES:
                    found[setting].seconds[stage].append(results.seconds.get(stage, 0.0))
                found[setting].run[query] = {hit.passage.document: hit.score for hit in results.hits}
    return found


def rows(
    found: dict[Setting, Measured],
    ndcg: dict[Setting, float],
    options: argparse.Namespace,
    index: dict[str, float],
) -> list[dict[str, Any]]:
    """INT8 beside fp32 at each setting, and beside the target at the asked one."""
    made = []
    for (precision, depth, cut), own in found.items():
        if precision != "int8":
            continue
        other = found["fp32", depth, cut]
        sides = {"ours": (own, "int8"), "peer": (other, "fp32")}
        more = {
            "milliseconds": {
                s: {stage: m.milliseconds(stage) for stage in STAGES} for s, (m, _) in sides.items()
            },
            METRIC: {side: ndcg[name, depth, cut] for side, (_, name) in sides.items()},
            "index": index,
        }
        p95 = [m.milliseconds("total")["p95"] for m in (own, other)]
        what = f"search, p95: top {depth}, {cut} tokens of a passage"
        unit = "milliseconds"
        made.append(compared(what, p95[:1], p95[1:], "ours, fp32", unit, higher_is_better=False, **more))
        if options.target and (depth, cut) == (options.depth, options.cut):
            target = [options.target]
            made.append(compared(what, p95[:1], target, "target", unit, higher_is_better=False))
    return made


def table(
    found: dict[Setting, Measured], ndcg: dict[Setting, float], data: RankingData, index: dict[str, float]
) -> Table:
    """Everything that was measured, a row a setting."""
    columns = ["precision", "depth", "tokens", METRIC]
    columns += [f"{stage} {part}" for stage in STAGES for part in ("p50", "p95", "p99")]
    lines: list[list[str | float | None]] = []
    for setting, own in found.items():
        times = [round(value, 2) for stage in STAGES for value in own.milliseconds(stage).values()]
        lines.append([*setting, round(ndcg[setting], 4), *times])
    note = (
        f"{len(data.corpus):,} documents indexed in {index['build_seconds']:.1f} s, "
        f"{index['megabytes']:.1f} MB; milliseconds"
    )
    return {"title": f"Search over {data.name}", "columns": columns, "rows": lines, "note": note}


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a reranker that a run wrote, of the BERT family")
    parser.add_argument("--encoder", default="default", help="the retriever: directory or name")
    parser.add_argument("--data", default="pydocs", help="ranking data, as --data.name")
    parser.add_argument("--split", default="test")
    parser.add_argument("--retrieval", choices=("hybrid", "dense", "bm25"), default="hybrid")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--cut", type=int, default=192, help="tokens of a passage that are read")
    parser.add_argument("--depths", type=int, nargs="*", default=[10, 20, 100], help="the curve over depth")
    parser.add_argument(
        "--cuts", type=int, nargs="*", default=[64, 128], help="the curve over passage length"
    )
    parser.add_argument("--target", type=float, help="the p95 that is wanted of INT8, milliseconds")
    parser.add_argument("--results", default=str(RESULTS), help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="three queries, five passages, no curves")
    options = parser.parse_args(arguments)
    if options.quick:
        options.queries, options.depth, options.depths, options.cuts = 3, 5, [], []
    return options


if __name__ == "__main__":
    run_command(main)
