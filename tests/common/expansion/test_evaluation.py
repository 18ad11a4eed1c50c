"""Evaluation of expansions: golden rows, complaints, groups, the template, JSON and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.data.expansion import EvalQuery, render_lines
from common.data.generated import generated_queries, generated_rows
from common.errors import UserError
from common.expansion.evaluation import COMPLAINTS, evaluate_expansions, groups_of, judge, match_lines
from common.expansion.retrieval_effect import TEMPLATE

GOOD = (
    "hyde: An SSH pair has a public and a private half.\nlex: ssh public key\nvec: make a pair of ssh keys\n"
)


def test_lines_match_golden_ones_by_their_words() -> None:
    golden = [("lex", "ssh public key"), ("lex", "login secrets"), ("vec", "how to make ssh keys")]
    given = [
        ("lex", "SSH public keys"),
        ("lex", "public key ssh"),
        ("vec", "how to make keys"),
        ("hyde", "x"),
    ]
    found = match_lines([(golden, given)])
    # 2 of 4 words shared is 0.5; "login secrets" is not found
    assert found["lex"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert found["vec"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert found["hyde"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert match_lines([(golden, given)], {"lex": 0.6})["lex"]["precision"] == 0.5
    both = match_lines([(golden, given), (golden, [])], {"lex": 0.5})
    assert both["lex"]["recall"] == 0.25 and both["lex"]["precision"] == 1.0


@pytest.mark.parametrize(
    "query, text, complaint",
    [
        ("ssh keys", "", "unusable"),
        ("ssh keys", "lex:ssh public\n", "off the grammar"),
        ("meeting with Bob", "lex: meeting agenda\nvec: notes of the meeting\n", "entity lost"),
        ("python memory leak", "lex: python memoryleak\nlex: pythonic tracing\n", "key term lost"),
        ("如何修理路由器", "lex: router repair\nvec: how to repair a router\n", "other script"),
        ("ssh keys", "hyde: Information about ssh keys\n", "placeholder hyde"),
        ("ssh keys", "lex: ssh keys setup\nvec: how to set up ssh keys\n", "made a how-to"),
    ],
)
def test_every_complaint_is_found_and_a_good_answer_gives_none(query: str, text: str, complaint: str) -> None:
    assert complaint in judge(EvalQuery(query, "all"), text).complaints
    assert complaint in COMPLAINTS
    assert judge(EvalQuery("ssh keys", "all"), GOOD).complaints == ()
    assert judge(EvalQuery("如何修理路由器", "all"), "lex: 路由器 维修\n").complaints == ()
    assert "made a how-to" not in judge(EvalQuery("how to set up ssh", "all"), text).complaints


def test_groups_are_the_category_and_what_the_query_shows() -> None:
    assert groups_of(EvalQuery("auth /only:lex", "only")) == ("only", "/only")
    assert groups_of(EvalQuery("Redis", "short")) == ("short", "with an entity", "one word")
    assert groups_of(EvalQuery("如何修理路由器", "CJK")) == ("CJK",)


@pytest.fixture(scope="module")
def evaluated():  # type: ignore[no-untyped-def]
    rows = generated_rows()[1][:40]
    known = {row.query: render_lines(row.lines) + "\n" for row in rows}
    queries = [EvalQuery(row.query, row.category) for row in rows]
    answers = {
        "good": [known[query.query] for query in queries],
        "<b>broken</b>": ["" if place % 2 else "nonsense <script>" for place in range(len(queries))],
    }
    texts = {"good": list(known.values())}
    return evaluate_expansions(queries, answers, golden=rows, golden_answers=texts)


def test_the_template_stands_beside_every_model(evaluated) -> None:  # type: ignore[no-untyped-def]
    assert list(evaluated.results) == ["good", "<b>broken</b>", TEMPLATE]
    rows = {row[0]: row for row in evaluated.tables()[0]["rows"]}
    columns = evaluated.tables()[0]["columns"]
    strict, p = columns.index("strict %"), columns.index("p")
    assert rows["good"][strict] > 80 > 40 > rows[TEMPLATE][strict] > rows["<b>broken</b>"][strict] == 0
    assert rows["good"][p] < 0.01 and rows[TEMPLATE][p] is None
    assert rows["<b>broken</b>"][columns.index("usable")] == 0.0
    matched = evaluated.golden
    assert list(matched) == ["good", TEMPLATE] and matched["good"]["lex"]["f1"] == 1.0
    assert matched[TEMPLATE]["lex"]["f1"] < 0.6


def test_groups_and_complaints_have_a_row_each(evaluated) -> None:  # type: ignore[no-untyped-def]
    _, pairs, groups, complaints, _ = evaluated.tables()
    ((names, qmd, p, strict, _),) = pairs["rows"]
    assert names == "good − <b>broken</b>" and p < 0.01
    means = {row[0]: row[1:4] for row in evaluated.tables()[0]["rows"]}
    for place, text in ((0, qmd), (2, strict)):
        assert text.startswith(f"+{means['good'][place] - means['<b>broken</b>'][place]:.1f} [")
    assert {"how-to", "/only", "with an entity"} <= {row[0] for row in groups["rows"]}
    assert len(groups["columns"]) == 2 + 2 * len(evaluated.results) == len(groups["rows"][0])
    counts = {row[0].partition(":")[0]: row[1:] for row in complaints["rows"]}
    assert set(counts) == set(COMPLAINTS)
    assert counts["unusable"] == ["0", "40", "0"]


def test_json_and_page_hold_the_outputs_and_load_nothing(evaluated, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, html = evaluated.write(tmp_path / "out", "A title")
    stored = json.loads(data.read_text(encoding="utf-8"))
    assert stored["models"]["good"][0]["lines"] and stored["models"]["good"][0]["scores"]["qmd"]["parts"]
    assert len(stored["models"][TEMPLATE]) == len(stored["queries"]) == 40
    text = html.read_text(encoding="utf-8")
    assert "<title>A title</title>" in text and "nonsense &lt;script&gt;" in text
    assert "<script" not in text and "<b>broken" not in text and "http" not in text
    assert "good" in evaluated.text() and "template (no model)" in evaluated.text()


def test_a_missing_answer_is_refused() -> None:
    queries = generated_queries()[:3]
    with pytest.raises(UserError, match="mine: 2 answers to 3 queries; give one to each"):
        evaluate_expansions(queries, {"mine": ["", ""]})
    with pytest.raises(UserError, match="no evaluation query"):
        evaluate_expansions([], {})
