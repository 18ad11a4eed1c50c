"""The one table between checkpoint keys and attribute paths, and each family's own names.

A path is a tuple of attribute names and list indices, ("encoder", "layer", 0, "output", "dense", "kernel").
It equals the Hugging Face key except in its last name, which follows RULES.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.errors import UserError, listed

ParamPath = tuple[str | int, ...]
Transform = Literal["transpose", "identity"]

# A module's name -> what its `weight` is called in the model, and how the stored array becomes the model's.
RULES: tuple[tuple[str, str, Transform], ...] = (
    (r"\w+_embeddings", "embedding", "identity"),
    (r"\w*LayerNorm|\w*_norm", "scale", "identity"),
    (r"\w+", "kernel", "transpose"),  # every other weight belongs to a linear layer, stored [out, in]
)


def from_checkpoint(key: str) -> tuple[ParamPath, Transform]:
    """The attribute path of a checkpoint key and the transform of its array."""
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
    if parts[-1] != "weight" or len(parts) < 2:
        return tuple(parts), "identity"
    module = str(parts[-2])
    name, transform = next((name, how) for pattern, name, how in RULES if re.fullmatch(pattern, module))
    return (*parts[:-1], name), transform


def to_checkpoint(path: ParamPath) -> tuple[str, Transform]:
    """The checkpoint key of an attribute path and the transform of its array (each is its own inverse)."""
    for _, name, transform in RULES:
        if path[-1] == name:
            return ".".join(map(str, (*path[:-1], "weight"))), transform
    return ".".join(map(str, path)), "identity"


def apply(transform: Transform, array: np.ndarray) -> np.ndarray:
    """Carry an array across the table, in either direction."""
    return array.T if transform == "transpose" else array


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one `model_type` name the tensors and settings of a BERT encoder."""

    prefix: str  # before encoder keys when the checkpoint carries a head; absent in a bare encoder
    keys: tuple[tuple[str, str], ...]  # regex -> BERT's name
    foreign: tuple[str, ...]  # heads and buffers that may be dropped when a base is loaded
    new: tuple[str, ...]  # tensors that a base may lack; a wrong shape is never forgiven
    config: Mapping[str, str]  # this family's setting -> BERT's name


_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# After `as_bert` every family is read as BERT, so these cover all of them: masked-LM heads and a buffer.
_FOREIGN = (
    r"cls\..*",
    r"vocab_(transform|layer_norm|projector)\..*",
    r"(bert\.)?embeddings\.position_ids",
)
_NEW = (r"(bert\.)?pooler\..*", r"classifier\..*")

FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        prefix="bert.",
        keys=_OLD_NAMES,
        foreign=_FOREIGN,
        new=_NEW,
        config={},
    ),
    "distilbert": Family(
        prefix="distilbert.",
        keys=(
            *_OLD_NAMES,
            (r"^transformer\.", "encoder."),
            (r"\.attention\.q_lin\.", ".attention.self.query."),
            (r"\.attention\.k_lin\.", ".attention.self.key."),
            (r"\.attention\.v_lin\.", ".attention.self.value."),
            (r"\.attention\.out_lin\.", ".attention.output.dense."),
            (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
            (r"\.ffn\.lin1\.", ".intermediate.dense."),
            (r"\.ffn\.lin2\.", ".output.dense."),
            (r"\.output_layer_norm\.", ".output.LayerNorm."),
        ),
        foreign=_FOREIGN,
        new=_NEW,
        config={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
        },
    ),
}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family a checkpoint's config names; UserError when there is no table for it."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type is {model_type!r}; encoders of type {', '.join(FAMILIES)} can be loaded. "
            "Choose a base model of one of these."
        )
    return FAMILIES[model_type]


def as_bert(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, prefix: str = "bert.", where: object
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A checkpoint's config and tensors under BERT's names, encoder keys behind `prefix`.

    DistilBERT is BERT without segments and pooler, so its segment embeddings become zeros: the same function.
    Raises UserError for an unknown family and for two keys that mean the same tensor.
    """
    family = family_of(config, where)
    renamed: dict[str, np.ndarray] = {}
    twice: list[str] = []
    for key, tensor in tensors.items():
        name = _bert_key(key, family, prefix)
        if name in renamed:
            twice.append(f"{key} (as {name})")
        renamed[name] = tensor
    if twice:
        raise UserError(f"{where}: tensors that are there twice under different names:\n{listed(twice)}")
    if config["model_type"] == "bert":
        return dict(config), renamed
    settings = {family.config.get(key, key): value for key, value in config.items()}
    settings |= {"model_type": "bert", "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    words = renamed.get(f"{prefix}embeddings.word_embeddings.weight")
    if words is not None:
        zeros = np.zeros((2, words.shape[1]), words.dtype)  # [segments, D]
        renamed.setdefault(f"{prefix}embeddings.token_type_embeddings.weight", zeros)
    return settings, renamed


def _bert_key(key: str, family: Family, prefix: str) -> str:
    """One checkpoint key under BERT's name; heads outside the encoder keep theirs."""
    name = key.removeprefix(family.prefix)
    for pattern, replacement in family.keys:
        name = re.sub(pattern, replacement, name)
    in_encoder = name.split(".")[0] in ("embeddings", "encoder", "pooler")
    return prefix + name if in_encoder else name
