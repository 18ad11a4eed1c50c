"""What expansions do for a collection's searches, beside no expansion, RM3 and a template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.backends import Encoder
from common.data.expansion import ExpansionRow, Line, render_lines
from common.data.records import RankingData
from common.expansion.qmd import parse_completion
from common.metrics.expansion import template_expansion
from common.metrics.ranking import evaluate_run, mean
from common.progress import progress
from common.report import Table
from common.reranker.evaluation import Comparison, chosen_qrels, compare
from common.retrieval.expansion import METRIC, RECALL, ExpansionSearch

Expand = Callable[[str], Sequence[Line]]  # of a query, the lines to search with
NO_EXPANSION, RM3, TEMPLATE = "no expansion", "RM3", "template (no model)"


@dataclass(frozen=True)
class EffectRow:
    """A search's mean metrics, and its NDCG@10 against each search named before it, "no expansion" first."""

    name: str
    means: dict[str, float]
    versus: dict[str, Comparison]


@dataclass(frozen=True)
class Effect:
    """What expansions do for the searches of a collection."""

    data: str
    split: str
    queries: int
    dense: str  # name of the encoder; empty: BM25 alone
    depth: int
    rows: tuple[EffectRow, ...]

    def table(self) -> Table:
        """One row a search: NDCG@10, recall@100, difference to no expansion, queries made worse."""
        rows: list[list[str | float | None]] = []
        for row in self.rows:
            versus = row.versus.get(NO_EXPANSION)
            shown = [*difference(versus), versus.worse, versus.better] if versus else [None] * 4
            rows.append([row.name, *row.means.values(), *shown])
        last = self.rows[-1]
        others = "; ".join(
            f"{last.name} − {name}: {difference(versus)[0]}, p = {versus.p:.3g}"
            for name, versus in last.versus.items()
            if name != NO_EXPANSION
        )
        return {
            "title": f"Retrieval on {self.data} {self.split}",
            "columns": ["search", METRIC, RECALL, "Δ NDCG", "p", "worse", "better"],
            "rows": rows,
            "note": (
                f"{self.queries:,} queries; BM25{' and ' + self.dense if self.dense else ' alone'}, fused as "
                f"by QMD, {self.depth} passages a list, no reranker. Δ, p: paired, against no expansion. "
                f"worse, better: share of queries whose NDCG@10 falls or rises. {others}"
            ),
        }


def retrieval_effect(
    data: RankingData,
    split: str,
    expanders: Mapping[str, Expand],
    encoder: Encoder | None = None,
    *,
    depth: int = 100,
    max_queries: int | None = None,
    cache_dir: str | Path | None = None,
) -> Effect:
    """Search a split's queries with no expansion, RM3, the template and each expander, and compare.

    The first `max_queries` queries by id, all by default. Without an encoder the search is BM25 alone, and
    vec and hyde lines find nothing.
    """
    qrels = chosen_qrels(data, split, max_queries=max_queries)
    queries = {query: data.queries[query] for query in qrels}
    search = ExpansionSearch(
        data.corpus, encoder, depth=depth, cache_dir=cache_dir, fingerprint=data.fingerprint
    )
    runs = {NO_EXPANSION: search.run(queries), RM3: search.rm3(queries)}
    for name, expand in {TEMPLATE: template_lines, **expanders}.items():
        lines: dict[str, Sequence[Line]] = {}
        with progress(len(queries), f"{name}: queries expanded") as steps:
            for query, text in queries.items():
                lines[query] = expand(text)
                steps.advance(1)
        runs[name] = search.run(queries, lines)
    values = {name: evaluate_run(run, qrels, (METRIC, RECALL)) for name, run in runs.items()}
    rows: list[EffectRow] = []
    for name, metrics in values.items():
        versus = {row.name: compare(metrics[METRIC], values[row.name][METRIC]) for row in rows}
        rows.append(EffectRow(name, {metric: mean(found) for metric, found in metrics.items()}, versus))
    return Effect(data.name, split, len(queries), encoder.name if encoder else "", depth, tuple(rows))


def template_lines(query: str) -> tuple[Line, ...]:
    """The template's expansion as QMD would search with it."""
    return parse_completion(query, template_expansion(query)).lines


def golden_lines(rows: Sequence[ExpansionRow]) -> Expand:
    """An expander that knows the rows: what golden expansions would do; no line for other queries."""
    known = {row.query: parse_completion(row.query, render_lines(row.lines)).lines for row in rows}
    return lambda query: known.get(query, ())


def difference(versus: Comparison, digits: int = 3) -> tuple[str, float]:
    """A comparison as text, with its interval, and its p."""
    low, high = versus.interval
    return f"{versus.difference:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", versus.p
