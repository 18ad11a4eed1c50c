"""Checkpoints of tiny random language models with a tokenizer, and their exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from common.checkpoint import write_directory
from common.export.verification import Exported, Precision
from common.language.architectures import (
    DecoderConfig,
    IndraConfig,
    InfinitoConfig,
    LanguageModelConfig,
    RopeScaling,
)
from common.language.text import LanguageTokenizer, train_bpe
from jax_impl.export.onnx_language import export_language_model
from jax_impl.language import build_language_model, save_language_model
from tests.tiny_language import NAMES, THINGS

CONTEXT = 12
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 40}
_MEMORY: dict[str, Any] = {**SIZES, "context": CONTEXT, "memory_slots": 9, "memory_writes": 5}
MODELS: dict[str, LanguageModelConfig] = {
    "llama": DecoderConfig(
        **_DECODER,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16),
    ),
    "qwen3": DecoderConfig("qwen3", **_DECODER, head_dim=6, rms_norm_eps=1e-3),
    "indra": IndraConfig(**SIZES, context=40, complex_width=12),
    "indra_cartesian": IndraConfig(
        **SIZES, context=40, complex_width=12, projector="cartesian", tie_word_embeddings=False
    ),
    "indra_none": IndraConfig(**SIZES, context=40, projector="none"),
    "infinito": InfinitoConfig(**_MEMORY),
    "infinito_first": InfinitoConfig(**_MEMORY, memory_layer=0, memory_decay=0.5, tie_word_embeddings=False),
    "transformer": InfinitoConfig(**_MEMORY, architecture="transformer"),
}


def checkpoint(folder: Path, config: LanguageModelConfig, seed: int, data: str = "nowhere.txt") -> Path:
    """A directory of a model whose every parameter was moved at random, said to be trained on `data`."""
    import dataclasses

    texts = [f"{name} has the {thing}. " for name in NAMES for thing in THINGS]
    tokenizer = LanguageTokenizer(train_bpe(texts, 300), name="tiny")
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    model = build_language_model(config, seed=seed % 2**31)
    rng = np.random.default_rng(seed)
    graph, weights = nnx.split(model)
    moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), weights)
    save_language_model(
        folder,
        nnx.merge(graph, moved),
        config,
        training={"config": {"data": {"name": data}}},
        tokenizer_save=tokenizer.save,
        card="",
    )
    return folder


def written(folder: Path, exported: Exported) -> Path:
    """An export in its folder, not verified."""

    def fill(place: Path) -> None:
        (place / "model.onnx").write_bytes(exported.model)
        (place / "config.json").write_text(json.dumps(exported.config))
        exported.tokenizer_save(place)
        (place / "export.json").write_text("{}")

    write_directory(folder, fill)
    return folder


def export(source: Path, folder: Path, precision: Precision = "fp32") -> Path:
    return written(folder, export_language_model(source, precision))
