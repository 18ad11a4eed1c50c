"""ONNX graphs compute what JAX computes: every head, activation, segment and precision, at any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from common.backends import Scores, load_encoder, load_scorer
from common.config import RerankerConfig
from common.errors import UserError
from common.export.onnx_scoring import batches_by_length
from common.export.verification import PRECISIONS
from common.text import Encoded
from jax_impl.export.onnx import HEADS, Graph, export_bi_encoder, export_cross_encoder
from tests.language_exports import written
from tests.rerankers import reranker
from tests.tiny import FILLER, PARTNERS, TOPIC_WORDS, WORDS, write_base

PARTS = ("score", "portable", "resonance", "overlap", "coherence")


def pairs(seed: int, count: int = 40) -> tuple[list[str], list[str]]:
    """Queries of 1 to 6 words and passages of 1 to 40."""
    rng = np.random.default_rng(seed)
    words = [*TOPIC_WORDS, *WORDS, *PARTNERS, *FILLER]
    return tuple(  # type: ignore[return-value]
        [" ".join(rng.choice(words, rng.integers(1, most))) for _ in range(count)] for most in (7, 41)
    )


def differences(one: Scores, other: Scores) -> dict[str, float]:
    return {
        part: float(
            np.abs(getattr(one, part) - getattr(other, part)).max()
            / max(1.0, np.abs(getattr(one, part)).max())
        )
        for part in PARTS
    }


@pytest.mark.parametrize("head", HEADS)
def test_every_head_scores_as_in_jax(tmp_path: Path, seed: int, head: str) -> None:
    source = reranker(tmp_path, seed, head)
    scorer = load_scorer(written(tmp_path / "onnx", export_cross_encoder(source, "fp32")))
    queries, passages = pairs(seed)
    expected = load_scorer(source, "jax").score(queries, passages)
    got = scorer.score(queries, passages)
    assert got.score.shape == (40,) and np.std(got.score) > 0.1
    assert max(differences(expected, got).values()) < 1e-4
    assert scorer.fusion_weight == 0.4


@pytest.mark.parametrize(
    ("bert", "model"),
    [
        ({"hidden_act": "gelu_new"}, {}),
        ({"hidden_act": "relu", "num_hidden_layers": 1}, {"complex_width": 12}),
        ({"layer_norm_eps": 1e-3}, {"projector": "polar"}),
        ({}, {"passage_segment": 1}),
    ],
)
def test_variants_score_as_in_jax(
    tmp_path: Path, seed: int, bert: dict[str, Any], model: dict[str, Any]
) -> None:
    source = reranker(tmp_path, seed, base=write_base(tmp_path / "base", **bert), **model)
    queries, passages = pairs(seed)
    expected = load_scorer(source, "jax").score(queries, passages)
    full = load_scorer(written(tmp_path / "onnx", export_cross_encoder(source, "fp32")))
    assert max(differences(expected, full.score(queries, passages)).values()) < 1e-4
    portable = load_scorer(written(tmp_path / "portable", export_cross_encoder(source, "fp32", "portable")))
    got = portable.score(queries, passages)
    np.testing.assert_allclose(got.score, expected.portable, atol=1e-4)
    assert portable.fusion_weight == 0.0 and not got.resonance.any()


def test_smaller_precisions_stay_near_and_are_smaller(tmp_path: Path, seed: int) -> None:
    source = reranker(tmp_path, seed)
    queries, passages = pairs(seed)
    expected = load_scorer(source, "jax").score(queries, passages)
    exports = {precision: export_cross_encoder(source, precision) for precision in PRECISIONS}
    sizes = {precision: len(exported.model) for precision, exported in exports.items()}
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    found = {}
    for precision, exported in exports.items():
        scorer = load_scorer(written(tmp_path / precision, exported))
        found[precision] = differences(expected, scorer.score(queries, passages))
        assert np.corrcoef(expected.score, scorer.score(queries, passages).score)[0, 1] > 0.98, precision
    assert found["fp32"]["score"] < 1e-4 < found["int8"]["score"] and found["fp16"]["score"] < 2e-2
    errors = exports["int8"].errors
    assert len(errors) == 1 + 2 * 4 and all(0 < error < 0.02 for error in errors.values())
    narrow = export_cross_encoder(source, "int8", reduce_range=True).errors
    assert all(errors[key] < narrow[key] < 0.04 for key in errors)


def test_calibrated_int8_is_nearer_where_a_channel_is_far_larger(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, 50, 32)).astype(np.float32)
    x[..., 3] *= 100  # as in trained models, whose matrices have small weights there
    matrix = rng.normal(size=(16, 32)).astype(np.float32)
    matrix[:, 3] /= 100
    errors = {}
    for name, ranges in (
        ("plain", {}),
        ("calibrated", {"m": np.stack([x.min(axis=(0, 1)), x.max(axis=(0, 1))])}),
    ):
        graph = Graph("int8", ranges=ranges)
        graph.input("x", ("rows", "tokens", 32), "FLOAT")
        model = graph.model({"y": (graph.product("x", "m", matrix), ["rows", "tokens", 16])})
        (found,) = onnxruntime.InferenceSession(model).run(["y"], {"x": x})
        errors[name] = np.linalg.norm(found - x @ matrix.T) / np.linalg.norm(x @ matrix.T)
    assert errors["calibrated"] < 0.03 and errors["plain"] > 5 * errors["calibrated"]


def test_calibration_sees_real_tokens_alone_and_only_int8_needs_it(tmp_path: Path, seed: int) -> None:
    source = reranker(tmp_path, seed)
    queries, passages = pairs(seed, 9)
    calibration = list(zip(queries, passages, strict=True))
    exported = export_cross_encoder(source, "int8", calibration=calibration)
    assert exported.config["onnx"]["calibrated_on"] == 9
    expected = load_scorer(source, "jax").score(queries, passages)
    found = load_scorer(written(tmp_path / "int8", exported)).score(queries, passages)
    assert np.corrcoef(expected.score, found.score)[0, 1] > 0.98
    smooth = [
        {w.name: numpy_helper.to_array(w) for w in onnx.load_from_string(each).graph.initializer}
        for each in (
            exported.model,
            export_cross_encoder(source, "int8", calibration=calibration[::-1]).model,  # padded otherwise
        )
    ]
    names = [name for name in smooth[0] if name.endswith(".smooth")]
    assert len(names) == 2 * 4
    for name in names:
        np.testing.assert_allclose(smooth[0][name], smooth[1][name], rtol=1e-4)
    plain = export_cross_encoder(source, "fp32", calibration=calibration)
    assert "calibrated_on" not in plain.config["onnx"]
    texts = export_bi_encoder(write_base(tmp_path / "encoder"), "int8", calibration=passages)
    assert texts.config["onnx"]["calibrated_on"] == 9


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sentence_encoder_gives_the_same_vectors(tmp_path: Path, seed: int, precision: Any) -> None:
    source = write_base(tmp_path / "base", num_hidden_layers=2)
    _, texts = pairs(seed)
    expected = load_encoder(source, "jax").encode(texts, kind="passage")
    encoder = load_encoder(written(tmp_path / "onnx", export_bi_encoder(source, precision)))
    got = encoder.encode(texts, kind="passage")
    assert got.shape == (40, encoder.dim) and got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    least = {"fp32": 1 - 1e-5, "fp16": 1 - 1e-4, "int8": 0.98}[precision]
    assert (expected * got).sum(axis=1).min() > least
    assert encoder.encode([], kind="query").shape == (0, encoder.dim)


def test_a_calibrated_int8_score_depends_on_no_neighbour_in_the_batch(tmp_path: Path, seed: int) -> None:
    """Else onnxruntime takes the scale of the activations from the whole batch."""
    source = reranker(tmp_path, seed)
    queries, passages = pairs(seed)
    calibration = list(zip(queries, passages, strict=True))[:10]
    exported = export_cross_encoder(source, "int8", calibration=calibration)
    scorer = load_scorer(written(tmp_path / "int8", exported))
    together = scorer.score(queries, passages).score
    alone = [scorer.score([q], [p]).score[0] for q, p in zip(queries, passages, strict=True)]
    np.testing.assert_allclose(alone, together, atol=2e-3)


def test_a_score_depends_on_no_neighbour_in_the_batch(tmp_path: Path, seed: int) -> None:
    scorer = load_scorer(written(tmp_path / "onnx", export_cross_encoder(reranker(tmp_path, seed), "fp32")))
    queries, passages = pairs(seed, 60)
    together = scorer.score(queries, passages).score
    alone = [
        scorer.score([query], [passage]).score[0] for query, passage in zip(queries, passages, strict=True)
    ]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_what_is_not_exported_is_refused_by_name(tmp_path: Path) -> None:
    roberta = write_base(tmp_path / "roberta", model_type="roberta")
    for export in (export_cross_encoder, export_bi_encoder):
        with pytest.raises(UserError, match="a roberta model; exported to ONNX is bert"):
            export(roberta, "fp32")
    blocks = reranker(tmp_path, 0, "block_fidelity")
    with pytest.raises(UserError, match="its head is 'block_fidelity'; exported are resonance, real"):
        export_cross_encoder(blocks, "fp32")
    assert export_cross_encoder(blocks, "fp32", "portable").config["onnx"]["score"] == "portable"


def test_a_base_is_exported_as_it_would_start(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", head=True)
    exported = export_cross_encoder(base, "fp32")
    assert exported.config["resonance"]["max_passage_tokens"] == RerankerConfig().data.max_passage_tokens


def test_batches_hold_few_tokens_and_little_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    encodeds = [Encoded(np.zeros(n, np.int32), np.zeros(n, np.int8)) for n in rng.integers(1, 300, 500)]
    batches = list(batches_by_length(encodeds, 512))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    sizes = [[len(encodeds[index].ids) for index in batch] for batch in batches]
    assert all(max(size) * len(size) <= 512 for size in sizes)
    padded, real = sum(max(size) * len(size) for size in sizes), sum(map(sum, sizes))
    assert padded < 1.1 * real
    shared = list(batches_by_length(encodeds, 512, cores=8))
    assert sorted(np.concatenate(shared).tolist()) == list(range(500))
    tokens = [sum(len(encodeds[index].ids) for index in batch) for batch in shared]
    assert max(tokens) <= 512 and tokens[-1] <= 128 and np.median(tokens[:20]) > 256
