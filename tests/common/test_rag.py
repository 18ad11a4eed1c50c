"""The pipeline: what it finds, what it gives a language model, what it does when the reranker fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.metrics.calibration import Confidence
from common.rag import RAGPipeline
from common.retrieval.documents import count_tokens, sentences
from common.retrieval.fusion import fuse_scores
from tests.retrieval_fakes import WordEncoder, WordScorer
from tests.tiny import World

DOCUMENTS = [
    {"id": "sort", "title": "Sorting", "text": "The function sorted gives a new list. It takes a key."},
    {
        "id": "json",
        "text": "Write an object as text with json dumps.",
        "metadata": {"source": "docs/json.html"},
    },
    {"id": "dict", "text": "A dict maps keys to values. Keys are unique. Order is kept."},
    *({"id": f"other{n}", "text": f"Number {n} says little about filler{n} of its own."} for n in range(20)),
]


@pytest.fixture
def pipeline() -> Callable[..., RAGPipeline]:
    def make(scorer: WordScorer | None = None, **settings: Any) -> RAGPipeline:
        made = RAGPipeline(WordEncoder(), scorer, say=lambda _: None, **settings)
        made.index_documents(DOCUMENTS)
        return made

    return make


Make = Callable[..., RAGPipeline]


def test_it_works_without_a_reranker(pipeline: Make) -> None:
    rag = pipeline(top_k_retrieval=4)
    found = rag.retrieve("sorted list")
    assert found.hits[0].id == "sort" and len(found.hits) == 4
    assert (found.first_stage, found.reranked, found.fallback) == ("rrf", False, None)
    same = rag.retrieve_and_rerank("sorted list", top_k=2)
    assert [hit.id for hit in same.hits] == [hit.id for hit in found.hits[:2]] and not same.reranked
    assert rag.statistics.queries == 2 and rag.statistics.fallbacks == {}


@pytest.mark.parametrize(("retrieval", "stage"), [("hybrid", "rrf"), ("dense", "dense"), ("bm25", "bm25")])
def test_every_way_of_retrieval(pipeline: Make, retrieval: str, stage: str) -> None:
    found = pipeline(retrieval=retrieval).retrieve("json dumps", top_k=3)
    assert found.first_stage == stage and found.hits[0].id == "json"
    assert [hit.rank for hit in found.hits] == [hit.first_rank for hit in found.hits]
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert found.hits[0].metadata == {"source": "docs/json.html"}
    assert set(found.seconds) == {"retrieve", "total"}


def test_it_retrieves_as_the_reranker_was_trained_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.rag.resolve_model", lambda model, say: Path(model))
    monkeypatch.setattr("common.rag.load_scorer", lambda *_, **__: WordScorer())
    monkeypatch.setattr("common.rag.load_confidence", lambda _: None)
    said: list[str] = []
    for stage, retrieval in (("dense", "dense"), ("rrf", "hybrid")):
        monkeypatch.setattr("common.rag.fitted_over", lambda _, stage=stage: (stage, 20))
        assert RAGPipeline(WordEncoder(), "runs/x/best", say=said.append).retrieval == retrieval
    assert said == []
    other = RAGPipeline(WordEncoder(), "runs/x/best", retrieval="bm25", say=said.append)
    assert other.retrieval == "bm25" and "chosen over hybrid retrieval, not bm25" in said[0]


def test_bm25_alone_needs_no_model() -> None:
    rag = RAGPipeline("bm25", say=lambda _: None)
    rag.index_documents(["a passage about sorting", "another about cooking"])
    assert [hit.text for hit in rag.retrieve("cooking").hits] == ["another about cooking"]
    assert rag.retrieve("nothing known").hits == [] and rag.get_context_for_llm("nothing known") == ""


@pytest.mark.parametrize("omega", [0.0, 0.7])
def test_hits_are_ordered_by_the_fused_score_with_the_model_s_weight(pipeline: Make, omega: float) -> None:
    rag = pipeline(WordScorer(omega=omega), top_k_retrieval=8, top_k_rerank=8)
    query = "keys are a function that maps little"
    first, found = rag.retrieve(query).hits, rag.retrieve_and_rerank(query)
    words = set(query.split())
    scores = [float(sum(w.strip(".") in words for w in hit.passage.read.lower().split())) for hit in first]
    fused = fuse_scores([hit.first_score for hit in first], scores, omega)
    order = np.argsort(-fused, kind="stable")
    assert found.reranked and [hit.id for hit in found.hits] == [first[place].id for place in order]
    assert [hit.first_rank for hit in found.hits] == [place + 1 for place in order]
    assert [hit.reranker for hit in found.hits] == [scores[place] for place in order]
    assert found.hits[0].score == pytest.approx(fused.max()) and found.hits[0].resonance == 0.5
    assert set(found.seconds) == {"retrieve", "rerank", "total"}


def test_confidence_is_the_model_s_own(pipeline: Make) -> None:
    rag = pipeline(WordScorer(), top_k_retrieval=10)
    assert rag.retrieve_and_rerank("keys").confidence is None
    rng = np.random.default_rng(0)
    rag.confidence = Confidence.fit(rng.random((40, 3)), rng.random(40) < 0.5, candidates=10)
    sure = rag.retrieve_and_rerank("keys", top_k=1).confidence
    assert sure is not None and 0.0 < sure < 1.0


def test_a_pair_is_scored_once_and_the_hit_rate_is_told(pipeline: Make) -> None:
    scorer = WordScorer()
    rag = pipeline(scorer, top_k_retrieval=6)
    once, again = (rag.retrieve_and_rerank("keys and values") for _ in range(2))
    assert once.hits == again.hits and scorer.scored == 6
    assert (rag.statistics.cache_hits, rag.statistics.cache_misses) == (6, 6)
    assert rag.statistics.cache_hit_rate == 0.5
    rag.index_documents([{"id": "dict", "text": "Now other words about keys and values."}])
    rag.retrieve_and_rerank("keys and values")
    assert 7 <= scorer.scored <= 8  # the changed passage, and perhaps one that it pushed in
    rag.set_reranker(WordScorer("another"))
    rag.retrieve_and_rerank("keys and values")
    assert rag.statistics.cache_hits <= 12


def test_the_cache_forgets_the_oldest_and_never_what_has_no_identity(pipeline: Make) -> None:
    scorer = WordScorer()
    small = pipeline(scorer, top_k_retrieval=6, cache_size=6)
    for query in ("keys", "list", "keys"):
        small.retrieve_and_rerank(query)
    assert scorer.scored == 18
    nameless = WordScorer(identity="")
    rag = pipeline(nameless, top_k_retrieval=6)
    rag.retrieve_and_rerank("keys")
    rag.retrieve_and_rerank("keys")
    assert nameless.scored == 12 and rag.statistics.cache_hits == 0


def test_a_failing_reranker_leaves_the_first_stage_marked_counted_and_logged_once(
    pipeline: Make, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = WordScorer()
    rag = pipeline(scorer)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    scorer.before = fail
    with caplog.at_level(logging.WARNING, logger="resonance.rag"):
        found = [rag.retrieve_and_rerank("keys") for _ in range(3)]
    assert [hit.id for hit in found[0].hits] == [hit.id for hit in rag.retrieve("keys").hits[:5]]
    assert all(item.fallback == "reranker failed: RuntimeError: the device is gone" for item in found)
    assert not found[0].reranked and found[0].hits[0].reranker is None
    assert rag.statistics.fallbacks == {"reranker failed": 3} and rag.statistics.reranked == 0
    assert len(caplog.records) == 1 and "the device is gone" in caplog.text
    scorer.before = lambda: None
    assert rag.retrieve_and_rerank("keys").reranked


def test_scores_that_are_no_numbers_count_as_a_failure(pipeline: Make) -> None:
    rag = pipeline(WordScorer())
    score = rag.scorer.score  # type: ignore[union-attr]

    def broken(*args: Any) -> Any:
        found = score(*args)
        found.score[0] = np.nan
        return found

    rag.scorer.score = broken  # type: ignore[union-attr, method-assign]
    assert "not finite" in str(rag.retrieve_and_rerank("keys").fallback)
    assert rag.cache.get([b""]) == [None] and len(rag.cache._values) == 0


def test_past_the_deadline_the_first_stage_is_given_and_the_work_stops(pipeline: Make) -> None:
    scorer, release = WordScorer(batch=1), threading.Event()
    rag = pipeline(scorer, deadline=0.05)
    scorer.before = lambda: (release.wait(20), None)[1]
    found = rag.retrieve_and_rerank("keys")
    assert found.fallback == "reranker past its deadline" and len(found.hits) == 5
    assert rag.retrieve_and_rerank("keys").fallback == "reranker still busy"  # nothing piles up behind it
    release.set()
    for _ in range(200):
        if not any(thread.is_alive() for thread in rag._late):
            break
        time.sleep(0.05)
    assert scorer.scored == 1  # told to stop at the next batch
    rag.deadline = 60.0
    assert rag.retrieve_and_rerank("keys").reranked
    assert rag.statistics.fallbacks == {"reranker past its deadline": 1, "reranker still busy": 1}


def test_an_expander_feeds_the_first_stage_and_the_reranker_reads_the_query(pipeline: Make) -> None:
    given = {"lex": ["filler7"], "vec": "number 9 says little about filler9", "hyde": []}
    scorer, asked = WordScorer(), list[str]()
    rag = pipeline(scorer, expand=lambda query: given, top_k_retrieval=6)
    score = scorer.score
    scorer.score = lambda q, p, b=None: (asked.extend(q), score(q, p, b))[1]  # type: ignore[method-assign]
    found = rag.retrieve("dumps")
    assert {"json", "other7", "other9"} <= {hit.id for hit in found.hits} and found.first_stage == "rrf"
    rag.retrieve_and_rerank("dumps")
    assert set(asked) == {"dumps"} and "expand" in found.seconds
    lexical = pipeline(retrieval="bm25", expand=lambda query: given).retrieve("dumps")
    assert {hit.id for hit in lexical.hits} == {"json", "other7"}


@pytest.mark.parametrize("given", [{"lex": 1.0}, {"nonsense": "x"}, None])
def test_an_expander_that_fails_is_left_out_and_counted(pipeline: Make, given: Any) -> None:
    rag = pipeline(expand=lambda query: given)
    plain = pipeline().retrieve("json dumps")
    assert [hit.id for hit in rag.retrieve("json dumps").hits] == [hit.id for hit in plain.hits]
    assert rag.statistics.fallbacks == {"expansion failed": 1}


def test_the_context_is_numbered_with_its_sources(pipeline: Make) -> None:
    text = pipeline(WordScorer()).get_context_for_llm("json dumps object", top_k=2)
    assert text.startswith("[1] json docs/json.html\nWrite an object as text with json dumps.\n\n[2] ")
    assert (
        pipeline(WordScorer()).get_context_for_llm("sorted key", top_k=1).startswith("[1] Sorting (sort)\n")
    )


def test_no_budget_is_passed_and_no_sentence_cut(pipeline: Make) -> None:
    rag = pipeline(WordScorer())
    whole = rag.context("keys a dict maps", top_k=4, max_tokens=10_000)
    assert len(whole.sources) == 4
    known = {sentence for item in DOCUMENTS for sentence in sentences(item["text"])}
    seen = set()
    for budget in range(1, whole.tokens + 2):
        context = rag.context("keys a dict maps", top_k=4, max_tokens=budget)
        assert count_tokens(context.text) == context.tokens <= budget
        seen.add(len(context.sources))
        for part in filter(None, context.text.split("\n\n")):
            heading, _, body = part.partition("\n")
            assert heading.startswith("[") and body
            assert set(sentences(body)) <= known
    assert seen == {0, 1, 2, 3, 4} and context.text == whole.text


def test_the_budget_counts_the_language_model_s_own_tokens(pipeline: Make) -> None:
    rag = pipeline(token_counter=len)
    assert 0 < len(rag.get_context_for_llm("keys", max_tokens=90)) <= 90


def test_deleting_and_an_index_that_stays(tmp_path: Path) -> None:
    rag = RAGPipeline(WordEncoder(), index_dir=tmp_path / "index", say=lambda _: None)
    assert rag.index_documents(DOCUMENTS).added == 23
    again = RAGPipeline(WordEncoder(), index_dir=tmp_path / "index", say=lambda _: None)
    assert again.retrieve("json dumps").hits[0].id == "json"
    assert again.delete_documents(name for name in ("json", "unknown")) == 1
    assert "json" not in {hit.id for hit in rag.retrieve("json dumps").hits}


def test_what_cannot_be_is_refused(pipeline: Make) -> None:
    for settings, message in (
        ({"top_k_rerank": 0}, "top_k_rerank is 0; allowed: a whole number >= 1"),
        ({"top_k_retrieval": 2.5}, "top_k_retrieval is 2.5; allowed: a whole number"),
        ({"deadline": 0}, "deadline is 0; allowed: seconds > 0"),
        ({"cache_size": -1}, "cache_size is -1"),
        ({"retrieval": "magic"}, "retrieval is 'magic'; allowed: hybrid, dense, bm25"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(**settings)
    with pytest.raises(UserError, match="needs a retriever model that is an encoder"):
        RAGPipeline("bm25", retrieval="hybrid")
    rag = pipeline()
    bad: list[tuple[Any, str]] = [
        (" ", "query is empty"),
        ("a\ud800", "not UTF-8"),
        (None, "is a NoneType; give a text"),
    ]
    for query, message in bad:
        with pytest.raises(UserError, match=message):
            rag.retrieve_and_rerank(query)
    with pytest.raises(UserError, match="top_k is '3'; allowed: a whole number"):
        rag.retrieve("keys", top_k="3")  # type: ignore[arg-type]
    ids: list[Any] = ["json", [3], 3, None]
    for given in ids:
        with pytest.raises(UserError, match="ids come in a list of texts"):
            rag.delete_documents(given)
    assert len(rag.retrieve("json dumps").hits) > 0
    with pytest.raises(UserError, match="allowed: >= 1"):
        rag.context("keys", max_tokens=0)


@pytest.mark.slow
def test_real_models_answer_with_all_their_parts(world: World) -> None:
    rag = RAGPipeline(world.base, world.base, say=lambda _: None)
    rag.index_documents(["bolum banosh", "dolum kirosh"])
    found = rag.retrieve_and_rerank("bolum")
    assert found.reranked and len(found.hits) == 2
    assert all(-1.0 <= hit.resonance <= 1.0 and 0.0 <= hit.overlap <= 1.0 for hit in found.hits)
