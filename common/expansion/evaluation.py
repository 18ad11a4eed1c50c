"""Evaluate expansions: scores by group, complaints of QMD's users, golden rows, retrieval, a page.

The answers come as texts, so that any backend (or llama.cpp, or a service) can be judged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from common.checkpoint import to_json
from common.data.expansion import EvalQuery, ExpansionRow, Line
from common.errors import UserError
from common.expansion.qmd import Parsed, in_grammar, parse_completion
from common.expansion.retrieval_effect import TEMPLATE, Effect, difference
from common.metrics.expansion import (
    SCORERS,
    ExpansionScore,
    clean,
    entities,
    has_key_term,
    is_cjk,
    template_expansion,
    useless_lines,
)
from common.metrics.ranking import mean
from common.report import Table, page, table_html, tables_text
from common.reranker.evaluation import compare, write_bytes

# word overlap (Jaccard) from which a line counts as a golden one, as the original's eval_retrieval.py
THRESHOLDS = {"lex": 0.5, "vec": 0.35, "hyde": 0.25}
_HOW_TO = re.compile(r"\b(how (to|do|can)|set(ting)? up|setup|guide|tutorial)\b", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"^(information about|this (document|entry|article|page) (is|explains|describes))\b", re.I
)


def match_lines(
    pairs: Iterable[tuple[Sequence[Line], Sequence[Line]]], thresholds: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Type -> precision, recall and F1 in [0, 1] of (golden, given) lines, over all pairs together.

    A line is right when its words overlap with those of a golden line of its type by the threshold or more;
    a golden line is found when some given line does so. Types that stand on neither side are left out.
    """
    thresholds = thresholds or THRESHOLDS
    counts: Counter[tuple[str, str]] = Counter()
    for golden, given in pairs:
        for kind, least in thresholds.items():
            ours, theirs = (
                [set(text.lower().split()) for k, text in lines if k == kind] for lines in (given, golden)
            )
            counts[kind, "given"] += len(ours)
            counts[kind, "golden"] += len(theirs)
            counts[kind, "right"] += sum(any(_overlap(a, b) >= least for b in theirs) for a in ours)
            counts[kind, "found"] += sum(any(_overlap(a, b) >= least for a in ours) for b in theirs)
    return {
        kind: _f1(counts[kind, "right"], counts[kind, "given"], counts[kind, "found"], counts[kind, "golden"])
        for kind in thresholds
        if counts[kind, "given"] or counts[kind, "golden"]
    }


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


def _f1(right: int, given: int, found: int, golden: int) -> dict[str, float]:
    precision, recall = right / max(1, given), found / max(1, golden)
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}


# --- answers to evaluation queries ---


@dataclass(frozen=True)
class Result:
    """One answer: what QMD makes of it, its scores by name, the complaints that it gives cause to."""

    query: str
    category: str
    text: str
    parsed: Parsed
    scores: dict[str, ExpansionScore]
    complaints: tuple[str, ...]


COMPLAINTS = {
    "unusable": "QMD finds no line and searches with its own stand-in",
    "off the grammar": "free text: QMD's grammar would have cut it",
    "entity lost": "a name of the query is in no lex or vec line (#247, #683)",
    "key term lost": "a lex line has no key term of the query (#909)",
    "other script": "a query in Chinese, Japanese or Korean, lines in another script (#454)",
    "placeholder hyde": "a hyde that says nothing (#75)",
    "made a how-to": "half of the lines or more ask how to, the query does not (#627)",
}


def judge(query: EvalQuery, text: str) -> Result:
    """One answer with all scores and complaints."""
    parsed = parse_completion(query.query, text)
    scores = {name: scorer(query.query, text) for name, scorer in SCORERS.items()}
    return Result(
        query.query, query.category, text, parsed, scores, tuple(_complaints(query.query, text, parsed))
    )


def _complaints(query: str, text: str, parsed: Parsed) -> Iterable[str]:
    cleaned = clean(text)[0]
    lines = parsed.lines if not parsed.fallback else ()
    lex, hyde = ([content for kind, content in lines if kind == wanted] for wanted in ("lex", "hyde"))
    if parsed.fallback:
        yield "unusable"
    if not in_grammar(cleaned + "\n"):
        yield "off the grammar"
    written = " ".join(content for kind, content in lines if kind != "hyde").lower()
    if written and any(entity not in written for entity in entities(query)):
        yield "entity lost"
    if any(not has_key_term(line, query) for line in lex) and not is_cjk(query):
        yield "key term lost"
    if is_cjk(query) and any("another script" in fault for fault in useless_lines(query, text)):
        yield "other script"
    empty = [fault for fault in useless_lines(query, text) if fault.startswith("hyde")]
    if empty or any(_PLACEHOLDER.match(line) for line in hyde):
        yield "placeholder hyde"
    how = sum(bool(_HOW_TO.search(content)) for _, content in lines)
    if lines and 2 * how >= len(lines) and not _HOW_TO.search(query):
        yield "made a how-to"


def groups_of(query: EvalQuery) -> tuple[str, ...]:
    """The groups of a query: its category, and those that its text shows."""
    shown = {
        "/only": "/only:" in query.query,
        "CJK": is_cjk(query.query),
        "with an entity": bool(entities(query.query)),
        "one word": len(query.query.split()) == 1 and not is_cjk(query.query),
    }
    return tuple(dict.fromkeys((query.category, *(name for name, holds in shown.items() if holds))))


@dataclass(frozen=True)
class ExpansionEvaluation:
    """Answers of models to the same queries, the template's beside them, and what was measured of them."""

    queries: tuple[EvalQuery, ...]
    results: dict[str, list[Result]]  # model -> results in the order of the queries; the last is the template
    golden: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # model -> match_lines
    effects: tuple[Effect, ...] = ()

    def tables(self) -> list[Table]:
        """Scores, models beside each other, groups, complaints, golden rows, retrieval."""
        found = [_score_table(self), _group_table(self), _complaint_table(self)]
        if len(self.results) > 2:
            found.insert(1, _pair_table(self))
        found += [_golden_table(self.golden)] if self.golden else []
        return [*found, *(effect.table() for effect in self.effects)]

    def text(self, width: int = 150) -> str:
        """The tables for a terminal."""
        return tables_text(self.tables(), width)

    def json(self) -> dict[str, Any]:
        """Everything, outputs included, ready for a JSON file."""
        return {
            "queries": [asdict(query) for query in self.queries],
            "models": {
                model: [_result_json(result) for result in results] for model, results in self.results.items()
            },
            "golden": self.golden,
            "effects": [asdict(effect) for effect in self.effects],
            "tables": self.tables(),
        }

    def page(self, title: str = "Query expansion") -> str:
        """A self-contained page: the tables, then every query with the answers side by side."""
        tables = "\n".join(map(table_html, self.tables()))
        outputs = "\n".join(self._outputs(place) for place in range(len(self.queries)))
        return page(title, f"<h1>{escape(title)}</h1>\n{tables}\n<h2>Outputs</h2>\n{outputs}")

    def write(self, directory: str | Path, title: str = "Query expansion") -> tuple[Path, Path]:
        """Write expansion.json and expansion.html; UserError when that cannot be done."""
        paths = Path(directory) / "expansion.json", Path(directory) / "expansion.html"
        write_bytes(paths[0], to_json(self.json()))
        write_bytes(paths[1], self.page(title).encode())
        return paths

    def _outputs(self, place: int) -> str:
        query = self.queries[place]
        rows = "".join(_output_row(model, results[place]) for model, results in self.results.items())
        return (
            f"<details open><summary>{escape(query.query)} "
            f"<small>({escape(query.category)})</small></summary>"
            f'<div class="scroll"><table class="pairs">{rows}</table></div></details>'
        )


def evaluate_expansions(
    queries: Sequence[EvalQuery],
    answers: Mapping[str, Sequence[str]],
    *,
    golden: Sequence[ExpansionRow] = (),
    golden_answers: Mapping[str, Sequence[str]] | None = None,
    effects: Sequence[Effect] = (),
) -> ExpansionEvaluation:
    """Judge each model's answers (model -> a text a query, in their order); the template is always added.

    `golden_answers` are the models' texts for the queries of the `golden` rows, in their order. Raises
    UserError when a model has not one answer a query.
    """
    if not queries:
        raise UserError("no evaluation query: give at least one.")
    asked = [query.query for query in queries]
    given = {**answers, TEMPLATE: [template_expansion(query) for query in asked]}
    results = {
        model: [judge(query, text) for query, text in zip(queries, _each(model, texts, asked), strict=True)]
        for model, texts in given.items()
    }
    rows = [row.query for row in golden]
    texts = (
        {**(golden_answers or {}), TEMPLATE: [template_expansion(query) for query in rows]} if rows else {}
    )
    matched = {
        model: match_lines(
            (row.lines, parse_completion(row.query, text).lines)
            for row, text in zip(golden, _each(model, given_texts, rows), strict=True)
        )
        for model, given_texts in texts.items()
    }
    return ExpansionEvaluation(tuple(queries), results, matched, tuple(effects))


def _each(model: str, texts: Sequence[str], queries: Sequence[str]) -> Sequence[str]:
    if len(texts) != len(queries):
        raise UserError(f"{model}: {len(texts)} answers to {len(queries)} queries; give one to each.")
    return texts


def _values(results: Sequence[Result], scorer: str) -> dict[str, float]:
    return {str(place): result.scores[scorer].percentage for place, result in enumerate(results)}


def _score_table(evaluation: ExpansionEvaluation) -> Table:
    base = _values(evaluation.results[TEMPLATE], "strict")
    rows: list[list[str | float | None]] = []
    for model, results in evaluation.results.items():
        means = [mean(_values(results, scorer)) for scorer in SCORERS]
        best = sum(result.scores["qmd"].rating == "Excellent" for result in results)
        usable = sum(not result.parsed.fallback for result in results) / len(results)
        lines = sum(len(result.parsed.lines) for result in results) / len(results)
        row: list[str | float | None] = [model, *means, f"{best} / {len(results)}", usable, lines]
        versus = None if model == TEMPLATE else compare(_values(results, "strict"), base)
        rows.append([*row, *(difference(versus, 1) if versus else (None, None))])
    return {
        "title": f"Score of {len(evaluation.queries)} queries",
        "columns": [
            *("answers of", "QMD %", "January %", "strict %", "Excellent", "usable", "lines"),
            *("strict − template", "p"),
        ],
        "rows": rows,
        "note": (
            "QMD: the score of today's reward.py; January: that of the published 92.0 %; both judge form, "
            "and a template passes them. strict: times the share of lines that bring something new. "
            "Excellent: 80 % or more of QMD's. usable: answers of which QMD keeps a line. p: paired "
            "randomisation."
        ),
    }


def _pair_table(evaluation: ExpansionEvaluation) -> Table:
    """Every two models, the earlier one minus the later one."""
    rows: list[list[str | float | None]] = []
    models = [model for model in evaluation.results if model != TEMPLATE]
    for one, other in combinations(models, 2):
        row: list[str | float | None] = [f"{one} − {other}"]
        for scorer in ("qmd", "strict"):
            ours, theirs = (_values(evaluation.results[model], scorer) for model in (one, other))
            row += difference(compare(ours, theirs), 1)
        rows.append(row)
    return {
        "title": "Models beside each other",
        "columns": ["answers of", "QMD %", "p", "strict %", "p"],
        "rows": rows,
        "note": "Brackets: bootstrap over queries, 95 %; p: paired randomisation.",
    }


def _group_table(evaluation: ExpansionEvaluation) -> Table:
    members: dict[str, list[int]] = {}
    for place, query in enumerate(evaluation.queries):
        for group in groups_of(query):
            members.setdefault(group, []).append(place)
    rows: list[list[str | float | None]] = []
    for group, places in members.items():
        row: list[str | float | None] = [group, str(len(places))]
        for results in evaluation.results.values():
            for scorer in ("qmd", "strict"):
                row.append(sum(results[p].scores[scorer].percentage for p in places) / len(places))
        rows.append(row)
    names = [f"{model} {kind}" for model in evaluation.results for kind in ("QMD %", "strict %")]
    return {"title": "Score by group", "columns": ["group", "queries", *names], "rows": rows}


def _complaint_table(evaluation: ExpansionEvaluation) -> Table:
    rows: list[list[str | float | None]] = []
    for name, meaning in COMPLAINTS.items():
        counts = [
            str(sum(name in result.complaints for result in results))
            for results in evaluation.results.values()
        ]
        rows.append([f"{name}: {meaning}", *counts])
    return {
        "title": "What QMD's users complain about",
        "columns": ["complaint", *evaluation.results],
        "rows": rows,
        "note": f"Answers of {len(evaluation.queries)} that give cause to it; #: an issue of tobi/qmd.",
    }


def _golden_table(golden: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    rows: list[list[str | float | None]] = [
        [model, kind, values["precision"], values["recall"], values["f1"]]
        for model, kinds in golden.items()
        for kind, values in kinds.items()
    ]
    least = ", ".join(f"{kind} {value:g}" for kind, value in THRESHOLDS.items())
    return {
        "title": "Against golden rows",
        "columns": ["answers of", "type", "precision", "recall", "F1"],
        "rows": rows,
        "note": f"A line is right when its words overlap with a golden line of its type by {least}.",
    }


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "query": result.query,
        "category": result.category,
        "text": result.text,
        "lines": [list(line) for line in result.parsed.lines],
        "dropped": result.parsed.dropped,
        "fallback": result.parsed.fallback,
        "complaints": list(result.complaints),
        "scores": {
            name: {
                "percentage": score.percentage,
                "reward": score.reward,
                "rating": score.rating,
                "parts": dict(score.parts),
                "faults": list(score.faults),
            }
            for name, score in result.scores.items()
        },
    }


def _output_row(model: str, result: Result) -> str:
    scores = ", ".join(f"{name} {score.percentage:.0f}" for name, score in result.scores.items())
    remarks = "".join(f"<br><small>{escape(remark)}</small>" for remark in result.complaints)
    text = escape(result.text.strip() or "(empty)").replace("\n", "<br>")
    return f"<tr><td>{escape(model)}<br><small>{scores}</small>{remarks}</td><td>{text}</td></tr>"
