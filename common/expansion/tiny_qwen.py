"""A tiny Qwen3 of random weights, so that the query expansion runs from end to end without a hub.

The tokenizer is a byte-level BPE trained on the given texts, with Qwen3's normalizer, splitting rule, special
tokens and chat template (qwen3_chat_template.jinja: Qwen/Qwen3-1.7B, Apache-2.0, copied verbatim).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import to_json, write_checkpoint
from common.data.expansion import MARKER, ExpansionData, render_lines
from common.expansion.prompts import CONSUMER_SYSTEM, NO_THINK

CHAT_TEMPLATE = Path(__file__).with_name("qwen3_chat_template.jinja")
VOCABULARY = 1792  # with the special tokens; padded to this when the texts have fewer
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen3's added tokens, in its order; True: special, so that decoding leaves them out
ADDED = {
    END_OF_TEXT: True,
    START: True,
    END: True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # as in Qwen3, not hidden_size / heads
    "tie_word_embeddings": True,
}
EMBEDDING_SPREAD = 0.1  # a tied random head of spread 0.02 cannot make a sharp distribution


def tiny_base(
    directory: Path, data: ExpansionData, seed: int, sizes: Mapping[str, Any] | None = None
) -> Path:
    """The tiny random base, made from the training rows; the one that is there is kept."""
    if not directory.exists():
        texts = [f"{row.query}\n{render_lines(row.lines)}" for row in data.train]
        asked = f"system\n{CONSUMER_SYSTEM}\nuser\n{NO_THINK}{MARKER} "  # in each row: few tokens
        write_tiny_qwen(directory, [*texts, *[asked] * len(texts)], seed=seed, sizes=sizes)
    return directory


def write_tiny_qwen(
    directory: Path, texts: Iterable[str], *, seed: int = 0, sizes: Mapping[str, Any] | None = None
) -> None:
    """Write a Hugging Face checkpoint directory of a random Qwen3, its tokenizer trained on `texts`.

    `sizes` overrides SIZES and `vocab_size`. The same texts and seed give the same files.
    """
    config = tiny_config({"vocab_size": VOCABULARY, **SIZES, **(sizes or {})})
    tokenizer = _train_tokenizer(texts, config["vocab_size"])

    def save_tokenizer(folder: Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_bytes(to_json(_tokenizer_config(tokenizer)))

    ends = {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(END_OF_TEXT)}
    write_checkpoint(
        directory,
        config=config | ends,
        tensors=_weights(config, seed),
        resonance=None,
        training={"made": "tiny", "seed": seed},
        tokenizer_save=save_tokenizer,
        card="# A tiny random Qwen3\n\nMade for `--base tiny` of the query expansion, to be trained.\n",
    )


def tiny_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen3 with these sizes."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "float32",
        **sizes,
    }


def _train_tokenizer(texts: Iterable[str], size: int) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in ADDED.items()]
    )
    return tokenizer


def _tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {
                "content": text,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": special,
            }
            for text, special in ADDED.items()
        },
        "chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8"),
    }


def _weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    width, inner, head = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(outputs: int, inputs: int, spread: float | None = None) -> np.ndarray:
        spread = inputs**-0.5 if spread is None else spread
        return (spread * generator.standard_normal((outputs, inputs))).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], width, EMBEDDING_SPREAD)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, outputs, inputs in (
            ("self_attn.q_proj", queries, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, queries),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            tensors[f"{at}.{name}.weight"] = matrix(outputs, inputs)
        for name, size in (
            ("input_layernorm", width),
            ("post_attention_layernorm", width),
            ("self_attn.q_norm", head),
            ("self_attn.k_norm", head),
        ):
            tensors[f"{at}.{name}.weight"] = np.ones(size, np.float32)
    tensors["model.norm.weight"] = np.ones(width, np.float32)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], width, EMBEDDING_SPREAD)
    return tensors
