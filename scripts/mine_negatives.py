"""Mine hard negatives for the training queries of ranking data, by BM25, dense retrieval or a cross-encoder.

example: python scripts/mine_negatives.py --data my_pairs.jsonl --by dense --out mined.jsonl

Then train on them: python scripts/train.py --data my_pairs.jsonl --data.mined mined.jsonl. A teacher
(--teacher MODEL) leaves out what it finds as good as the positives; its scores are then the ones written, for
the objectives margin_mse and soft_labels.
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
from common.checkpoint import check_writable
from common.data.negatives import MiningRules, rows
from common.data.records import OnBadRow
from common.data.sources import load_split_data
from common.errors import UserError, run_command
from common.reranker.evaluation import write_output
from common.reranker.mining import Miner, mine_negatives


@dataclasses.dataclass(frozen=True)
class Args:
    data: str
    """Ranking data, as --data.name of a recipe."""
    out: Path
    """The JSONL file to write."""
    by: Miner = "dense"
    """Whose ranking and scores the rules read; `cross-encoder` ranks again what BM25 and dense find."""
    model: str | None = None
    """The cross-encoder of --by cross-encoder."""
    teacher: str | None = None
    """A cross-encoder that finds false negatives."""
    form: Literal["tuple", "list", "triplet"] = "tuple"
    """A row for each query, positives and negatives apart or with labels; or one for each pair of them. For
    `list` see sentence-transformers; this project trains on the other two."""
    split: str = "train"
    """Whose queries; `all` takes every query of a file of triples or of a folder with one split, uncut."""
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
    check_writable(args.out)
    data = load_split_data(args.data, args.split, on_bad_row=args.on_bad_row)
    scorer, teacher = (
        None if model is None else load_scorer(model, args.backend, say=say)
        for model in (args.model, args.teacher)
    )
    encoder = None if args.by == "bm25" else load_encoder(args.encoder, args.backend, say=say)
    mined, lost = mine_negatives(
        data, args.split, args.rules, by=args.by, encoder=encoder, scorer=scorer, teacher=teacher
    )
    lines = [json.dumps(row, ensure_ascii=False) for item in mined for row in rows(data, item, args.form)]
    write_output(args.out, "\n".join(lines) + "\n")
    count = sum(len(item.negatives) for item in mined)
    print(f"{args.out}: {len(lines):,} rows, {count:,} negatives of {len(mined):,} queries, by {args.by}")
    for reason, number in sorted(lost.items()):
        print(f"left out: {number:,} {reason}")


if __name__ == "__main__":
    run_command(main)
