"""Search with an expansion: what each line searches, QMD's fusion, RM3, and the gain as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from common.data.expansion import render_lines
from common.data.generated import generated_collection, generated_rows
from common.data.records import RankingData
from common.errors import UserError
from common.metrics.expansion import template_expansion
from common.metrics.ranking import evaluate_run, mean
from common.retrieval.expansion import ExpansionSearch, RetrievalGain, _best

CORPUS = {
    "a": "the gateway sends packets between networks",
    "b": "a jaguar is an animal of the forest",
    "c": "the jaguar car has a big engine",
    "d": "tea is served hot",
    "e": "networks of rivers in the forest",
}


class WordEncoder:
    """Vectors of known words; counts what it is asked."""

    name, identity, dim = "words", "words-1", 64

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def encode(
        self, texts: Sequence[str], *, kind: Literal["query", "passage"]
    ) -> np.ndarray:  # [N, 64], unit norm
        self.asked += [(kind, text) for text in texts]
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row] += np.random.default_rng(list(word.encode())).normal(size=self.dim)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ranking(found: dict[str, float]) -> list[str]:
    return sorted(found, key=lambda passage: -found[passage])


def test_a_query_finds_by_its_words_and_an_expansion_by_others() -> None:
    search = ExpansionSearch(CORPUS)
    assert search.search("router") == {}
    assert ranking(search.search("router", [("lex", "gateway packets")])) == ["a"]
    assert search.search("router", [("vec", "gateway packets")]) == {}  # no encoder, no dense retrieval


def test_scores_are_those_of_qmds_fusion() -> None:
    found = ExpansionSearch(CORPUS).search("gateway networks", [("lex", "rivers"), ("lex", "gateway")])
    # own list: a, e; rivers: e; gateway: a
    assert found["a"] == pytest.approx(2 / 61 + 1 / 61 + 0.05)
    assert found["e"] == pytest.approx(2 / 62 + 1 / 61 + 0.05)
    only = ExpansionSearch(CORPUS).search("gateway networks forest animal")
    by_rank = sorted(only.values(), reverse=True)
    assert by_rank == pytest.approx([2 / 61 + 0.05, 2 / 62 + 0.02, 2 / 63 + 0.02][: len(by_rank)])


def test_a_negated_word_or_phrase_is_out() -> None:
    search = ExpansionSearch(CORPUS)
    assert ranking(search.search("x", [("lex", "jaguar")])) == ["b", "c"]
    assert ranking(search.search("x", [("lex", "jaguar -animal")])) == ["c"]
    assert ranking(search.search("x", [("lex", 'jaguar -"big engine"')])) == ["b"]
    assert ranking(search.search("x", [("lex", '"jaguar car" well-known')])) == ["c", "b"]


def test_vec_lines_are_queries_hydes_passages_and_each_text_is_encoded_once() -> None:
    encoder = WordEncoder()
    search = ExpansionSearch(CORPUS, encoder)
    lines = [("vec", "hot tea"), ("hyde", "tea is served hot"), ("lex", "tea")]
    found = search.run({"1": "drink", "2": "drink"}, {"1": lines, "2": lines})
    assert ranking(found["1"])[0] == "d" and found["1"] == found["2"]
    asked = [pair for pair in encoder.asked if pair[1] not in CORPUS.values() or pair[0] == "query"]
    assert sorted(asked) == [("query", "drink"), ("query", "hot tea")]
    assert encoder.asked.count(("passage", "tea is served hot")) == 2  # the corpus, then the hyde
    search.search("drink", lines)
    assert len(encoder.asked) == len(CORPUS) + 3


def test_the_depth_cuts_lists_and_results(seed: int) -> None:
    assert len(ExpansionSearch(CORPUS, WordEncoder(), depth=2).search("forest networks")) == 2
    with pytest.raises(UserError, match="depth of the search is 0; allowed: 1 or more"):
        ExpansionSearch(CORPUS, depth=0)
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 40).astype(np.float32)
    whole = np.argsort(-scores, kind="stable")
    for depth in (1, 7, 39, 40, 50):
        np.testing.assert_array_equal(_best(scores, depth), whole[:depth])


def test_rm3_adds_words_of_the_best_passages() -> None:
    corpus = {
        **{f"r{i}": "router gateway packets" for i in range(3)},
        "g": "gateway packets explained",
        "o": "tea and bread",
    }
    search = ExpansionSearch(corpus)
    assert set(search.search("router")) == {"r0", "r1", "r2"}
    found = search.rm3({"1": "router", "2": "nothing known"})
    assert set(found["1"]) == {"r0", "r1", "r2", "g"} and ranking(found["1"])[-1] == "g"
    assert found["2"] == {}


def test_golden_lines_find_more_than_the_query_rm3_and_the_template() -> None:
    data, rows = generated_collection(), {row.query: row for part in generated_rows() for row in part}
    queries = {query: data.queries[query] for query in data.split("test")}
    search = ExpansionSearch(data.corpus)
    runs = {
        "none": search.run(queries),
        "rm3": search.rm3(queries),
        "golden": search.run(queries, {query: rows[text].lines for query, text in queries.items()}),
    }
    value = {n: mean(evaluate_run(r, data.split("test"), ("nDCG@10",))["nDCG@10"]) for n, r in runs.items()}
    assert value["golden"] > 0.3 > value["rm3"] and value["golden"] > value["none"]


# --- the reward ---


@pytest.fixture
def data() -> RankingData:
    queries = {"q1": "jaguar", "q2": "router", "q3": "forest"}
    grades = {"q1": {"c": 2, "b": 0}, "q2": {"a": 1}, "q3": {"b": 1, "e": 1}}
    return RankingData("toy", CORPUS, queries, {"train": grades})


def test_the_gain_is_the_change_of_the_metrics(data: RankingData) -> None:
    gain = RetrievalGain(data, "train", drift_weight=0.0)
    (found,) = gain.gains([("router", "lex: router gateway")])
    assert (found.ndcg, found.recall, found.drift) == (1.0, 1.0, 0.0)
    assert found.reward == pytest.approx(1.5)
    better = "lex: jaguar car\nlex: jaguar engine\nlex: big jaguar"
    assert gain("jaguar", better) > 0 > gain("jaguar", "lex: jaguar tea -car")
    assert gain("forest", "lex: forest") == 0.0


def test_drift_is_the_share_of_lines_that_lead_away(data: RankingData) -> None:
    gain = RetrievalGain(data, "train", ndcg_weight=0.0, recall_weight=0.0, drift_weight=1.0)
    lines = "lex: forest rivers\nlex: tea served\nlex: forest tea\nvec: the forest of animals"
    (found,) = gain.gains([("forest", lines)])
    # tea served has no word of the query; without an encoder the vec is not searched and does not count
    assert found.drift == pytest.approx(1 / 4) and found.reward == pytest.approx(-1 / 4)
    (found,) = gain.gains([("jaguar", "lex: jaguar -jaguar tea")])
    assert found.drift == 1.0


@pytest.mark.parametrize("text", ["", "\n", "no type", "lex:", "lex: forest\nhello", "<|endoftext|>"])
def test_an_invalid_completion_has_the_lowest_reward(data: RankingData, text: str) -> None:
    gain = RetrievalGain(data, "train", drift_weight=5.0, invalid=-0.7)
    assert gain("forest", text) == -0.7
    assert gain("forest", "lex: tea") == -0.7  # drift does not go below it


def test_rewards_are_the_same_alone_and_together_and_kept(data: RankingData) -> None:
    encoder = WordEncoder()
    together = RetrievalGain(data, "train", encoder)
    pairs = [
        ("forest", "lex: forest rivers"),
        ("jaguar", "vec: a jaguar car with an engine"),
        ("Router ", "hyde: The router is a gateway for packets.\nlex: router gateway"),
        ("forest", "lex: forest rivers"),
        ("forest", ""),
    ]
    first = [gain.reward for gain in together.gains(pairs)]
    asked = len(encoder.asked)
    assert [gain.reward for gain in together.gains(pairs)] == first and len(encoder.asked) == asked
    alone = RetrievalGain(data, "train", WordEncoder())
    assert [alone(query, text) for query, text in reversed(pairs)] == first[::-1]


def test_a_query_without_judgements_is_refused(data: RankingData) -> None:
    gain = RetrievalGain(data, "train")
    assert gain.queries == ("jaguar", "router", "forest")
    with pytest.raises(UserError, match="'tea' has no judgements in toy train"):
        gain("tea", "lex: tea")
    with pytest.raises(UserError, match="no split 'test'"):
        RetrievalGain(data, "test")


def test_golden_rows_have_a_higher_reward_than_the_template() -> None:
    data, rows = generated_collection(), {row.query: row for row in generated_rows()[1]}
    gain = RetrievalGain(data, "test")
    queries = gain.queries[:30]
    golden = gain.gains([(query, render_lines(rows[query].lines)) for query in queries])
    template = gain.gains([(query, template_expansion(query)) for query in queries])
    assert np.mean([g.reward for g in golden]) > 0.3 > np.mean([g.reward for g in template])
    assert np.mean([g.drift for g in golden]) <= np.mean([g.drift for g in template])
