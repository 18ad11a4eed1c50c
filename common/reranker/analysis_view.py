"""An analysis (common.reranker.analysis) as tables, as a figure and as a self-contained page."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from common.report import Table, page, table_html

_RELEVANT, _OTHER, _INK = "#2563eb", "#d97706", "#475569"
_MEANING = {
    "score": "full score s",
    "resonance": "resonance r = Re⟨ψ_q|ψ_d⟩",
    "overlap": "overlap BC of the magnitudes",
    "coherence": "coherence R of the phases",
}
_LINES = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed")
_SHORT = 36  # characters of a text in a table


def analysis_tables(analysis: Mapping[str, Any]) -> list[Table]:
    """What tells relevant pairs from others, the confidence, the hardest queries."""
    where = f"{analysis['data']} {analysis['split']}"
    candidates = f"top {analysis['depth']} of {analysis['first_stage']}"
    tables: list[Table] = [
        {
            "title": f"{analysis['model']} on {where}: relevant and other pairs",
            "columns": ["quantity", "relevant", "[5%, 95%]", "other", "[5%, 95%]", "AUC"],
            "rows": [
                [
                    _MEANING[name],
                    part["relevant"]["mean"],
                    _range(part["relevant"]),
                    part["other"]["mean"],
                    _range(part["other"]),
                    part["auc"],
                ]
                for name, part in analysis["quantities"].items()
            ],
            "note": (
                f"{analysis['queries']:,} queries, {analysis['pairs']:,} pairs: the {candidates} and the "
                f"relevant passages ({analysis['relevant_pairs']:,}). AUC: chance that a relevant pair has "
                f"the greater value. {analysis['metric']} of the reranked candidates "
                f"{analysis['value']:.3f}. Data {analysis['fingerprint']}."
            ),
        },
    ]
    if analysis["confidence"]:
        tables.append(confidence_table([{"": "", **row} for row in analysis["confidence"]], candidates))
    tables.append(
        {
            "title": f"The hardest queries: lowest {analysis['metric']}",
            "columns": ["query", analysis["metric"], "rank", "lead", "relevant passage", "ranked first"],
            "rows": [
                [
                    _short(row["query"]),
                    row[analysis["metric"]],
                    str(row["rank"]),
                    row["lead"],
                    _short(row["relevant"]),
                    _short(row["top"]),
                ]
                for row in analysis["hardest"]
            ],
            "note": (
                "rank: of the first relevant passage; lead: by how much the first score exceeds its score. "
                f"{analysis['without_relevant_candidate']:,} more queries have no relevant candidate."
            ),
        }
    )
    return tables


def confidence_table(rows: Sequence[Mapping[str, Any]], candidates: str) -> Table:
    """Calibration error and AUROC; a row has the fields of confidence.ConfidenceResult, and may name
    its ranking first, under an empty key."""
    return {
        "title": "Confidence that the top passage is relevant",
        "columns": ["confidence", "queries", "top relevant", "ECE", "AUROC"],
        "rows": [
            [
                ", ".join(filter(None, (row[""], row["what"]))),
                f"{row['queries']:,}",
                row["accuracy"],
                row["ece"],
                row["auroc"],
            ]
            for row in rows
        ],
        "note": (
            f"Over the {candidates}. ECE: expected calibration error, 15 bins of equally many queries. "
            "AUROC: chance that a query whose top passage is relevant has the greater confidence. Alone, a "
            "number is read as a probability as it is: sigmoid of the top score, 1 − normalised entropy, "
            "margin of the two highest probabilities, resonance of the top passage."
        ),
    }


def analysis_figure(analysis: Mapping[str, Any]) -> Any:
    """A matplotlib figure: the four distributions, how they tell pairs apart, and reliability."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": "sans-serif", "text.color": _INK, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11.0, 6.4), layout="constrained")
        axes = figure.subplots(2, 3).flatten()
        for axis, (name, part) in zip(axes[:4], analysis["quantities"].items(), strict=True):
            _draw_distribution(axis, name, part)
        _draw_auc(axes[4], analysis["quantities"])
        _draw_reliability(axes[5], analysis["confidence"])
        where = (
            f"{analysis['model']}: {analysis['data']} {analysis['split']}, {analysis['queries']:,} queries"
        )
        figure.suptitle(where, fontsize=11, x=0.01, ha="left", color=_INK)
    return figure


def analysis_section(analysis: Mapping[str, Any]) -> str:
    """The analysis as a part of a page: its figure, drawn as SVG, and its tables."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        analysis_figure(analysis).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    title = f"Analysis of {analysis['model']} on {analysis['data']} {analysis['split']}"
    tables = "".join(map(table_html, analysis_tables(analysis)))
    return f"<h2>{escape(title)}</h2><figure>{svg[svg.index('<svg') :]}</figure>{tables}"


def analysis_page(analysis: Mapping[str, Any]) -> str:
    """A self-contained page about one analysis."""
    title = f"Analysis of {analysis['model']}"
    return page(title, f"<h1>{escape(title)}</h1>\n{analysis_section(analysis)}")


def _draw_distribution(axis: Any, name: str, part: Mapping[str, Any]) -> None:
    edges = part["edges"]
    for which, colour in (("other", _OTHER), ("relevant", _RELEVANT)):
        counts = part[which]["histogram"]
        share = [count / max(1, sum(counts)) for count in counts]
        axis.stairs(share, edges, fill=True, color=colour, alpha=0.45, label=which)
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(_MEANING[name], fontsize=9, color=_INK)
    axis.set_ylabel("share of pairs", fontsize=9, color=_INK)
    axis.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _dress(axis)


def _draw_auc(axis: Any, quantities: Mapping[str, Any]) -> None:
    names = list(quantities)[::-1]
    values = [quantities[name]["auc"] for name in names]
    axis.barh(names, values, color=_RELEVANT, alpha=0.7, height=0.55)
    for place, value in enumerate(values):
        axis.text(value + 0.01, place, f"{value:.3f}", va="center", fontsize=8, color=_INK)
    axis.axvline(0.5, color=_INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0.0, 1.12)
    axis.set_xlabel("AUC, relevant against other pairs", fontsize=9, color=_INK)
    _dress(axis)


def _draw_reliability(axis: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy over confidence by bins; on the diagonal a confidence means what it says."""
    axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
    for colour, result in zip(_LINES, results, strict=False):
        confidence, accuracy, _ = zip(*result["bins"], strict=True)
        axis.plot(
            confidence, accuracy, marker="o", markersize=3, linewidth=1.2, color=colour, label=result["what"]
        )
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("confidence", fontsize=9, color=_INK)
    axis.set_ylabel("share with a relevant top passage", fontsize=9, color=_INK)
    if results:
        axis.legend(frameon=False, fontsize=7, labelcolor=_INK)
    _dress(axis)


def _dress(axis: Any) -> None:
    axis.tick_params(colors=_INK, labelsize=8, length=0)
    axis.grid(color=_INK, alpha=0.15, linewidth=0.6)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)


def _range(part: Mapping[str, Any]) -> str:
    return f"[{part['quantiles']['0.05']:.3f}, {part['quantiles']['0.95']:.3f}]"


def _short(text: str) -> str:
    return textwrap.shorten(text, _SHORT, placeholder=" …")
