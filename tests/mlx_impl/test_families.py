"""Every family of encoders in MLX: strict checkpoints, refused variants, adapters, JAX's files, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")
pytest.importorskip("torch", reason="checkpoints are written with torch: install the extra `peers`")
pytest.importorskip("transformers")

import mlx.core as mx
import torch
import transformers
from safetensors.numpy import load_file, save_file

from common.config import ModelConfig
from common.errors import UserError
from common.keymap import FAMILIES
from common.text import PairTokenizer
from mlx_impl.loading import MODELS, load_bi_encoder, load_cross_encoder, model_tensors, save_cross_encoder
from mlx_impl.models.deberta import DebertaV2Config, relative_rows
from mlx_impl.models.lora import add_lora, trainable
from mlx_impl.scoring import load_scorer
from tests.families import OTHER_HEADS, UNSUPPORTED, tiny_sizes, write_checkpoint
from tests.parity.backends import Mlx, backend_of
from tests.tiny import FILLER

TOLERANCE = 1e-4  # float32
QUERIES = ["bano luro", "kino", "bano"]
PASSAGES = [" ".join(FILLER[:9]), "luro kino", "dorax"]

every_family = pytest.mark.parametrize("family", list(FAMILIES))


def test_every_family_of_the_key_table_has_a_model() -> None:
    assert list(MODELS) == list(backend_of("jax").module("loading").MODELS) == sorted(FAMILIES)


@every_family
def test_a_base_is_strict_both_ways_and_may_carry_the_heads_of_its_family(
    family: str, tmp_path: Path
) -> None:
    for head in OTHER_HEADS[family]:
        base = write_checkpoint(tmp_path / head, family, head)
        assert load_cross_encoder(base, ModelConfig()).start == "masked_lm"
        load_bi_encoder(base)
    tensors = load_file(base / "model.safetensors")
    inside = [key for key in tensors if key.startswith(FAMILIES[family].prefix) and "pooler" not in key]
    gone = inside[len(inside) // 2]
    tensors["stranger.weight"] = np.zeros(3, np.float32)
    save_file({key: value for key, value in tensors.items() if key != gone}, base / "model.safetensors")
    for load in (load_bi_encoder, lambda directory: load_cross_encoder(directory, ModelConfig())):
        with pytest.raises(UserError) as error:
            load(base)
        assert f"missing: {gone} " in str(error.value)
        assert "unexpected: stranger.weight [3]" in str(error.value)


@pytest.mark.parametrize(("family", "setting", "value", "allowed"), UNSUPPORTED)
def test_a_variant_that_is_not_computed_is_refused_by_name(
    family: str, setting: str, value: Any, allowed: str, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model")
    config = json.loads((base / "config.json").read_text()) | {setting: value}
    (base / "config.json").write_text(json.dumps(config))
    for load in (load_bi_encoder, lambda directory: load_cross_encoder(directory, ModelConfig())):
        with pytest.raises(UserError) as error:
            load(base)
        named = "rope_type" if setting == "rope_parameters" else setting
        assert str(error.value).startswith(f"{base / 'config.json'}: {named} is ")
        assert allowed in str(error.value)


@every_family
def test_an_existing_cross_encoder_scores_as_transformers_and_is_written_as_jax_writes_it(
    family: str, seed: int, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", family, seed=seed)
    loaded = load_cross_encoder(base, ModelConfig())
    assert loaded.start == "cross_encoder"
    scores = load_scorer(base).score(QUERIES, PASSAGES)
    np.testing.assert_allclose(scores.score, scores.portable, atol=TOLERANCE)
    settings = ModelConfig(complex_width=12)
    in_jax = backend_of("jax").module("loading")
    writers = {
        "mlx": (save_cross_encoder, load_cross_encoder(base, settings)),
        "jax": (in_jax.save_cross_encoder, in_jax.load_cross_encoder(base, settings)),
    }
    for name, (save, reranker) in writers.items():
        tokenizer = PairTokenizer(base)
        save(tmp_path / name, reranker, training={}, tokenizer_save=tokenizer.save, card="card")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "mlx" / file).read_bytes() == (tmp_path / "jax" / file).read_bytes(), file
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "mlx").eval()
    assert type(theirs).__name__ == FAMILIES[family].architecture
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "mlx")
    inputs = tokenizer(QUERIES, PASSAGES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**inputs).logits[:, 0].numpy()
    ours = load_scorer(tmp_path / "mlx").score(QUERIES, PASSAGES)
    np.testing.assert_allclose(ours.portable, expected, atol=TOLERANCE)


@every_family
def test_adapters_cover_the_encoder_and_leave_the_heads_to_learn(family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model")
    model = load_cross_encoder(base, ModelConfig()).model
    plain = model_tensors(model)
    add_lora(model.encoder, 2, 4.0, (), rngs=Mlx().rngs(0))
    parameters = Mlx().named(model.parameters())
    learned = {key for key, value in parameters.items() if trainable(tuple(key.split(".")), value)}
    heads = (*FAMILIES[family].head, "resonance")
    full = {key for key in learned if not key.endswith(("lora_a", "lora_b"))}
    assert all(key.startswith(heads) for key in full) and len(full) >= 8
    assert {key for key in parameters if key.startswith(heads)} == full
    merged = model_tensors(model)
    assert merged.keys() == plain.keys()
    assert all((merged[key] == plain[key]).all() for key in plain)


@every_family
def test_padding_changes_nothing(seed: int, family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed, **tiny_sizes(family, layers=2))
    model = load_bi_encoder(base).encoder
    pad = json.loads((base / "config.json").read_text())["pad_token_id"]
    ids = np.random.default_rng(seed).integers(5, 100, (1, 20))
    alone = model(mx.array(ids), mx.array(np.ones((1, 20), bool)))
    for filling in (pad, 7):
        padded = np.concatenate((ids, np.full((1, 30), filling)), axis=1)
        among = model(mx.array(padded), mx.array(np.arange(50)[None] < 20))[:, :20]
        assert float(mx.max(mx.abs(alone - among))) <= 1e-5


@every_family
def test_in_bfloat16_the_hidden_states_are_nearly_the_same(family: str, seed: int, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed)
    ids = mx.array(np.random.default_rng(seed).integers(5, 100, (2, 16)))
    mask = mx.ones((2, 16), mx.bool_)
    wide = load_bi_encoder(base).encoder(ids, mask)
    narrow = load_bi_encoder(base, dtype=mx.bfloat16).encoder(ids, mask)
    assert narrow.dtype == mx.bfloat16
    assert float(mx.mean(mx.abs(narrow - wide)) / mx.mean(mx.abs(wide))) < 0.05


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert"])
def test_long_texts_agree_with_transformers(family: str, seed: int, tmp_path: Path) -> None:
    sizes = tiny_sizes(family, width=16, heads=2, layers=2) | {"max_position_embeddings": 1024}
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed, **sizes)
    ids = np.random.default_rng(seed).integers(5, 100, (1, 600))
    theirs = transformers.AutoModel.from_pretrained(base).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids))[0].numpy()
    ours = load_bi_encoder(base).encoder(mx.array(ids), mx.ones(ids.shape, mx.bool_))
    error = float(np.abs(np.array(ours) - expected).max())
    print(f"worst error at 600 tokens: {family} {error}")
    assert error <= TOLERANCE


def test_buckets_of_deberta_are_those_of_jax() -> None:
    theirs = backend_of("jax").module("models.deberta")
    for buckets, farthest, tokens in ((256, 512, 600), (32, 128, 150), (-1, 40, 100)):
        sizes = {"position_buckets": buckets, "max_relative_positions": farthest}
        rows = relative_rows(tokens, DebertaV2Config(**sizes))
        np.testing.assert_array_equal(rows, theirs.relative_rows(tokens, theirs.DebertaV2Config(**sizes)))
