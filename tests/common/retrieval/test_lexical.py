"""BM25: small truths, and the published number on SciFact."""

import logging
from pathlib import Path

import pytest

from common.data.sources import load_ranking_data
from common.metrics.ranking import evaluate_run, mean, ranked
from common.retrieval.lexical import BM25, bm25_run


def test_the_passage_with_the_rare_word_comes_first() -> None:
    corpus = {
        "1": "the cat sat on the mat",
        "2": "dogs and cats",
        "3": "a zebra with the cat",
        "4": "nothing",
    }
    run = bm25_run(corpus, {"q": "Zebras and cat"}, depth=3)
    assert ranked(run["q"])[0] == "3"
    assert set(run["q"]) == {"1", "2", "3"}  # "4" shares no word


def test_no_shared_word_gives_an_empty_list() -> None:
    run = bm25_run({"1": "alpha", "2": "beta"}, {"q": "gamma", "stop": "the of", "none": ""}, depth=2)
    assert run == {"q": {}, "stop": {}, "none": {}}
    assert bm25_run({"1": "the", "2": "of"}, {"q": "the"}, depth=2) == {"q": {}}


def test_equal_passages_are_cut_by_id_whatever_their_order() -> None:
    corpus = {name: "same words here" for name in ("d", "b", "a", "c")}
    assert list(bm25_run(corpus, {"q": "words"}, depth=2)["q"]) == ["a", "b"]


def test_scores_do_not_depend_on_the_other_queries() -> None:
    index = BM25(["one two", "two three", "three four four"])
    alone = index.scores("four three")
    index.scores("two two one")
    assert (index.scores("four three") == alone).all() and alone.shape == (3,)


def test_scifact_reaches_the_published_bm25(data_dir: Path) -> None:
    data = load_ranking_data(str(data_dir / "scifact"))
    qrels = data.split("test")
    run = bm25_run(data.corpus, {query: data.queries[query] for query in qrels}, depth=100)
    assert mean(evaluate_run(run, qrels, ("nDCG@10",))["nDCG@10"]) == pytest.approx(0.676, abs=0.003)


def test_the_library_does_not_narrate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        bm25_run({"1": "a cat", "2": "two dogs"}, {"q": "cat"}, depth=1)
    assert not caplog.records
