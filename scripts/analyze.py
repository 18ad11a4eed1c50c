"""Analyse a reranker: what tells relevant from other pairs, whether its confidence is right, what is hardest.

example: python scripts/analyze.py runs/quantum_resonance/best --data my_pairs.jsonl --split test

Prints the tables and writes analysis-<split>.json, .png and .html, into the run's folder (whose report shows
them too) or into --out.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from common.backends import load_encoder, load_scorer
from common.checkpoint import check_writable
from common.config import FirstStage
from common.data.records import OnBadRow
from common.data.sources import load_split_data
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.metrics.ranking import check_metrics
from common.report import tables_text, write_report
from common.reranker.analysis import analyse, analysis_files, write_analysis
from common.reranker.analysis_view import analysis_tables
from common.reranker.evaluation import chosen_qrels
from common.reranker.prepare import cache_root, candidates
from common.reranker.reranking import fitted_over, load_confidences


@dataclasses.dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[str]
    """A checkpoint directory, a run's folder, or the name of a base model (as it starts)."""
    data: str = "pydocs"
    """`pydocs`, a file of triples, a BEIR or TREC folder, or a hub dataset."""
    split: str = "test"
    """Whose queries; `all` takes every query of a file of triples or of a folder with one split, uncut."""
    on_bad_row: OnBadRow = "error"
    first_stage: FirstStage | None = None
    """Whose candidates are analysed; when absent those that the checkpoint was trained on, else rrf."""
    depth: int | None = None
    """Candidates of a query, the first stage's best (when absent as many as the checkpoint was trained to
    rerank, else 50); the relevant passages come in beside them."""
    judged: bool = False
    """Over exactly the judged passages of each query (among several sources where irrelevant ones are)."""
    max_queries: int | None = None
    """Only the first queries by id."""
    hardest: int = 20
    """How many of the hardest queries are listed."""
    metric: str = "nDCG@10"
    """An ir-measures name; queries are hard by it."""
    encoder: str = "default"
    """Bi-encoder of the dense first stage; `none` leaves BM25 alone."""
    backend: Literal["auto", "jax", "mlx"] = "auto"
    out: Path | None = None
    """The folder to write into; the run's own when absent."""
    cache: Path | None = None
    """Where candidates and scores are kept; $RESONANCE_CACHE or ~/.cache/resonance when absent."""

    def validate(self) -> Args:
        """Return self, or raise a UserError for flags that contradict each other or are out of range."""
        least = (("depth", self.depth, 1), ("max-queries", self.max_queries, 1), ("hardest", self.hardest, 0))
        for flag, value, allowed in least:
            if value is not None and value < allowed:
                raise UserError(f"--{flag} is {value}; allowed: >= {allowed}")
        if self.encoder == "none" and self.first_stage not in (None, "bm25"):
            raise UserError("without an encoder there is BM25 only: leave out --first-stage")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv).validate()
    check_metrics([args.metric])
    say = functools.partial(print, file=sys.stderr)
    directory = resolve_model(args.model, say=say)
    run = directory.absolute().parent
    run = run if (run / "metrics.jsonl").exists() and (run / "config.json").exists() else None
    if run is None and args.out is None:
        raise UserError(
            f"{directory}: is no run's checkpoint, so there is no run's folder: name one with --out"
        )
    for file in analysis_files(args.out or run or ".", args.split).values():
        check_writable(file)
    scorer = load_scorer(directory, args.backend, say=lambda _: None)
    data = load_split_data(args.data, args.split, on_bad_row=args.on_bad_row)
    encoder = None if args.encoder == "none" else load_encoder(args.encoder, args.backend, say=say)
    cache = args.cache or cache_root()
    own_stage, own_depth = fitted_over(directory) or ("rrf", 50)
    stage = args.first_stage or ("bm25" if encoder is None else own_stage)
    depth = args.depth or own_depth
    pool = candidates(data, args.split, encoder, args.judged, depth=depth, cache=cache)[stage]
    analysis = analyse(
        scorer,
        data,
        args.split,
        pool,
        first_stage=stage,
        depth=max(map(len, pool.values()), default=1) if args.judged else depth,
        qrels=chosen_qrels(data, args.split, None, args.max_queries),
        confidence=load_confidences([directory], [scorer]).get(scorer.identity),
        metric=args.metric,
        hardest=args.hardest,
        cache_dir=cache,
    )
    print(tables_text(analysis_tables(analysis)), end="")
    files = write_analysis(args.out or run or ".", args.split, analysis)
    print(f"\nwritten: {', '.join(map(str, files))}")
    if run is not None and args.out is None:
        print(f"report: {write_report(run)}")


if __name__ == "__main__":
    run_command(main)
