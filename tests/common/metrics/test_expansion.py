"""The score of expansions: cases counted by hand, the original's examples, January's and the strict form."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from common.data.expansion import render_lines
from common.data.generated import generated_rows
from common.metrics.expansion import (
    SCORERS,
    clean,
    entities,
    keeps_term,
    score,
    score_january,
    score_strict,
    template_expansion,
    useless_lines,
)

HYDE = "Put the public half of the SSH pair on the server; the private one stays at home."
REPEATED = "hyde: The key opens the key store, and a key file holds the key of each of the hosts."
GOOD = f"hyde: {HYDE}\nlex: ssh public key\nlex: login secure keys\nvec: how to log in with a pair of keys\n"

# query, text, total, maximum: points counted by the published rules
CASES = [
    # 30 format, 10 + 5 + 5 + 5 + 5 diversity, 20 hyde, 20 quality, 10 no entity, 20 no thinking
    ("ssh keys", GOOD, 130, 140),
    # the same without a hyde
    ("ssh keys", "lex: ssh public\nvec: how to make ssh keys", 110, 120),
    # 20 format, 5 + 5 + 5 diversity, 5 + 5 quality, 10 entity, 20: no lex, and one line is not two
    ("ssh keys", "vec: how to make ssh keys", 75, 120),
    # nothing at all does not fail: 10 format, 15 diversity, 5 quality, 10 entity, 20
    ("ssh keys", "", 60, 120),
    # blank contents count as lines: 30, 30, 5 + 5 + 2 + 0 quality, 10, 20, and the blank lex has no key term
    ("ssh keys", "lex:\nvec:", 102, 120),
    # lex pair inside one another: -2; vec short: 2 instead of 5; lex longer than vec: -5
    ("ssh keys", "lex: ssh public\nlex: ssh public key\nvec: make a key", 100, 120),
    # hyde of 4 characters: 5 + 2 + 5 + 5
    ("ssh keys", "hyde: keys\nlex: ssh public\nvec: how to make ssh keys", 127, 140),
    # a vec echo -3, a short vec 2 instead of 5
    ("ssh keys", "lex: ssh public\nvec: the ssh keys", 104, 120),
    # a word four times in the hyde: 5 - 4 of its last part; "the" does not count
    ("ssh keys", f"{REPEATED}\nlex: ssh public\nvec: how to make ssh keys", 126, 140),
    # a filler word that the query has not: -3; a quoted phrase: +3
    ("ssh keys", 'lex: ssh "public key" basics\nvec: how to make ssh keys for servers', 110, 120),
    # entity TDS: all lex hold it +15, vec too +5; motorsports in lex
    ("who is TDS motorsports", "lex: TDS motorsports team\nvec: history of the TDS motorsports", 120, 120),
    # no lex holds an entity -30, both dropped -40: 30 + 30 + (5 + 5 + 5) - 70 + 20
    ("who is TDS motorsports", "lex: company details\nvec: who is this racing company", 25, 120),
    # "find information about" says nothing: generic -15, on top of -30 and -40
    ("who is TDS motorsports", "lex: find information about\nvec: who is this racing company", 10, 120),
    # a think block costs its 20 points
    ("ssh keys", "<think>\n\n</think>\n\nlex: ssh public\nvec: how to make ssh keys", 90, 120),
    # /only: 30 + 30 + 20 + 10 + 20, and -5 for the echo "auth setup"
    ("auth /only:lex", "lex: auth setup\nlex: login credentials for auth", 105, 120),
    # a line of another type -10, one item 15, an echo -5
    ("auth /only:lex", "lex: auth setup\nvec: how to configure authentication", 80, 120),
    # hyde of 30 to 300 characters
    ("auth /only:hyde", "hyde: Set the secret in the file first.", 90, 120),
    # entity in one of two: 30 + 30 + 20 + 15 + 20
    ("AWS lambda /only:vec", "vec: how to start an AWS function\nvec: cold start of functions", 115, 120),
]


@pytest.mark.parametrize("query, text, total, maximum", CASES)
def test_points_are_those_counted_by_hand(query: str, text: str, total: int, maximum: int) -> None:
    found = score(query, text)
    assert (found.total, found.maximum) == (total, maximum), found
    assert found.reward == pytest.approx(min(1.0, total / maximum))
    assert found.percentage == pytest.approx(100 * found.reward, abs=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here it is",
        "lex: a\nLex: b",
        "lex: a<|endoftext|>",
        "lex: a\nassistant\nlex: b",
        "<think>lex: a",
        " - lex: a",
    ],
)
def test_a_broken_text_fails_in_every_form(text: str) -> None:
    for name, scorer in SCORERS.items():
        found = scorer("ssh keys", text)
        assert (found.reward, found.percentage, found.rating, found.total) == (0, 0, "Failed", 0), name
        assert found.faults


def test_an_only_query_without_its_type_fails() -> None:
    found = score("auth /only:lex", "vec: how to log in")
    assert (found.reward, found.only, found.maximum) == (0.0, "lex", 100)


def test_an_echo_caps_the_percentage_but_not_the_reward_and_the_strict_form_caps_both() -> None:
    text = "lex: ssh keys\nvec: how to make a pair of ssh keys"
    found, strict = score("ssh keys", text), score_strict("ssh keys", text)
    assert found.percentage == 50.0 and found.reward == pytest.approx(100 / 120)
    assert strict.reward == pytest.approx(0.25) and strict.percentage == 25.0  # of two lines one helps


def test_control_and_think_are_removed_before_the_score() -> None:
    assert clean(" <think>\nx\n</think>\n\nlex: a<|im_end|> ") == ("lex: a", True)
    assert clean("lex: a <think>") == ("lex: a <think>", False)


@pytest.mark.parametrize(
    "query, found",
    [
        ("who is TDS motorsports team", {"tds", "motorsports"}),  # the chain goes one word on
        ("Configure nginx", set()),  # a verb at the start
        ("Bob asked about deploy", {"bob"}),
        ("meeting with Bob about C++ templates", {"bob", "c++", "templates"}),
        ("HOW to use it", {"how", "to"} - {"to"}),
        ("iPhone battery", set()),
        ("set up (Redis), please", {"redis", "please"}),
        ("HoW strange", {"how", "strange"}),
        ("node.js - streams", {"node.js", "-"}),
        ("plain words here", set()),
    ],
)
def test_entities(query: str, found: set[str]) -> None:
    assert entities(query) == found


def test_januarys_form_differs_where_it_did() -> None:
    assert entities("TDS motorsports team plan", january=True) == {"tds", "motorsports", "team", "plan"}
    assert entities("Bob asked", january=True) == set()
    assert entities("TDS meeting", january=True) == {"tds", "meeting"} != entities("TDS meeting")
    assert entities("JavaScript closures", january=True) == {"javascript", "closures"}
    dropped = "lex: TDS history\nvec: the history of TDS and more"  # motorsports is dropped: -20 today
    today, january = (f("who is TDS motorsports", dropped).total for f in (score, score_january))
    assert january - today == 20
    echo = "lex: ssh keys\nlex: ssh public\nvec: how to make a pair of ssh keys"
    assert score_january("ssh keys", echo).percentage == pytest.approx(100 * 107 / 120, abs=0.05)
    filler = "lex: ssh public basics\nvec: how to make a pair of ssh keys"
    assert score_january("ssh keys", filler).total - score("ssh keys", filler).total == 3
    only = "lex: auth setup\nlex: login credentials"
    assert score_january("auth /only:lex", only).only is None


@pytest.mark.parametrize(
    "query, line, fault",
    [
        ("ssh keys", "lex:", "is blank"),
        ("ssh keys", "vec: ...", "is blank"),
        ("ssh keys", "lex: SSH Keys", "echoes the query"),
        ("ssh keys", "lex: login credentials", "has no word of the query"),
        ("ssh keys", "vec: a complete guide to understanding ssh key basics", "says nothing"),
        ("如何修理路由器", "vec: how to repair a router", "is in another script"),
        ("如何修理路由器", "lex: 路由器修理", "says nothing"),
    ],
)
def test_lines_that_cannot_help_are_named(query: str, line: str, fault: str) -> None:
    (found,) = useless_lines(query, line)
    assert fault in found
    assert score_strict(query, line).reward == 0.0


def test_lines_that_help_are_kept() -> None:
    assert not list(useless_lines("ssh keys", GOOD))
    assert not list(useless_lines("如何修理路由器", "lex: 路由器 维修\nvec: 怎样维修家里的网关"))
    assert not list(useless_lines("C++", "lex: c++ templates"))
    twice = list(useless_lines("ssh keys", "lex: ssh public\nlex: SSH public"))
    assert len(twice) == 1 and "repeats another line" in twice[0]


def test_the_strict_form_closes_the_holes_that_the_original_has() -> None:
    for text in ("", "lex:\nvec:", "\n\n", template_expansion("ssh keys")):
        assert score("ssh keys", text).reward >= 0.5
        assert score_strict("ssh keys", text).reward < 0.25
    assert score_strict("ssh keys", GOOD).reward == score("ssh keys", GOOD).reward > 0.9


def test_golden_rows_beat_the_template_in_the_strict_form_alone() -> None:
    rows = generated_rows()[1]

    def mean(scorer: str, golden: bool) -> float:
        texts = [render_lines(row.lines) if golden else template_expansion(row.query) for row in rows]
        pairs = zip(rows, texts, strict=True)
        return sum(SCORERS[scorer](row.query, text).percentage for row, text in pairs) / len(rows)

    assert mean("strict", True) > 85 > 40 > mean("strict", False)
    assert abs(mean("qmd", True) - mean("qmd", False)) < 10  # the original does not tell them apart


def test_the_template_honours_only_and_is_rated_excellent() -> None:
    for query in ("ssh keys", "who is TDS motorsports", "how to configure authentication in a web app"):
        assert score(query, template_expansion(query)).rating == "Excellent"
    assert (
        template_expansion("auth /only:lex") == "lex: auth guide examples\nlex: auth reference documentation"
    )


def test_what_the_parser_of_qmd_keeps() -> None:
    assert keeps_term("the SSH protocol", "ssh keys") and keeps_term("unhashed", "sha-hash")
    assert not keeps_term("login", "ssh keys")
    assert keeps_term("anything", "路由器")


def test_no_text_breaks_a_scorer_and_all_stay_in_range(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        "lex:",
        "vec: ",
        "hyde: ",
        "\n",
        "ssh",
        " ",
        "keys",
        '"',
        "C++",
        "TDS",
        "é",
        "器",
        "<think>",
        "</think>",
    ]
    for _ in range(300):
        query = " ".join(rng.choices(["ssh", "TDS", "C++", "how", "to", "Bob", "器", "/only:lex"], k=3))
        text = "".join(rng.choices(pieces, k=rng.randrange(20)))
        found = {name: scorer(query, text) for name, scorer in SCORERS.items()}
        for result in found.values():
            assert 0 <= result.reward <= 1 and 0 <= result.percentage <= 100 and result.rating
        assert found["strict"].reward <= found["qmd"].reward


def test_the_originals_examples(data_dir: Path) -> None:
    path = data_dir / "qmd" / "reward_examples.json"
    if not path.is_file():
        pytest.skip(f"no examples at {path}")
    examples = json.loads(path.read_text(encoding="utf-8"))
    assert len(examples) >= 50
    for example in examples:
        found = score(example["query"], example["expansion"])
        assert found.reward == pytest.approx(example["reward"], abs=1e-6), example
        assert (found.total, found.maximum) == (example["total"], example["max_possible"])
        assert found.percentage == pytest.approx(example["percentage"]) and found.rating == example["rating"]
        assert found.parts == {
            part: example[{"think": "think_bonus"}.get(part, part)] for part in found.parts
        }
        assert found.only == example["only_mode"] and found.entities == set(example["entities"])
