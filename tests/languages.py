"""Tiny random language models: settings, a Llama or Qwen3 checkpoint, and the weights of twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.reference.cases import float32_exact


def random_decoder(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """Numbers of a config.json: heads that share keys, tied or not, norms and rotations far from defaults."""
    groups, width = int(rng.integers(1, 3)), 2 * int(rng.integers(2, 5))
    heads = groups * int(rng.integers(1, 4))
    return {
        "vocab_size": int(rng.integers(20, 60)),
        "hidden_size": heads * 2 * int(rng.integers(2, 5)),
        "intermediate_size": int(rng.integers(8, 40)),
        "num_hidden_layers": int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "max_position_embeddings": 64,
        "rms_norm_eps": float(10 ** rng.uniform(-3.5, -1.5)),
        "rope_theta": float(10 ** rng.uniform(1, 5)),
        "attention_bias": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
    }


def transformers_decoder(family: str, settings: dict[str, Any], seed: int) -> Any:
    """transformers' model of these settings in float64, its parameters random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config, model = kinds[family]
    settings = dict(settings)
    theta = settings.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta} | settings.pop("rope_scaling", {})
    torch.manual_seed(seed % 2**32)
    made = model(config(**settings, rope_parameters=rope, initializer_range=0.3)).double().eval()
    for parameter in made.parameters():  # norms start at 1, biases at 0
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    for parameter in made.parameters():
        parameter.data = parameter.data.float().double()
    return made


def write_transformers(directory: Path, model: Any) -> Path:
    """A checkpoint directory of a model of transformers, in float32."""
    import copy

    copy.deepcopy(model).float().save_pretrained(directory)
    return directory


def random_tokens(
    rng: np.random.Generator, vocabulary: int, rows: int = 3, tokens: int = 11
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, S], and segments [N, S]: one text, two texts, and a text with padding after it."""
    ids = rng.integers(0, vocabulary, (rows, tokens)).astype(np.int32)
    segments = np.ones((rows, tokens), np.int32)
    segments[1, tokens // 2 :] = 2
    segments[2, tokens - 3 :] = 0
    return ids, segments


def randomise(backends: Any, models: list[Any], seed: int, spread: float = 0.2) -> None:
    """Move every parameter of the first model, and give all the same."""
    rng = np.random.default_rng(seed)
    start = sorted(backends[0].parameters(models[0]).items())
    moved = {name: float32_exact(value + rng.normal(0, spread, value.shape)) for name, value in start}
    for backend, model in zip(backends, models, strict=True):
        assert backend.parameters(model).keys() == moved.keys()
        backend.set_parameters(model, moved)
