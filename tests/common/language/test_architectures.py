"""Settings of language models: what a config.json becomes, what is refused, how many parameters there are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.language.architectures import (
    DecoderConfig,
    DistillationConfig,
    IndraConfig,
    InfinitoConfig,
    RopeScaling,
    language_config,
    parameter_count,
    tied_tensors,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def test_the_reference_recipe_has_71_million_parameters_and_its_controls_as_many() -> None:
    infinito = InfinitoConfig()
    count = parameter_count(infinito)
    assert 70.5e6 < count < 71.5e6 and not infinito.problems()
    for architecture in ("transformer", "lstm"):
        control = dataclasses.replace(infinito, architecture=architecture)
        assert abs(parameter_count(control) / count - 1) < 1e-3
    assert parameter_count(dataclasses.replace(infinito, memory_slots=0)) < count


def test_old_and_new_spellings_of_rotations_are_read() -> None:
    old = DecoderConfig.from_dict(LLAMA | {"rope_theta": 5e5, "num_key_value_heads": None})
    new = DecoderConfig.from_dict(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert old == new and old.rope_theta == 5e5 and old.key_value_heads == 4 and not old.tie_word_embeddings
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    stretched = DecoderConfig.from_dict(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert stretched.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    fast, *_, slow = np.array(stretched.inverse_frequencies()) / np.array(old.inverse_frequencies())
    assert fast == 1.0 and slow == pytest.approx(1 / 8)


def test_qwen3_without_a_head_width_has_128() -> None:
    assert DecoderConfig.from_dict(LLAMA | {"model_type": "qwen3"}).head_width == 128
    assert DecoderConfig.from_dict(LLAMA).head_width == 8


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig(family="qwen3", num_key_value_heads=2, attention_bias=True),
        DecoderConfig(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), head_dim=16),
        IndraConfig(complex_width=64),
        InfinitoConfig(architecture="lstm", memory_layer=3),
    ],
)
def test_settings_survive_their_config_json(config: Any) -> None:
    read = language_config(config.to_dict(), "here")
    if isinstance(config, DecoderConfig):  # a config.json says what was left to be derived
        heads = {"num_key_value_heads": config.key_value_heads, "head_dim": config.head_width}
        config = dataclasses.replace(config, **heads)
    assert read == config


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; language models: llama, qwen3, indra, infinito"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is computed here"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types has \['sliding_attention'\]",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling lacks low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; allowed: a divisor of 4 heads"),
        ({"vocab_size": None}, "it lacks vocab_size"),
        (
            {"model_type": "infinito", "memory_writes": 999},
            "memory_writes is 999; allowed",
        ),
        ({"model_type": "indra", "context": 0}, "context is 0; allowed: >= 1"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        language_config(LLAMA | changed, "config.json")


def test_rates_and_weights_out_of_range_are_named() -> None:
    assert DecoderConfig(hidden_dropout=1.0).problems("model.") == [
        "model.hidden_dropout is 1.0; allowed: [0, 0.95]"
    ]
    assert InfinitoConfig(memory_decay=0.0, memory_layer=8).problems() == [
        "memory_layer is 8; allowed: [0, 7]",
        "memory_decay is 0.0; allowed: (0, 1]",
    ]
    assert DistillationConfig(temperature=0.0, end_weight=-1.0).problems() == [
        "end_weight is -1.0; allowed: >= 0",
        "temperature is 0.0; allowed: > 0",
    ]


def test_the_weight_of_distillation_rises_linearly() -> None:
    weight = DistillationConfig(start_weight=0.01, end_weight=0.05).weight
    assert [weight(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.01, 0.03, 0.05])


def test_a_tied_head_may_be_there_but_not_another_one() -> None:
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    tied, rows = DecoderConfig(tie_word_embeddings=True), np.ones((3, 2))
    assert list(tied_tensors(tied, {table: rows, head: rows.copy()}, "here")) == [table]
    with pytest.raises(UserError, match=r"lm_head\.weight differs from embed_tokens\.weight, but tie_word"):
        tied_tensors(tied, {table: rows, head: rows + 1}, "here")
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    assert set(tied_tensors(untied, {table: rows, head: rows + 1}, "here")) == {table, head}
