"""Which passages are mined as hard negatives, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from common.data.negatives import MiningRules, mine, rows
from common.data.records import RankingData, Run, parse_triple
from common.errors import UserError

CORPUS = {f"p{i}": f"passage {i}" for i in range(8)} | {"copy": "Passage  0", "twin": "passage 5"}
SCORES = {"p0": 1.0, "copy": 0.99, "p5": 0.97, "twin": 0.96, "p6": 0.9, "p7": 0.5, "p1": 0.4, "p2": -0.2}


def data() -> RankingData:
    queries = {"q": "query", "lonely": "nothing fits"}
    qrels = {"train": {"q": {"p1": 2, "p0": 1}, "lonely": {"p3": 1}}}
    return RankingData("toy", CORPUS, queries, qrels)


def mined(teacher: Run | None = None, **rules: Any) -> tuple[list[str], dict[str, int]]:
    settings = MiningRules(**{"relative_margin": None, "count": 9} | rules).validate()
    positives = {"q": {"p0": 1.0, "p1": 0.4}, "lonely": {"p3": 0.2}}
    found, lost = mine(data(), data().split("train"), {"q": SCORES}, positives, settings, teacher)
    assert [item.query for item in found] in (["q"], [])
    return list(found[0].negatives) if found else [], lost


def test_relevant_passages_and_copies_are_never_negatives() -> None:
    found, lost = mined()
    assert found == ["p5", "p6", "p7", "p2"]  # neither the positives nor their copy nor a negative's twin
    assert lost == {"copies": 2, "queries without a fitting negative": 1}


def test_a_passage_relevant_to_the_same_words_is_no_negative() -> None:
    toy = replace(data(), queries={"q": "Some  query", "again": "some query"})
    qrels = {"q": {"p0": 1}, "again": {"p5": 1}}
    own = {"q": {"p0": 1.0}, "again": {"p5": 0.9}}
    found, _ = mine(toy, qrels, {"q": SCORES, "again": SCORES}, own, MiningRules(relative_margin=None))
    for item in found:
        assert item.negatives and not {"p0", "copy", "p5", "twin"} & set(item.negatives)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"count": 2}, ["p5", "p6"]),
        ({"first_rank": 4, "last_rank": 5}, ["p6", "p7"]),  # ranks count what is not relevant
        ({"max_score": 0.9}, ["p6", "p7", "p2"]),
        ({"margin": 0.05}, ["p6", "p7", "p2"]),
        ({"margin": 0.6}, ["p2"]),
        ({"relative_margin": 0.05}, ["p6", "p7", "p2"]),
    ],
)
def test_each_rule_leaves_out_what_it_says(rules: dict[str, Any], expected: list[str]) -> None:
    assert mined(**rules)[0] == expected


def test_a_relative_margin_also_holds_below_zero() -> None:
    own, scores = {"q": {"p0": -2.0, "p1": -3.0}}, {"q": {"p5": -2.05, "p6": -2.2}}
    rules = MiningRules(relative_margin=0.05)
    [item], lost = mine(data(), {"q": {"p0": 1, "p1": 1}}, scores, own, rules)
    assert list(item.negatives) == ["p6"] and lost == {"within the relative margin": 1}


def test_the_teacher_takes_out_false_negatives_and_its_scores_are_kept() -> None:
    teacher = {"q": {passage: 0.0 for passage in CORPUS} | {"p0": 5.0, "p1": 1.0, "p5": 6.0, "p6": 4.5}}
    teacher["lonely"] = {"p3": 1.0}
    assert mined(teacher)[0] == ["twin", "p6", "p7", "p2"]
    assert mined(teacher, teacher_margin=1.0)[0] == ["twin", "p7", "p2"]
    positives = {"q": {"p0": 1.0, "p1": 0.4}}
    [item], _ = mine(data(), {"q": {"p1": 2, "p0": 1}}, {"q": SCORES}, positives, MiningRules(), teacher)
    assert item.positives == {"p1": 1.0, "p0": 5.0} and item.negatives["p6"] == 4.5


def test_a_random_choice_follows_its_seed() -> None:
    choices = {tuple(mined(choose="random", count=2, seed=seed)[0]) for seed in range(12)}
    assert len(choices) > 3 and mined(choose="random", count=2, seed=3) == mined(
        choose="random", count=2, seed=3
    )


def test_rows_of_each_form_carry_texts_and_scores() -> None:
    positives = {"q": {"p0": 1.0, "p1": 0.4}}
    [item], _ = mine(data(), {"q": {"p1": 2, "p0": 1}}, {"q": SCORES}, positives, MiningRules(count=2))
    [row] = rows(data(), item, "tuple")
    assert row == {
        "query": "query",
        "positive": ["passage 1", "passage 0"],
        "negative": ["passage 6", "passage 7"],
        "scores": [2, 1],
        "positive_scores": [0.4, 1.0],
        "negative_scores": [0.9, 0.5],
    }
    [row] = rows(data(), item, "list")
    assert row["labels"] == [2, 1, 0, 0] and row["scores"] == [0.4, 1.0, 0.9, 0.5]
    triplets = list(rows(data(), item, "triplet"))
    assert (
        len(triplets) == 4
        and triplets[1]["negative"] == "passage 7"
        and triplets[1]["positive_scores"] == 0.4
    )
    for form in ("tuple", "triplet"):  # what is mined from graded data is graded
        read = [parse_triple(row) for row in rows(data(), item, form)]
        found = {
            p: grade for triple in read for p, grade in zip(triple.positives, triple.grades, strict=True)
        }
        assert found == {"passage 1": 2, "passage 0": 1}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"count": 0}, "--count is 0; allowed: >= 1"),
        ({"first_rank": 5, "last_rank": 4}, "--last-rank is 4; allowed: >= 5"),
        ({"relative_margin": 1.0}, r"--relative-margin is 1.0; allowed: \[0, 1\)"),
        ({"margin": -1.0}, "--margin is -1.0"),
        ({"margin": float("inf")}, "--margin is inf; allowed: a number >= 0"),
        ({"max_score": float("nan")}, "--max-score is nan; allowed: a number"),
    ],
)
def test_rules_out_of_range_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MiningRules(**rules).validate()
