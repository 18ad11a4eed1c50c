"""The encoder and the scorer of a directory: texts in, vectors or scores out, in the order they came."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from common.hub import resolve_model
from common.text import PairTokenizer
from jax_impl import scoring
from jax_impl.scoring import batches_by_length, load_encoder, load_scorer
from tests.tiny import FILLER, World, write_base


def random_texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(FILLER, rng.integers(1, 45))) for _ in range(count)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 texts of 32 tokens, or 2 of 64."""
    monkeypatch.setitem(scoring.TOKENS_PER_BATCH, jax.default_backend(), 128)


@pytest.mark.usefixtures("small_batches")
def test_vectors_come_back_in_order_and_of_unit_length(world: World, seed: int) -> None:
    encoder, texts = load_encoder(world.base), random_texts(seed, 11)
    vectors = encoder.encode(texts)
    assert vectors.shape == (11, encoder.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    order = np.random.default_rng(seed).permutation(11)
    np.testing.assert_allclose(
        encoder.encode([texts[i] for i in order], kind="query"), vectors[order], atol=1e-5
    )
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


@pytest.mark.usefixtures("small_batches")
def test_scores_come_back_in_order_and_progress_adds_up(world: World, seed: int) -> None:
    scorer, passages = load_scorer(world.base), random_texts(seed, 9)
    queries = [text[:9] for text in random_texts(seed + 1, 9)]
    done: list[int] = []
    scores = scorer.score(queries, passages, done.append)
    assert sum(done) == 9 and len(done) > 2
    order = np.random.default_rng(seed).permutation(9)
    shuffled = scorer.score([queries[i] for i in order], [passages[i] for i in order])
    for name, values in vars(scores).items():
        assert values.shape == (9,) and values.dtype == np.float32 and np.isfinite(values).all()
        np.testing.assert_allclose(getattr(shuffled, name), values[order], atol=2e-4, err_msg=name)
    fidelity = (scores.overlap * scores.coherence) ** 2
    assert (fidelity >= scores.resonance**2 - 1e-5).all() and (scores.coherence <= 1 + 1e-6).all()


def test_nothing_in_gives_nothing_out(world: World) -> None:
    encoder, scorer = load_encoder(world.base), load_scorer(world.base)
    assert encoder.encode([]).shape == (0, encoder.dim)
    assert all(values.shape == (0,) for values in vars(scorer.score([], [])).values())


def test_batches_hold_every_text_once_under_the_token_budget(world: World, seed: int) -> None:
    encodeds = load_encoder(world.base).tokenizer.encode_texts(random_texts(seed, 300), 64)
    batches = list(batches_by_length(encodeds))
    assert sorted(i for indices, _, _ in batches for i in indices) == list(range(300))
    for indices, rows, length in batches:
        assert len(indices) <= rows and rows * length <= 4096
        assert max(len(encodeds[i].ids) for i in indices) <= length


def test_a_pair_may_fill_every_position_of_the_model(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", max_position_embeddings=41)
    (base / "modules.json").write_text("[]")
    scorer = load_scorer(base)
    scorer.tokenizer = PairTokenizer(base, 18, 20)  # with [CLS] and two [SEP]: 41, between two padded lengths
    texts = [" ".join(FILLER[:40])] * 3
    assert np.isfinite(scorer.score(texts, texts).score).all()


def test_minilm_encodes_as_sentence_transformers_does() -> None:
    library = pytest.importorskip(
        "sentence_transformers", reason="needs sentence-transformers: install the extra `peers`"
    )
    directory: Path = resolve_model("default")
    words = "the reranker reads a query and a passage together, then says how well they answer".split()
    texts = ["", "cat", "How do I sort a list?", " ".join(words * 30)]  # the last is longer than 256 tokens
    theirs = library.SentenceTransformer(str(directory), device="cpu").encode(texts)
    np.testing.assert_allclose(load_encoder(directory).encode(texts), theirs, atol=1e-4)
