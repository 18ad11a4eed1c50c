"""Rank passages for a query with a trained reranker.

example: python scripts/rerank.py --model runs/quantum_resonance/best --query "sort a list" --passages FILE

FILE holds one passage a line, or is a .jsonl of {"id", "text", "title"}; `-` reads lines from standard input.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import Literal

import tyro

from common.backends import load_scorer
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.reranker.reranking import load_confidence, read_passages, rerank, shown


@dataclasses.dataclass(frozen=True)
class Args:
    model: str
    """A checkpoint directory, or the name of a base model."""
    query: str
    passages: str
    """A file of passages, or `-`."""
    top: int | None = None
    """Shows only the first ones; all are ranked."""
    json: bool = False
    """Prints one JSON object instead of lines."""
    backend: Literal["auto", "jax", "mlx", "onnx"] = "auto"


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv)
    if args.top is not None and args.top < 1:
        raise UserError(f"--top is {args.top}; allowed: >= 1")
    say = functools.partial(print, file=sys.stderr)
    passages = read_passages(args.passages)
    directory = resolve_model(args.model, say=say)
    scorer = load_scorer(directory, args.backend, say=lambda _: None)
    ranking = rerank(scorer, args.query, passages, load_confidence(directory))
    if args.json:
        cut = dataclasses.replace(ranking, passages=ranking.passages[: args.top])
        print(json.dumps(dataclasses.asdict(cut), indent=2, ensure_ascii=False))
    else:
        print(shown(ranking, args.top))


if __name__ == "__main__":
    run_command(main)
