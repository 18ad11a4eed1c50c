"""Watch a service by its searches and feedback: quality, speed, drift, and when to retrain.

example: python scripts/monitor.py feedback.sqlite --page monitor.html
         python scripts/monitor.py feedback.sqlite --hard-cases hard.jsonl --index my_index
         python scripts/train.py --config configs/quantum_retrain.py --model.base MODEL --data hard.jsonl

It says "retrain" when the last window's NDCG@10 on feedback is more than 5 % below all that was before, and a
one-sided permutation test gives p < 0.05 for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import tyro

from common.checkpoint import check_writable
from common.errors import UserError, run_command
from common.report import tables_text
from common.reranker.evaluation import write_output
from common.retrieval.index import passage_texts
from common.service.feedback import FeedbackStore
from common.service.monitoring import hard_cases, monitor, monitoring_page, monitoring_tables


@dataclasses.dataclass(frozen=True)
class Args:
    store: tyro.conf.Positional[Path]
    """The SQLite file that the service writes."""
    days: float = 7.0
    """Length of a window; the last one ends now."""
    json: Path | None = None
    """Writes everything as JSON."""
    page: Path | None = None
    """Writes an HTML page."""
    hard_cases: Path | None = None
    """Writes what was ranked wrong as training rows (JSONL); needs --index."""
    index: Path | None = None
    """The folder of the service's index, for the texts."""
    check: bool = False
    """Ends with exit code 1 when the verdict is retrain."""


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(Args, description=__doc__, args=argv)
    if args.hard_cases is not None and args.index is None:
        raise UserError("--hard-cases needs the texts: name the service's index folder (--index)")
    if not args.store.exists():
        raise UserError(f"{args.store}: there is no such file; name the one that the service writes")
    for path in (args.json, args.page, args.hard_cases):
        if path is not None:
            check_writable(path)
    store = FeedbackStore(args.store)
    found = monitor(store, days=args.days)
    print(tables_text(monitoring_tables(found)), end="")
    if args.json is not None:
        write_output(args.json, json.dumps(found.json(), indent=2) + "\n")
    if args.page is not None:
        write_output(args.page, monitoring_page(found))
    if args.hard_cases is not None and args.index is not None:
        write_hard_cases(store, args.index, args.hard_cases)
    print(f"\n{found.verdict.verdict}: {found.verdict.why}")
    return int(args.check and found.verdict.verdict == "retrain")


def write_hard_cases(store: FeedbackStore, index: Path, path: Path) -> None:
    """The rows that configs/quantum_retrain.py takes as --data; UserError when there are none."""
    searches, votes = list(store.searches()), list(store.feedback())
    voted = {vote.search for vote in votes}
    ids = {item.id for s in searches if s.id in voted for item in (*s.first_stage, *s.reranked)}
    rows, lost = hard_cases(searches, votes, passage_texts(index, ids))
    if not rows:
        raise UserError(f"{store.path}: no hard case yet, {lost} were lost because a text is not in {index}")
    write_output(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(
        f"\n{path}: {len(rows)} hard cases" + (f", {lost} left out: no text, or no negative" if lost else "")
    )


if __name__ == "__main__":
    run_command(main)
