"""The checklist after training a language model: each item with its value, its limit, and pass or fail.

example: python scripts/validate.py runs/infinito_small --max-perplexity 80

Looks at the run's log and evaluation (loss, perplexity, distillation weight, phase and magnitude, memory) and
at its checkpoint (strict loading, finite weights, what it writes). Exits with 1 when an item fails. Of a
checkpoint outside a run only the second part is known. A perplexity up to 80 is the source's hope; the other
limits are this project's: change them by flags.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from common.backends import checkpoint_name
from common.checkpoint import MODEL_FILE
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.language.checklist import Item, Limits, check_model, items_json, passed, result
from common.language.dashboard import read_run
from common.report import Table, tables_text


@dataclasses.dataclass(frozen=True)
class Args(Limits):
    model: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """A run's folder (its best/ is checked), or a checkpoint directory."""
    max_new_tokens: int = 64
    """Of each text that is generated."""
    seed: int = 0
    json: bool = False
    """Print the items as JSON."""
    backend: Literal["auto", "jax", "mlx"] = "auto"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = tyro.cli(Args, args=words, description=__doc__)
    wrong = args.problems()
    if args.max_new_tokens < 1:
        wrong.append(f"--max-new-tokens is {args.max_new_tokens}; allowed: >= 1")
    if args.seed < 0:
        wrong.append(f"--seed is {args.seed}; allowed: >= 0")
    if wrong:
        raise UserError("; ".join(wrong))
    directory = checkpoint_of(args.model)
    items = check_model(directory, args, backend=args.backend, new_tokens=args.max_new_tokens, seed=args.seed)
    name, good = checkpoint_name(directory), passed(items)
    if args.json:
        print(json.dumps({"model": name, "passed": good, "items": items_json(items)}, indent=2))
    else:
        print(tables_text([checklist_table(name, items)]))
    return 0 if good else 1


def checkpoint_of(model: str) -> Path:
    """The checkpoint to check. UserError for no run, a reranker's, and one that has not been evaluated."""
    place = Path(model).expanduser()
    if not _weights(place) and (place / "config.json").exists():
        read_run(place)
        if not _weights(place / "best"):
            raise UserError(
                f"{place}: has not been evaluated yet, there is no best/; let its training reach the first "
                "evaluation of dev (the same command goes on)"
            )
    return resolve_model(model, say=lambda _: None)


def _weights(directory: Path) -> bool:
    return (directory / MODEL_FILE).exists() or any(directory.glob("*.safetensors*"))


def checklist_table(name: str, items: Sequence[Item]) -> Table:
    """A row an item; the note counts."""
    counts = [sum(item.passed is what for item in items) for what in (True, False, None)]
    return {
        "title": f"Checklist of {name}",
        "columns": ["item", "value", "limit", "result"],
        "rows": [
            [item.name, item.value, item.limit, result(item) + (f": {item.why}" if item.why else "")]
            for item in items
        ],
        "note": f"{counts[0]} passed, {counts[1]} failed, {counts[2]} do not apply.",
    }


if __name__ == "__main__":
    run_command(main)
