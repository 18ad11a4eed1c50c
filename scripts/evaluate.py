"""Compare checkpoints on ranking data: first stages, then each checkpoint alone, fused and portable.

example: python scripts/evaluate.py runs/quantum_resonance/best --data ../shared/data/scifact --depth 20

A TREC run as candidates: --run FILE.trec.gz --qrels qrels_full.tsv. Without checkpoints: first stages alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro

from common.backends import Encoder, Scorer, accelerator, load_encoder, load_scorer
from common.checkpoint import check_writable
from common.config import FirstStage
from common.data.records import OnBadRow, RankingData
from common.data.sources import load_split_data, read_trec_run
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.metrics.calibration import Confidence
from common.metrics.ranking import DEFAULT_METRICS, check_metrics
from common.reranker.evaluation import Table, chosen_qrels, evaluate, held_out, write_output
from common.reranker.prepare import cache_root, candidates
from common.reranker.reranking import fitted_over, load_confidences
from common.runs import environment


@dataclasses.dataclass(frozen=True)
class Args:
    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Checkpoint directories, or names of base models (scored from their start)."""
    data: str = "pydocs"
    """`pydocs`, a file of triples, a BEIR or TREC folder, a hub dataset; several joined by `+`."""
    split: str = "test"
    """Whose queries; `all` takes every query of a file of triples or of a folder with one split, uncut."""
    on_bad_row: OnBadRow = "error"
    first_stage: tuple[FirstStage, ...] | None = None
    """Whose candidates are reranked; several give a block of rows each. When absent those that each
    checkpoint was trained to rerank, and rrf without any."""
    run: Path | None = None
    """A TREC run whose candidates are reranked instead."""
    qrels: Path | None = None
    """Judgements that replace the split's: .tsv (BEIR) or TREC form; may name passages outside the data."""
    judged: bool = False
    """Rank exactly the judged passages of each query (among several sources where irrelevant ones are)."""
    depth: int | None = None
    """Candidates of a query, the first stage's best; when absent as many as a checkpoint was trained to
    rerank, and 50 without any."""
    max_queries: int | None = None
    """Only the first queries by id."""
    metrics: tuple[str, ...] = DEFAULT_METRICS
    """ir-measures names; the first one is tested. R@k and Success@k beyond the depth are named by it."""
    encoder: str = "default"
    """Bi-encoder of the dense first stage; `none` leaves BM25 alone."""
    backend: Literal["auto", "jax", "mlx", "onnx"] = "auto"
    seed: int = 0
    """Of the tests and intervals."""
    per_query: Path | None = None
    """Writes every query's values to this TSV file."""
    json: str | None = None
    """Writes the table to this JSON file; `-` prints it instead of the table."""
    cache: Path | None = None
    """Where candidates and scores are kept; $RESONANCE_CACHE or ~/.cache/resonance when absent."""

    def validate(self) -> Args:
        """Return self, or raise a UserError for flags that contradict each other or are out of range."""
        for flag, value in (("depth", self.depth), ("max-queries", self.max_queries)):
            if value is not None and value < 1:
                raise UserError(f"--{flag} is {value}; allowed: >= 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; allowed: >= 0")
        if self.run and (self.judged or self.first_stage):
            raise UserError("--run brings its own candidates: leave out --first-stage and --judged")
        if self.judged and self.qrels:
            raise UserError("--judged ranks what the split judges: leave out --qrels")
        if self.encoder == "none" and set(self.first_stage or ("bm25",)) != {"bm25"}:
            raise UserError("without an encoder there is BM25 only: leave out --first-stage")
        if self.first_stage == () or not self.metrics:
            raise UserError("--first-stage and --metrics need at least one name each")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv).validate()
    for file in (args.json, args.per_query):
        if file not in (None, "-"):
            check_writable(Path(file))
    check_metrics(args.metrics)
    say = functools.partial(print, file=sys.stderr)
    directories = [resolve_model(model, say=say) for model in args.models]
    scorers = [load_scorer(directory, args.backend, say=lambda _: None) for directory in directories]
    confidences = load_confidences(directories, scorers)
    pools, depth = over(args, directories, say)
    data = load_split_data(args.data, args.split, on_bad_row=args.on_bad_row)
    if data.parts and (args.run or args.qrels):
        raise UserError("--run and --qrels belong to one source: give --data a single one")
    encoder = None
    if args.encoder != "none" and args.run is None:
        # the retriever is exported or not, as it comes: --backend onnx speaks of the checkpoints
        encoder = load_encoder(args.encoder, "auto" if args.backend == "onnx" else args.backend, say=say)
    tables = [
        evaluate_source(
            dataclasses.replace(args, judged=judged, first_stage=pools, depth=depth),
            part,
            scorers,
            encoder,
            confidences,
        )
        for part, judged in held_out(data, args.split, args.judged)
    ]
    found = tables[0].json() if not data.parts else {"sources": [table.json() for table in tables]}
    found["environment"] = environment(accelerator(args.backend))
    result = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    print(result if args.json == "-" else "\n".join(table.text() for table in tables), end="")
    if args.json not in (None, "-"):
        write_output(args.json, result)
    if args.per_query is not None:
        write_output(args.per_query, "".join("\t".join(row) + "\n" for row in per_query(tables)))


def over(
    args: Args, directories: Sequence[Path], say: Callable[[str], None]
) -> tuple[tuple[FirstStage, ...], int]:
    """The first stages to rerank and how deep: as asked, else what the checkpoints were trained for. Says
    where a fusion weight was chosen over another first stage."""
    fitted = dict(zip(args.models, map(fitted_over, directories), strict=True))
    own = tuple(dict.fromkeys(found[0] for found in fitted.values() if found))
    depth = args.depth or max((found[1] for found in fitted.values() if found), default=50)
    pools = args.first_stage or (("bm25",) if args.encoder == "none" else own or ("rrf",))
    for model, found in fitted.items():
        if args.run is None and found and (other := [pool for pool in pools if pool != found[0]]):
            say(f"note: the fusion weight of {model} was chosen over {found[0]}, not over {', '.join(other)}")
    return pools, depth


def per_query(tables: Sequence[Table]) -> Iterator[tuple[str, ...]]:
    """Every query's values; of several sources with the source in front, under one header."""
    for number, table in enumerate(tables):
        header, *rows = table.per_query()
        name = (table.data,) if len(tables) > 1 else ()
        yield from [] if number else [("source", *header) if name else header]
        yield from ((*name, *row) for row in rows)


def evaluate_source(
    args: Args,
    data: RankingData,
    scorers: Sequence[Scorer],
    encoder: Encoder | None,
    confidences: Mapping[str, Confidence],
) -> Table:
    """The table of one source."""
    say = functools.partial(print, file=sys.stderr)
    assert args.first_stage is not None and args.depth is not None
    cache = args.cache or cache_root()
    qrels = chosen_qrels(data, args.split, args.qrels, args.max_queries, say=say)
    if args.run is not None:
        stages, pools = {"run": read_trec_run(args.run)}, ("run",)
    else:
        outside = sum(query not in data.split(args.split) for query in qrels)
        if outside:
            raise UserError(
                f"{args.qrels}: {outside} of its {len(qrels)} queries are not in split {args.split!r} "
                "and have no candidates; name their split with --split, or bring candidates with --run"
            )
        stages = candidates(data, args.split, encoder, args.judged, depth=args.depth, cache=cache)
        pools = tuple(dict.fromkeys(args.first_stage))
    return evaluate(
        data,
        args.split,
        stages,
        scorers,
        depth=max(map(len, stages[pools[0]].values()), default=1) if args.judged else args.depth,
        pools=pools,
        cache_dir=cache,
        metrics=args.metrics,
        qrels=qrels,
        confidences=confidences,
        seed=args.seed,
    )


if __name__ == "__main__":
    run_command(main)
