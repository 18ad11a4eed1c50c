"""An analysis: what is relevant, what is told apart, what is hard, and the page about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backends import Scores
from common.data.records import RankingData, Run
from common.errors import UserError
from common.report import tables_text
from common.reranker.analysis import analyse, write_analysis
from common.reranker.analysis_view import analysis_tables

QUERIES = 30


class Known:
    """Scores a pair by whether the words agree; its overlap says nothing, its coherence the contrary."""

    name, identity, fusion_weight = "known", "known-id", 0.0

    def score(
        self, queries: Sequence[str], passages: Sequence[str], on_batch: Callable[[int], None] | None = None
    ) -> Scores:
        right = np.array(
            [q.split()[1] == p.split()[1] for q, p in zip(queries, passages, strict=True)], np.float32
        )
        noise = np.array([np.random.default_rng(list(p.encode())).random() for p in passages], np.float32)
        return Scores(right + 0.01 * noise, noise, 0.5 * right, noise, 1.0 - 0.5 * right)


@pytest.fixture
def data() -> RankingData:
    corpus = {f"p{i}": f"passage {i} {'long ' * 200}" for i in range(QUERIES)}
    queries = {f"q{i}": f"query {i}" for i in range(QUERIES)}
    return RankingData("toy", corpus, queries, {"test": {f"q{i}": {f"p{i}": 1} for i in range(QUERIES)}})


@pytest.fixture
def stage() -> Run:
    """The relevant passage is second of five, but not there for q0 and q1."""
    run = {f"q{i}": {f"p{(i + j - 1) % QUERIES}": 5.0 - j for j in range(5)} for i in range(QUERIES)}
    return run | {q: {p: s for p, s in run[q].items() if p != q.replace("q", "p")} for q in ("q0", "q1")}


def analysed(data: RankingData, stage: Run, **settings: Any) -> dict[str, Any]:
    return analyse(Known(), data, "test", stage, **({"first_stage": "bm25", "depth": 4} | settings))


def test_each_quantity_tells_relevant_pairs_from_others_as_well_as_it_does(
    data: RankingData, stage: Run
) -> None:
    analysis = analysed(data, stage)
    # four candidates a query; the relevant passage of q0 and q1 comes in beside them
    assert (analysis["queries"], analysis["pairs"], analysis["relevant_pairs"]) == (30, 122, 30)
    auc = {name: part["auc"] for name, part in analysis["quantities"].items()}
    assert auc["score"] == auc["resonance"] == 1.0 and auc["coherence"] == 0.0
    assert 0.3 < auc["overlap"] < 0.7
    resonance = analysis["quantities"]["resonance"]
    assert (resonance["relevant"]["mean"], resonance["other"]["mean"]) == (0.5, 0.0)
    assert resonance["edges"][0] == 0.0 and resonance["edges"][-1] == 0.5
    for part in analysis["quantities"].values():
        assert sum(part["relevant"]["histogram"]) == 30 and sum(part["other"]["histogram"]) == 92
        quantiles = list(part["other"]["quantiles"].values())
        assert quantiles == sorted(quantiles)


def test_the_hardest_queries_are_those_the_reranker_gets_wrong_with_a_relevant_candidate(
    data: RankingData, stage: Run
) -> None:
    class Fooled(Known):
        def score(self, queries: Sequence[str], passages: Sequence[str], on_batch: Any = None) -> Scores:
            scores = super().score(queries, passages)
            wrong = [
                q == "query 7" and not p.startswith("passage 7 ")
                for q, p in zip(queries, passages, strict=True)
            ]
            scores.score[wrong] += 9.0
            return scores

    analysis = analyse(Fooled(), data, "test", stage, first_stage="bm25", depth=4, hardest=3)
    assert analysis["without_relevant_candidate"] == 2 and len(analysis["hardest"]) == 3
    hardest = analysis["hardest"][0]
    assert (hardest["query"], hardest["rank"]) == ("query 7", 4)
    assert hardest["nDCG@10"] == pytest.approx(1 / np.log2(5)) and hardest["lead"] > 7
    assert hardest["relevant"].startswith("passage 7 long") and len(hardest["relevant"]) < 250
    assert [row["nDCG@10"] for row in analysis["hardest"][1:]] == [1.0, 1.0]


def test_json_picture_and_page_are_written_whole(data: RankingData, stage: Run, tmp_path: Path) -> None:
    analysis = analysed(data, stage, hardest=30)
    files = write_analysis(tmp_path / "new", "test", analysis)
    assert [file.name for file in files] == ["analysis-test.json", "analysis-test.png", "analysis-test.html"]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(analysis))
    assert files[1].read_bytes().startswith(b"\x89PNG")
    page = files[2].read_text()
    for shown in ("resonance r = Re", "confidence", "top score alone", "query 7", "AUC, relevant against"):
        assert shown in page, shown
    assert "<svg" in page and not re.search(r"<script|src=|@import|<link", page)
    text = tables_text(analysis_tables(analysis))
    for shown in (
        "30 queries, 122 pairs: the top 4 of bm25",
        "AUC",
        "ECE",
        "2 more queries have no relevant",
    ):
        assert shown in text
    assert "query 7 " in text and all(len(line) <= 150 for line in text.splitlines())


def test_a_split_without_a_relevant_pair_is_refused(data: RankingData, stage: Run) -> None:
    nothing = {query: dict.fromkeys(grades, 0) for query, grades in data.split("test").items()}
    with pytest.raises(
        UserError, match=r"toy, split 'test': none of 120 pairs of 30 queries is a relevant pair"
    ):
        analysed(data, stage, qrels=nothing)
    only = {query: {p: 1 for p in run} for query, run in stage.items()}
    with pytest.raises(UserError, match=r"is a pair that is not relevant"):
        analysed(data, stage, qrels=only)
    with pytest.raises(UserError, match="no split 'tset'"):
        analyse(Known(), data, "tset", stage, first_stage="bm25", depth=4)
