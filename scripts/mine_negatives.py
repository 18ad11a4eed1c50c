"""Mine hard negatives for the training queries of ranking data, by BM25, dense retrieval or a cross-encoder.

example: python scripts/mine_negatives.py --data my_pairs.jsonl --by dense --out mined.jsonl

Then train on them: python scripts/train.py --data mined.jsonl --data.negatives given. A teacher (--teacher
MODEL) leaves out what it finds as good as the positives; its scores are then the ones written, for the
objectives margin_mse and soft_labels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.backends import load_encoder, load_scorer
from common.data.negatives import MiningRules, mine, rows
from common.data.records import OnBadRow, Qrels, RankingData, Run
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.evaluation import score_pairs, write_output
from common.metrics.ranking import ranked
from common.prepare import cache_root
from common.retrieval.candidates import first_stages, judged_stages


@dataclasses.dataclass(frozen=True)
class Args:
    data: str
    """Ranking data, as --data.name of a recipe."""
    out: Path
    """The JSONL file to write."""
    by: Literal["bm25", "dense", "cross-encoder"] = "dense"
    """Whose ranking and scores the rules read; `cross-encoder` ranks again what BM25 and dense find."""
    model: str | None = None
    """The cross-encoder of --by cross-encoder."""
    teacher: str | None = None
    """A cross-encoder that finds false negatives."""
    form: Literal["tuple", "list", "triplet"] = "tuple"
    """A row for each query, positives and negatives apart or with labels; or one for each pair of them."""
    split: str = "train"
    encoder: str = "default"
    """The bi-encoder of dense retrieval."""
    rules: Annotated[MiningRules, tyro.conf.arg(name="")] = dataclasses.field(default_factory=MiningRules)
    on_bad_row: OnBadRow = "error"
    backend: Literal["auto", "jax", "mlx"] = "auto"

    def validate(self) -> Args:
        """Return self, or raise a UserError for flags that contradict each other or are out of range."""
        if (self.by == "cross-encoder") != (self.model is not None):
            raise UserError("--by cross-encoder and --model MODEL go together")
        if self.rules.teacher_margin and self.teacher is None:
            raise UserError("--teacher-margin needs --teacher")
        self.rules.validate()
        return self


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv).validate()
    say = functools.partial(print, file=sys.stderr)
    data = load_ranking_data(args.data, on_bad_row=args.on_bad_row)
    qrels = {
        query: {passage: grade for passage, grade in grades.items() if grade > 0}
        for query, grades in data.split(args.split).items()
    }
    found, own = scored_candidates(args, data, qrels)
    teacher = None
    if args.teacher is not None:
        pairs = {query: [*found.get(query, {}), *grades] for query, grades in qrels.items()}
        teacher = score_pairs(load_scorer(args.teacher, args.backend, say=say), data, pairs, cache_root())[
            "score"
        ]
    mined, lost = mine(data, qrels, found, own, args.rules, teacher)
    if not mined:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
        raise UserError(f"no negative fits the rules ({reasons}); widen the ranks or lower the margins")
    lines = [json.dumps(row, ensure_ascii=False) for item in mined for row in rows(data, item, args.form)]
    write_output(args.out, "\n".join(lines) + "\n")
    count = sum(len(item.negatives) for item in mined)
    print(f"{args.out}: {len(lines):,} rows, {count:,} negatives of {len(mined):,} queries, by {args.by}")
    for reason, number in sorted(lost.items()):
        print(f"left out: {number:,} {reason}")


def scored_candidates(args: Args, data: RankingData, qrels: Qrels) -> tuple[Run, Run]:
    """The candidates of each query with their scores, and the positives' scores, by the same scorer."""
    say = functools.partial(print, file=sys.stderr)
    queries = {query: data.queries[query] for query in sorted(qrels)}
    depth = args.rules.last_rank + max(map(len, qrels.values()), default=0)
    encoder = None if args.by == "bm25" else load_encoder(args.encoder, args.backend, say=say)
    if args.by != "cross-encoder":
        runs = first_stages(data, queries, encoder, depth, cache_root(), (args.by,))
        return runs[args.by], judged_stages(data, qrels, encoder, cache_root(), (args.by,))[args.by]
    assert args.model is not None
    pool = first_stages(data, queries, encoder, depth, cache_root(), ("rrf",))["rrf"]
    pairs = {query: list(dict.fromkeys((*ranked(pool[query], depth), *qrels[query]))) for query in qrels}
    scores = score_pairs(load_scorer(args.model, args.backend, say=say), data, pairs, cache_root())["score"]
    own = {query: {passage: scores[query][passage] for passage in grades} for query, grades in qrels.items()}
    return scores, own


if __name__ == "__main__":
    run_command(main)
