"""QMD's score and the strict one of some expansions, and what they do for a search; no model is needed.

    python examples/qmd/score_answers.py

Time on 2 CPU cores: seconds.
"""

from __future__ import annotations

from common.data.expansion import render_lines
from common.data.generated import generated_collection, generated_rows
from common.errors import run_command
from common.metrics.expansion import score, score_strict
from common.retrieval.expansion import RetrievalGain


def main() -> None:
    """Print a line for a golden answer, one without new words, and an echo."""
    row = next(row for row in generated_rows()[0] if row.category == "how-to")
    query = row.query
    answers = {
        "golden": render_lines(row.lines),
        "padded": f"lex: {query} guide\nvec: an overview of {query}\nhyde: This document explains {query}.",
        "echo": f"lex: {query}",
    }
    gain = RetrievalGain(generated_collection(), "train")  # BM25 alone: no encoder
    print(f"query: {query}")
    for name, text in answers.items():
        form, strict = score(query, text).percentage, score_strict(query, text).percentage
        reward = gain(query, text)
        print(f"{name}: QMD's score {form:.0f} %, strict {strict:.0f} %, gain {reward:+.2f}")


if __name__ == "__main__":
    run_command(main)
