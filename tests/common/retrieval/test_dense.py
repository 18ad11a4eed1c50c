"""Dense retrieval with a made-up encoder: exact, cached, and told apart by data and model."""

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest

from common.data.records import RankingData
from common.errors import UserError
from common.metrics.ranking import ranked
from common.retrieval.candidates import first_stages, judged_stages
from common.retrieval.dense import dense_run, embed


class LetterCounts:
    """Unit vectors of letter counts; counts the texts that it encoded."""

    name, dim = "letters", 26

    def __init__(self, identity: str = "letters-1") -> None:
        self.identity = identity
        self.encoded: dict[str, int] = {"query": 0, "passage": 0}

    def encode(self, texts: Sequence[str], *, kind: str) -> np.ndarray:
        self.encoded[kind] += len(texts)
        counts = np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def data() -> RankingData:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    corpus = {f"p{i}": " ".join(rng.choice(words, 6)) for i in range(40)}
    queries = {f"q{i}": " ".join(rng.choice(words, 3)) for i in range(7)}
    qrels = {q: {f"p{(7 * i + j) % 40}": j % 2 for j in range(4)} for i, q in enumerate(queries)}
    return RankingData("letters", corpus, queries, {"test": qrels})


def test_the_run_holds_the_highest_inner_products(data: RankingData) -> None:
    encoder = LetterCounts()
    run = dense_run(data.corpus, data.queries, encoder, depth=5)
    ids = list(data.corpus)
    products = encoder.encode(list(data.queries.values()), kind="query") @ (
        encoder.encode(list(data.corpus.values()), kind="passage").T
    )
    for row, query in zip(products, data.queries, strict=True):
        np.testing.assert_allclose(sorted(run[query].values(), reverse=True), np.sort(row)[:-6:-1], rtol=1e-5)
        for passage, score in run[query].items():
            assert score == pytest.approx(row[ids.index(passage)], rel=1e-5)
    assert len(dense_run(data.corpus, data.queries, encoder, depth=1000)["q0"]) == 40


def test_vectors_come_back_in_the_order_of_the_texts() -> None:
    texts = ["a", "bbbb", "cc", "ddddddd"]
    assert embed(texts, LetterCounts(), "passage").argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_the_corpus_is_embedded_once_per_model_and_data(data: RankingData, tmp_path: Path) -> None:
    first, again, other = LetterCounts(), LetterCounts(), LetterCounts("letters-2")
    args = (data.corpus, data.queries)
    run = dense_run(*args, first, 5, tmp_path, data.fingerprint)
    # the order of the corpus is no part of the fingerprint
    backwards = dict(reversed(data.corpus.items()))
    assert dense_run(backwards, data.queries, again, 5, tmp_path, data.fingerprint) == run
    dense_run(*args, other, 5, tmp_path, data.fingerprint)
    assert [e.encoded["passage"] for e in (first, again, other)] == [40, 0, 40]


def test_a_broken_vector_file_is_named(data: RankingData, tmp_path: Path) -> None:
    dense_run(data.corpus, data.queries, LetterCounts(), 5, tmp_path, data.fingerprint)
    (path,) = tmp_path.glob("passages-*.npy")
    path.write_bytes(b"no array" + path.read_bytes())  # NumPy takes it for a pickle
    with pytest.raises(UserError, match=f"{path.name}: a broken cache file. Delete it"):
        dense_run(data.corpus, data.queries, LetterCounts(), 5, tmp_path, data.fingerprint)


class Damaged(LetterCounts):
    """Knows no number for a text with the word "bad"."""

    def encode(self, texts: Sequence[str], *, kind: str) -> np.ndarray:
        vectors = super().encode(texts, kind=kind)
        vectors[["bad" in text for text in texts]] = np.nan
        return vectors


@pytest.mark.parametrize("kind", ["passage", "query"])
def test_vectors_that_are_not_finite_are_refused_and_not_kept(kind: str, tmp_path: Path) -> None:
    corpus = {"a": "good", "b": "bad passage" if kind == "passage" else "fine"}
    queries = {"q": "bad query" if kind == "query" else "fine"}
    message = rf"letters: 1 of \d {kind} vectors are not finite, the first of 'bad {kind}'"
    with pytest.raises(UserError, match=message):
        dense_run(corpus, queries, Damaged(), 2, tmp_path / kind, "corpus-1")
    assert [file.name for file in tmp_path.rglob("passages-*")] == (
        [] if kind == "passage" else ["passages-corpus-1-letters-1.npy"]
    )


def test_kept_vectors_that_are_not_finite_are_not_used(data: RankingData, tmp_path: Path) -> None:
    args = (data.corpus, data.queries, LetterCounts(), 5, tmp_path, data.fingerprint)
    dense_run(*args)
    (path,) = tmp_path.glob("passages-*.npy")
    vectors = np.load(path)
    vectors[3, 4] = np.nan
    np.save(path, vectors)
    with pytest.raises(UserError, match=f"{path.name}.*finite.*Delete it"):
        dense_run(*args)


def test_places_that_the_search_could_not_fill_are_no_passages(
    data: RankingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = faiss.IndexFlatIP.search

    def too_few(self: faiss.IndexFlatIP, vectors: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        scores, places = search(self, vectors.astype(np.float32), depth)
        places[:, -1], scores[:, -1] = -1, np.finfo(np.float32).min
        return scores, places

    monkeypatch.setattr(faiss.IndexFlatIP, "search", too_few)
    run = dense_run(data.corpus, data.queries, LetterCounts(), depth=5)
    assert {len(passages) for passages in run.values()} == {4}
    assert min(min(passages.values()) for passages in run.values()) >= 0


def test_first_stages_are_computed_once(data: RankingData, tmp_path: Path) -> None:
    first, again = LetterCounts(), LetterCounts()
    runs = first_stages(data, data.queries, first, depth=8, cache_dir=tmp_path)
    assert first_stages(data, data.queries, again, depth=8, cache_dir=tmp_path) == runs
    assert again.encoded == {"query": 0, "passage": 0}
    assert list(runs) == ["bm25", "dense", "rrf"]
    assert all(len(run[query]) <= 8 for run in runs.values() for query in data.queries)
    assert runs["rrf"]["q0"].keys() <= runs["bm25"]["q0"].keys() | runs["dense"]["q0"].keys()


def test_another_depth_query_or_model_is_not_taken_from_the_cache(data: RankingData, tmp_path: Path) -> None:
    first_stages(data, data.queries, LetterCounts(), depth=8, cache_dir=tmp_path)
    assert len(first_stages(data, data.queries, LetterCounts(), 3, tmp_path)["dense"]["q0"]) == 3
    assert list(first_stages(data, {"q1": "abcd"}, LetterCounts(), 8, tmp_path)["dense"]) == ["q1"]
    other = LetterCounts("letters-2")
    first_stages(data, data.queries, other, depth=8, cache_dir=tmp_path)
    assert other.encoded["query"] == 7


def test_bm25_alone_needs_no_encoder(data: RankingData) -> None:
    assert list(first_stages(data, data.queries, which=("bm25",))) == ["bm25"]
    with pytest.raises(UserError, match="need an encoder"):
        first_stages(data, data.queries)
    with pytest.raises(UserError, match="unknown first stage 'splade'"):
        first_stages(data, data.queries, which=("splade",))


def test_judged_candidates_are_exactly_the_judged_rows(data: RankingData, tmp_path: Path) -> None:
    qrels = data.split("test")
    runs = judged_stages(data, qrels, LetterCounts(), tmp_path)
    for run in runs.values():
        assert {q: set(candidates) for q, candidates in run.items()} == {q: set(g) for q, g in qrels.items()}
    # the scores are those of the search over the whole corpus
    everything = dense_run(data.corpus, data.queries, LetterCounts(), depth=40)
    for query, scores in runs["dense"].items():
        assert scores == pytest.approx({passage: everything[query][passage] for passage in scores}, rel=1e-5)
        assert ranked(scores) == [p for p in ranked(everything[query]) if p in scores]
    again = LetterCounts()
    assert judged_stages(data, qrels, again, tmp_path) == runs and again.encoded["query"] == 0
