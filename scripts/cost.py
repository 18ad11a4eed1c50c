"""What reranking costs, from the throughput that was measured when the models were exported.

example: python scripts/cost.py exports/mine/fp32 exports/mine/int8 --price 0.10

PRICE is what an hour of the machine costs on which scripts/export.py ran, in any currency; the table is for
that machine and those passages. Source models stand beside their exports. Exports of language models are
refused: they are not timed when they are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from common.checkpoint import EXPORT_FILE, read_json
from common.errors import UserError, run_command
from common.export.onnx_generation import KIND as LANGUAGE_KIND
from common.report import Table, tables_markdown, tables_text


@dataclasses.dataclass(frozen=True)
class Args:
    exports: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that scripts/export.py wrote."""
    price: float
    """Of the machine, an hour."""
    depth: int = 50
    """Passages that are reranked for a search."""
    load: float = 0.5
    """Share of the time that a machine may be busy, in (0, 1]: above, queues grow."""
    markdown: bool = False
    """Prints Markdown."""

    def validate(self) -> Args:
        """Return self, or raise a UserError for a flag out of range."""
        if not self.price >= 0 or self.depth < 1 or not 0 < self.load <= 1:
            raise UserError("allowed are --price >= 0, --depth >= 1 and a --load in (0, 1]")
        if not self.exports:
            raise UserError("name at least one folder that scripts/export.py wrote")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv).validate()
    show = tables_markdown if args.markdown else tables_text
    print(show([cost_table(args)]), end="")


def cost_table(args: Args) -> Table:
    """A row for each export and one for each source, by what a million searches cost."""
    found: dict[str, dict[str, Any]] = {}
    for folder in args.exports:
        report = read_json(folder / EXPORT_FILE)
        if report.get("kind") == LANGUAGE_KIND:
            raise UserError(
                f"{folder}: a language model, and this table is of what scores passages; its export was not "
                "timed. Serve it (scripts/serve.py --language-model): at /metrics, "
                "resonance_generated_tokens_total over "
                'resonance_stage_seconds_sum{stage="generate"} are its tokens a second.'
            )
        try:
            checked = report["verification"]
            found |= {f"{folder} (source)": checked["source"], str(folder): checked["export"]}
        except KeyError as error:
            raise UserError(f"{folder / EXPORT_FILE}: lacks {error}. Export it again.") from None
    lines: list[list[str | float | None]] = []
    for name, side in found.items():
        searches = float(side["pairs_per_second"]) / args.depth  # a second, on the whole machine
        million = 1e6 / (searches * args.load * 3600) * args.price
        day = searches * args.load * 86_400
        numbers = (side["ndcg"], side["pairs_per_second"], searches)
        lines.append([name, *(round(number, 3) for number in numbers), f"{day:,.0f}", round(million, 3)])
    note = (
        f"{args.depth} passages a search, machines {args.load:.0%} busy, {args.price:g} an hour; retrieval "
        "and the service itself come on top"
    )
    columns = ["model", "nDCG@10", "pairs/s", "searches/s", "searches a day", "cost of 1,000,000"]
    return {"title": "Cost of reranking", "columns": columns, "rows": lines, "note": note}


if __name__ == "__main__":
    run_command(main)
