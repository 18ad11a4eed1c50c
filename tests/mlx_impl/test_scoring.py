"""MLX's encoder and scorer of a directory: vectors and scores as JAX has them, in the order of the texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

import mlx.core as mx

from common.backends import load_encoder, load_scorer
from common.config import ModelConfig
from common.text import PairTokenizer
from mlx_impl import scoring
from mlx_impl.loading import load_bi_encoder, load_cross_encoder
from scripts import rerank
from tests.tiny import FILLER, World, write_base


def random_texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(FILLER, rng.integers(1, 45))) for _ in range(count)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 texts of 32 tokens, or 2 of 64."""
    monkeypatch.setitem(scoring.TOKENS_PER_BATCH, mx.default_device().type.name, 128)


@pytest.mark.usefixtures("small_batches")
def test_vectors_come_back_in_order_as_jax_has_them(world: World, seed: int) -> None:
    encoder, texts = load_encoder(world.base, "mlx"), random_texts(seed, 11)
    vectors = encoder.encode(texts, kind="passage")
    assert vectors.shape == (11, encoder.dim) and vectors.dtype == np.float32
    order = np.random.default_rng(seed).permutation(11)
    np.testing.assert_allclose(
        encoder.encode([texts[i] for i in order], kind="query"), vectors[order], atol=1e-5
    )
    jax = load_encoder(world.base, "jax")
    np.testing.assert_allclose(vectors, jax.encode(texts, kind="passage"), atol=1e-4)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2
    assert encoder.identity != jax.identity  # what is cached of one is not the other's


@pytest.mark.usefixtures("small_batches")
def test_scores_come_back_in_order_as_jax_has_them(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed, head=True)  # a start without a random part but B
    passages, queries = random_texts(seed, 9), [text[:9] for text in random_texts(seed + 1, 9)]
    done: list[int] = []
    scorer = load_scorer(base, "mlx")
    scores = scorer.score(queries, passages, done.append)
    assert sum(done) == 9 and len(done) > 2
    order = np.random.default_rng(seed).permutation(9)
    shuffled = scorer.score([queries[i] for i in order], [passages[i] for i in order])
    for name, values in vars(scores).items():
        assert values.shape == (9,) and values.dtype == np.float32 and np.isfinite(values).all()
        np.testing.assert_allclose(getattr(shuffled, name), values[order], atol=2e-4, err_msg=name)
    theirs = load_scorer(base, "jax").score(queries, passages)
    for name in ("score", "portable", "resonance"):
        np.testing.assert_allclose(getattr(scores, name), getattr(theirs, name), atol=1e-4, err_msg=name)
    assert np.std(scores.score) > 1e-2


def test_nothing_in_gives_nothing_out(world: World) -> None:
    encoder, scorer = load_encoder(world.base, "mlx"), load_scorer(world.base, "mlx")
    assert encoder.encode([], kind="query").shape == (0, encoder.dim)
    assert all(values.shape == (0,) for values in vars(scorer.score([], [])).values())


def test_a_scorer_follows_the_parameters_it_is_given(world: World) -> None:
    scorer = scoring.load_scorer(world.base)
    before = scorer.score(["bano"], ["luro kino"]).score
    scorer.set_state({"resonance": {"gamma": mx.array(0.0), "b": mx.array(3.0)}})
    assert before[0] != 3.0 and scorer.score(["bano"], ["luro kino"]).score[0] == 3.0


def test_a_pair_may_fill_every_position_of_the_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", max_position_embeddings=41)
    scorer = scoring.load_scorer(base)
    scorer.tokenizer = PairTokenizer(base, 18, 20)  # with [CLS] and two [SEP]: 41, between two padded lengths
    texts = [" ".join(FILLER[:40])] * 3
    assert np.isfinite(scorer.score(texts, texts).score).all()


def test_bfloat16_is_a_rounding_of_float32(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    ids = mx.array(np.random.default_rng(seed).integers(5, 100, (3, 12)))
    mask = mx.array(np.arange(12) < np.array([[12], [7], [0]]))
    narrow, wide = (load_bi_encoder(base, dtype=dtype) for dtype in (mx.bfloat16, mx.float32))
    assert narrow.encoder(ids, mask).dtype == mx.bfloat16 and wide.encoder(ids, mask).dtype == mx.float32
    difference = np.abs(np.array(narrow(ids, mask)) - np.array(wide(ids, mask))).max()
    assert 1e-5 < difference < 0.1
    out = load_cross_encoder(base, ModelConfig(), dtype=mx.bfloat16).model(ids, mask.astype(mx.int8))
    assert out.score.dtype == out.portable.dtype == out.resonance.dtype == mx.float32
    assert bool(mx.all(mx.isfinite(out.score)))  # the row of padding too


def test_the_rerank_command_takes_the_backend(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passages = tmp_path / "passages.txt"
    passages.write_text("\n".join(random_texts(0, 4)) + "\n")
    command = ["--model", str(world.base), "--query", "bano luro", "--passages", str(passages), "--json"]
    shown = []
    for backend in ("mlx", "jax"):
        rerank.main([*command, "--backend", backend])
        shown.append(json.loads(capsys.readouterr().out)["passages"])
    assert [item["id"] for item in shown[0]] == [item["id"] for item in shown[1]]
