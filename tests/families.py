"""Tiny random checkpoints of every encoder family, written by transformers itself (needs torch).

Weights are N(0, 0.2), norms near 1; the words are those of tests/tiny.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.tiny import SPECIAL, VOCABULARY

WORDS = VOCABULARY[len(SPECIAL) :]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
DEBERTA_TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
MODERNBERT_TOKENS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]

# model_type -> what its transformers classes begin with
CLASSES = {
    "bert": "Bert",
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "modernbert": "ModernBert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
# the other classes of transformers that write checkpoints of a family
OTHER_HEADS = {
    "bert": ["Model", "ForMaskedLM", "ForPreTraining"],
    "deberta-v2": ["Model", "ForMaskedLM"],
    "distilbert": ["Model", "ForMaskedLM"],
    "electra": ["Model", "ForMaskedLM", "ForPreTraining"],
    "modernbert": ["Model", "ForMaskedLM"],
    "roberta": ["Model", "ForMaskedLM"],
    "xlm-roberta": ["Model", "ForMaskedLM"],
}


# what can be drawn beside the sizes: family -> setting -> values
VARIANTS: dict[str, dict[str, list[Any]]] = {
    "bert": {"hidden_act": ["gelu", "gelu_new", "relu"], "layer_norm_eps": [1e-12, 1e-5]},
    "deberta-v2": {
        "pos_att_type": [["c2p", "p2c"], ["p2c"], ["c2p"], "c2p|p2c", []],
        "share_att_key": [True, False],
        "norm_rel_ebd": ["layer_norm", "none"],
        "position_buckets": [12, 16, -1],
        "max_relative_positions": [-1, 40],
        "type_vocab_size": [0, 2],
        "pooler_hidden_act": ["gelu", "relu"],
    },
    "distilbert": {"activation": ["gelu", "relu"], "sinusoidal_pos_embds": [False, True]},
    "electra": {"hidden_act": ["gelu", "gelu_new"], "layer_norm_eps": [1e-12, 1e-5]},
    "modernbert": {
        "hidden_activation": ["gelu", "relu"],
        "norm_bias": [False, True],
        "attention_bias": [False, True],
        "mlp_bias": [False, True],
        "classifier_bias": [False, True],
        "classifier_activation": ["gelu", "relu"],
        "classifier_pooling": ["cls", "mean"],
        "local_attention": [4, 9, 128],
        "global_attn_every_n_layers": [1, 2, 3],
        "global_rope_theta": [160_000.0, 500.0],
        "local_rope_theta": [10_000.0, 100.0],
    },
    "roberta": {"hidden_act": ["gelu", "relu"], "layer_norm_eps": [1e-12, 1e-5]},
    "xlm-roberta": {"hidden_act": ["gelu", "relu"], "layer_norm_eps": [1e-12, 1e-5]},
}
# settings of variants that are refused: family, setting, value, what the message allows
UNSUPPORTED = [
    ("bert", "position_embedding_type", "relative_key", "'absolute'"),
    ("roberta", "position_embedding_type", "relative_key_query", "'absolute'"),
    ("electra", "is_decoder", True, "False"),
    ("distilbert", "activation", "swish9", "gelu"),
    ("deberta-v2", "conv_kernel_size", 3, "0"),
    ("deberta-v2", "relative_attention", False, "True"),
    ("deberta-v2", "position_biased_input", True, "False"),
    ("deberta-v2", "embedding_size", 16, "32"),
    ("deberta-v2", "attention_head_size", 64, "8"),
    ("deberta-v2", "pos_att_type", ["c2p", "p2p"], "c2p and p2c"),
    ("deberta-v2", "norm_rel_ebd", "batch_norm", "'layer_norm' or 'none'"),
    ("modernbert", "layer_types", ["linear_attention"], "'full_attention' or 'sliding_attention'"),
    ("modernbert", "rope_parameters", {"full_attention": {"rope_type": "yarn"}}, "'default'"),
    ("modernbert", "classifier_pooling", "max", "'cls' or 'mean'"),
]


def write_checkpoint(
    directory: Path, family: str, head: str = "ForSequenceClassification", *, seed: int = 0, **settings: Any
) -> Path:
    """A directory of `family` with a tokenizer, as transformers saves it; `settings` are its config's."""
    import torch
    import transformers

    directory.mkdir(parents=True)
    tokens, pad = TOKENIZERS[family](directory)
    name = CLASSES[family]
    sizes = tiny_sizes(family) | {"vocab_size": tokens, "pad_token_id": pad, "num_labels": 1} | settings
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**sizes))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            drawn = torch.tensor(rng.normal(0, 0.2, value.shape), dtype=value.dtype)
            value.copy_(drawn + 1 if "norm" in key.lower() and key.endswith("weight") else drawn)
    model.save_pretrained(directory)
    return directory


def tiny_sizes(
    family: str, *, width: int = 32, heads: int = 4, layers: int = 1, inner: int = 48
) -> dict[str, Any]:
    """The sizes of an encoder under the names of its family's config."""
    if family == "distilbert":
        return {
            "dim": width,
            "n_heads": heads,
            "n_layers": layers,
            "hidden_dim": inner,
            "max_position_embeddings": 72,
        }
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": 72,
    }
    if family == "deberta-v2":  # as v3: buckets up to 6, beyond them logarithmic
        sizes |= {
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 12,
        }
    if family == "electra":
        sizes["embedding_size"] = width // 2
    if family == "modernbert":  # every second layer reads 5 tokens on either side
        sizes |= {"local_attention": 10, "global_attn_every_n_layers": 2}
    if family in ("roberta", "xlm-roberta"):
        sizes |= {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return sizes


def random_settings(family: str, rng: np.random.Generator) -> dict[str, Any]:
    heads, per_head = int(rng.integers(1, 5)), 2 * int(rng.integers(2, 7))
    settings = tiny_sizes(
        family,
        width=heads * per_head,
        heads=heads,
        layers=int(rng.integers(1, 4)),
        inner=int(rng.integers(8, 80)),
    )
    return settings | {name: values[rng.integers(len(values))] for name, values in VARIANTS[family].items()}


def random_pairs(family: str, config: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, S] and sides [N, S] of pairs of random lengths, the longest unpadded."""
    rows, length = int(rng.integers(2, 6)), int(rng.integers(4, 70))
    lengths = np.append(rng.integers(2, length + 1, rows - 1), length)[:, None]
    place = np.arange(length)
    sides = np.where(place < lengths, np.where(place < rng.integers(1, lengths), 1, 2), 0)
    ids = rng.integers(0, config.vocab_size, (rows, length))
    return np.where(sides > 0, ids, config.pad_token_id), sides


def wordpiece(directory: Path) -> tuple[int, int]:
    """BERT's: a vocab.txt."""
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return len(VOCABULARY), 0


def byte_pairs(directory: Path) -> tuple[int, int]:
    """RoBERTa's: byte-level BPE, two separators between the texts."""
    tokenizer = _byte_level(ROBERTA_TOKENS)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return _save(tokenizer, directory, "<pad>")


def byte_pairs_of_modernbert(directory: Path) -> tuple[int, int]:
    """ModernBERT's: byte-level BPE with BERT's template, the padding token not first."""
    tokenizer = _byte_level(MODERNBERT_TOKENS)
    _template(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ("[CLS]", "[SEP]"))
    return _save(tokenizer, directory, "[PAD]")


def unigram(directory: Path) -> tuple[int, int]:
    """XLM-R's: a unigram model over words that begin with a space, two separators between the texts."""
    tokenizer = _unigram(ROBERTA_TOKENS)
    _template(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>", ("<s>", "</s>"))
    return _save(tokenizer, directory, "<pad>")


def unigram_of_deberta(directory: Path) -> tuple[int, int]:
    """DeBERTa-v3's: a unigram model with BERT's template, segments 0 and 1."""
    tokenizer = _unigram(DEBERTA_TOKENS)
    _template(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]"))
    return _save(tokenizer, directory, "[PAD]")


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return tokenizer


def _unigram(special: list[str]) -> Tokenizer:
    letters = sorted({letter for word in WORDS for letter in word} | {"▁"})
    pieces = [(token, 0.0) for token in special] + [(letter, -9.0) for letter in letters]
    pieces += [(f"▁{word}", -5.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _template(tokenizer: Tokenizer, single: str, pair: str, special: tuple[str, str]) -> None:
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _save(tokenizer: Tokenizer, directory: Path, pad: str) -> tuple[int, int]:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size(), tokenizer.token_to_id(pad)


# writes the tokenizer into a directory; returns the size of its vocabulary and the padding token's id
TOKENIZERS: dict[str, Callable[[Path], tuple[int, int]]] = {
    "bert": wordpiece,
    "deberta-v2": unigram_of_deberta,
    "distilbert": wordpiece,
    "electra": wordpiece,
    "modernbert": byte_pairs_of_modernbert,
    "roberta": byte_pairs,
    "xlm-roberta": unigram,
}
