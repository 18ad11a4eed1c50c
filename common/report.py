"""One self-contained page about a run: result, curves, recipe, versions; no scripts, nothing loaded."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from common.checkpoint import read_json, write_file
from common.progress import clock
from common.runs import RESULTS_FILE, Metrics, read_metrics


class Table(TypedDict, total=False):
    """A table of results.json: cells are text, numbers or null; `note` says depth, queries and the test."""

    title: str
    columns: list[str]
    rows: list[list[str | float | None]]
    note: str


Series = tuple[list[int], list[float]]  # steps, values
Curve = tuple[Sequence[float], Sequence[float]]

_RANKING = re.compile(r"@|^(AP|RR|MAP|MRR)\b")
# A panel's title, the kind of line it is drawn from, and which quantities; the first that matches takes it.
_PANELS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("Ranking on dev", "dev", _RANKING),
    (
        "Loss terms",
        "train",
        re.compile(r"loss|^(total|rank|superposition|listwise|bce|portable|resonance|entangle|preserve)"),
    ),
    ("Temperature", "train", re.compile(r"temperature|^tau")),
    ("Mean entropy of a list (nats)", "train", re.compile(r"^(mean_)?entropy(?!_bonus)")),
    ("Learning rate", "train", re.compile(r"learning_rate|^lr$")),
    ("Gradient norm", "train", re.compile(r"grad")),
)
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
INK = "#64748b"  # reads on a light and on a dark page

_STYLE = """
:root { color-scheme: light dark; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --page: #f8fafc;
  --card: #fff; --mark: #2563eb }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --soft: #94a3b8; --line: #334155;
  --page: #0f172a; --card: #1e293b; --mark: #60a5fa } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; background: var(--page); 
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
p.lead, p.note { color: var(--soft); margin: .35rem 0 0 } p.note { font-size: .87rem }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 0 }
.card { flex: 1 1 9rem; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.card span { color: var(--soft); font-size: .82rem }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .9rem; text-align: right; white-space: nowrap }
tr + tr td { border-top: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; font-size: .82rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } td.best { font-weight: 700; color: var(--mark) }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem }
@media (max-width: 52rem) { .panels { grid-template-columns: minmax(0, 1fr) } }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem } figure svg { display: block; width: 100%; height: auto }
.pairs td { text-align: left; font-size: .87rem; white-space: normal; padding: .25rem .9rem }
.pairs td:first-child { color: var(--soft); width: 1%; white-space: nowrap }
.pairs td { overflow-wrap: anywhere }
.panels.settings { align-items: start; margin-top: 2rem }
summary { cursor: pointer; font-weight: 600; margin-bottom: .5rem }
"""


def write_report(directory: str | Path) -> Path:
    """Write report.html of a run from its config.json and metrics.jsonl, and from results.json and
    analysis-*.json where there are any.

    Raises UserError when a file is broken or config.json is missing, OSError when the page cannot be written.
    """
    # which are drawn with this module's tables and charts
    from common.language.dashboard import DRAWN, dashboard_section, is_language_run, read_run
    from common.reranker.analysis_view import analysis_section

    directory = Path(directory)
    run = read_json(directory / "config.json")
    metrics = read_metrics(directory)
    language = bool(metrics) and is_language_run(run)
    results = directory / RESULTS_FILE
    tables: list[Table] = read_json(results)["tables"] if results.exists() else []
    environments = run["environments"]
    body = [
        f"<h1>{escape(directory.resolve().name)}</h1>",
        f'<p class="lead">{escape(_lead(run))}</p>',
        _cards(metrics),
        *(table_html(table) for table in tables),
        *(analysis_section(read_json(file)) for file in sorted(directory.glob("analysis-*.json"))),
        dashboard_section(read_run(directory)) if language else "",
        "<h2>Training</h2>",
        f'<div class="panels">{"".join(_panels(metrics, DRAWN if language else ()))}</div>'
        if metrics
        else "<p>Nothing was logged yet.</p>",
        '<div class="panels settings">',
        _details("Recipe", _pairs(run["config"])),
        *(_details("Environment", _pairs(item)) for item in environments),
        "</div>",
    ]
    path = directory / "report.html"
    write_file(path, page(directory.resolve().name, "\n".join(body)).encode())
    return path


def tables_text(tables: Sequence[Table], width: int = 150) -> str:
    """The same tables for a terminal: title, rows, note."""
    from rich.console import Console
    from rich.table import Table as Grid

    out = io.StringIO()
    # in a notebook rich would show the text instead of giving it
    console = Console(
        file=out, width=width, highlight=False, markup=False, no_color=True, force_jupyter=False
    )
    for table in tables:
        grid = Grid(box=None, pad_edge=False, header_style="")
        for place, name in enumerate(table["columns"]):
            grid.add_column(name, justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
        for row in table["rows"]:
            grid.add_row(*map(_text, row))
        console.print(f"\n{table.get('title', 'Result')}")
        console.print(grid)
        if table.get("note"):
            console.print(table["note"])
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def tables_markdown(tables: Sequence[Table]) -> str:
    """The same tables in Markdown."""
    parts = []
    for table in tables:
        rows = [table["columns"], ["---", *["---:"] * (len(table["columns"]) - 1)]]
        rows += [[_text(cell).replace("|", "\\|") for cell in row] for row in table["rows"]]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(
            "\n".join([f"**{table.get('title', 'Result')}**", "", *lines, "", table.get("note", "")])
        )
    return "\n\n".join(parts).rstrip() + "\n"


def page(title: str, body: str) -> str:
    """A whole HTML page with the report's style; nothing is loaded."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def line_chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], below: str = "step") -> str:
    """A chart of named curves, each (x, y) by rising x, as a part of a page; `below` names the x axis."""
    unzipped: dict[str, Curve] = {
        name: ([x for x, _ in curve], [y for _, y in curve]) for name, curve in curves.items()
    }
    return figure_html(chart(title, unzipped, below))


def _lead(run: Mapping[str, Any]) -> str:
    """One line: base, data, when, where and from which commit."""
    config, here = run["config"], run["environments"][-1]
    commit = here.get("git_commit")
    parts = (
        ("base ", (config.get("model") or {}).get("base")),
        ("data ", (config.get("data") or {}).get("name")),
        ("fingerprint ", run.get("data_fingerprint")),
        ("", here.get("device")),
        ("started ", run["environments"][0].get("started")),
        ("commit ", commit and commit[:10] + ("+changes" if commit.endswith("+changes") else "")),
    )
    return " · ".join(f"{label}{value}" for label, value in parts if value)


def _cards(metrics: Sequence[Metrics]) -> str:
    """The few numbers to see first: dev before and best, steps, time."""
    if not metrics:
        return ""
    cards = [(f"{metrics[-1]['step']:,}", "steps"), (clock(max(line["seconds"] for line in metrics)), "time")]
    curves = [(name, curve) for name, curve in series(metrics, "dev").items() if _RANKING.search(name)]
    if curves:
        name, (steps, values) = curves[0]
        best = max(range(len(values)), key=values.__getitem__)
        cards.insert(0, (f"{values[best]:.3f}", f"best dev {name}, step {steps[best]:,}"))
        if len(values) > 1:
            cards.insert(
                1, (f"{values[best] - values[0]:+.3f}", f"since step {steps[0]:,} ({values[0]:.3f})")
            )
    inner = "".join(f'<div class="card"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in cards)
    return f'<div class="cards">{inner}</div>'


def table_html(table: Table) -> str:
    """A table as a part of a page: title, rows, note."""
    columns, rows = table["columns"], table["rows"]
    best = [_best(name, [row[i] for row in rows]) for i, name in enumerate(columns)]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = "".join(
        "<tr>" + "".join(_cell(cell, top) for cell, top in zip(row, best, strict=True)) + "</tr>"
        for row in rows
    )
    note = f'<p class="note">{escape(table["note"])}</p>' if table.get("note") else ""
    return (
        f"<h2>{escape(table.get('title', 'Result'))}</h2>"
        f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>{note}'
    )


def _best(column: str, cells: Sequence[object]) -> float | None:
    """The value to mark: the highest of a ranking metric's column, when there is something to compare."""
    numbers = [cell for cell in cells if isinstance(cell, float)]
    return max(numbers) if _RANKING.search(column) and len(numbers) > 1 else None


def _cell(cell: object, best: float | None) -> str:
    mark = ' class="best"' if best is not None and cell == best else ""
    return f"<td{mark}>{escape(_text(cell))}</td>"


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2g}"
    return str(value)


def _setting(value: object) -> str:
    """A value of the recipe, as it would be typed."""
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _pairs(values: Mapping[str, Any], prefix: str = "") -> str:
    """Rows of a two-column table, nested settings under dotted names."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.append(_pairs(value, f"{prefix}{key}."))
        else:
            rows.append(f"<tr><td>{escape(prefix + key)}</td><td>{escape(_setting(value))}</td></tr>")
    return "".join(rows)


def _details(title: str, rows: str) -> str:
    return (
        f"<details open><summary>{escape(title)}</summary>"
        f'<div class="scroll"><table class="pairs">{rows}</table></div></details>'
    )


def series(metrics: Sequence[Metrics], kind: str) -> dict[str, Series]:
    """Every quantity logged under `kind` as its steps and values; nulls are gaps."""
    curves: dict[str, Series] = {}
    for line in metrics:
        if line["kind"] == kind:
            for name, value in line.items():
                if name not in ("step", "kind", "seconds") and value is not None:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
    return curves


def _panels(metrics: Sequence[Metrics], drawn: Collection[str] = ()) -> list[str]:
    """One figure a panel, in the table's order, then one for each quantity that no panel named; without those
    that are `drawn` elsewhere, as "kind/name"."""
    left = {
        (kind, name): curve
        for kind in ("train", "dev")
        for name, curve in series(metrics, kind).items()
        if f"{kind}/{name}" not in drawn
    }
    figures = []
    for title, kind, pattern in _PANELS:
        taken = {name: left.pop((k, name)) for k, name in list(left) if k == kind and pattern.search(name)}
        if taken:
            figures.append(figure_html(chart(title, taken)))
    for (kind, name), curve in left.items():
        figures.append(figure_html(chart(f"{name.replace('_', ' ')} ({kind})", {name: curve})))
    return figures


def chart(title: str, curves: Mapping[str, Curve], below: str = "step") -> Any:
    """A matplotlib figure of named curves, each its x and its y; `below` names the x axis."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for colour, (name, (steps, values)) in zip(_COLOURS * len(curves), curves.items(), strict=False):
            _draw(axes, name, steps, values, colour)
        _dress(axes, title, below, legend=len(curves) > 1)
    return figure


def figure_style() -> Any:
    """The context in which figures are made and drawn: their numbers' text is kept as text in SVG."""
    import matplotlib as mpl

    return mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "text.color": INK})


def figure_html(figure: Any) -> str:
    """A matplotlib figure as a part of a page, inline SVG."""
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _draw(axes: Any, name: str, steps: Sequence[float], values: Sequence[float], colour: str) -> None:
    """A line; a noisy one is drawn faint, with its running mean over it."""
    way = sum(abs(b - a) for a, b in pairwise(values))
    if len(values) < 40 or way < 4 * (max(values) - min(values)):  # few points, or a schedule
        marker = "o" if len(values) < 40 else ""
        axes.plot(steps, values, color=colour, label=name, marker=marker, markersize=3.5, linewidth=1.6)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(values), color=colour, label=name, linewidth=1.8)


def _smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential running mean over about `share` of the line, without a bias at its start."""
    keep = 1 - 1 / max(2.0, share * len(values))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def _dress(axes: Any, title: str, below: str, *, legend: bool) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(below, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.7)
    axes.margins(x=0.02, y=0.12)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
