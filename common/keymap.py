"""The one table between checkpoint keys and attribute paths, and each family's own names.

A path is a tuple of attribute names and list indices, ("encoder", "layer", 0, "output", "dense", "kernel").
It equals the Hugging Face key except in its last name, which follows RULES.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from common.errors import UserError, listed

ParamPath = tuple[str | int, ...]
Transform = Literal["transpose", "identity"]

# A module's name -> what its `weight` is called in the model, and how the stored array becomes the model's.
RULES: tuple[tuple[str, str, Transform], ...] = (
    (r"\w+_embeddings|embed_tokens", "embedding", "identity"),
    (r"\w*LayerNorm|\w*layernorm|(\w+_)?norm", "scale", "identity"),
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
    """What the checkpoints of one `model_type` call their parts; heads as transformers names them."""

    architecture: str  # transformers' class of the encoder with its portable head
    prefix: str  # before encoder keys when the checkpoint carries a head; absent in a bare encoder
    encoder: tuple[str, ...]  # the first names of a bare encoder's keys
    head: tuple[str, ...]  # modules of the portable head, which a base may lack; the last one gives the score
    foreign: tuple[str, ...]  # regex: other heads and buffers, which may be dropped when a base is loaded

    @property
    def new(self) -> tuple[str, ...]:
        """Regex of the tensors that a base may lack; a wrong shape is never forgiven."""
        return tuple(re.escape(module) + r"\..*" for module in self.head)


_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_ROBERTA = Family(
    architecture="RobertaForSequenceClassification",
    prefix="roberta.",
    encoder=("embeddings", "encoder", "pooler"),
    head=("classifier.dense", "classifier.out_proj"),
    foreign=(r"lm_head\..*", r"roberta\.pooler\..*", r"roberta\.embeddings\.position_ids"),
)

FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        architecture="BertForSequenceClassification",
        prefix="bert.",
        encoder=("embeddings", "encoder", "pooler"),
        head=("bert.pooler.dense", "classifier"),
        foreign=(r"cls\..*", r"bert\.embeddings\.position_ids"),
    ),
    "deberta-v2": Family(
        architecture="DebertaV2ForSequenceClassification",
        prefix="deberta.",
        encoder=("embeddings", "encoder"),
        head=("pooler.dense", "classifier"),
        foreign=(
            r"cls\..*",
            r"(lm|mask)_predictions\..*",
            r"deberta\.embeddings\.position_(ids|embeddings\.weight)",
        ),
    ),
    "distilbert": Family(
        architecture="DistilBertForSequenceClassification",
        prefix="distilbert.",
        encoder=("embeddings", "transformer"),
        head=("pre_classifier", "classifier"),
        foreign=(r"vocab_(transform|layer_norm|projector)\..*", r"distilbert\.embeddings\.position_ids"),
    ),
    "electra": Family(
        architecture="ElectraForSequenceClassification",
        prefix="electra.",
        encoder=("embeddings", "embeddings_project", "encoder"),
        head=("classifier.dense", "classifier.out_proj"),
        foreign=(
            r"(discriminator|generator)_predictions\..*",
            r"generator_lm_head\..*",
            r"electra\.embeddings\.position_ids",
        ),
    ),
    "modernbert": Family(
        architecture="ModernBertForSequenceClassification",
        prefix="model.",
        encoder=("embeddings", "layers", "final_norm"),
        head=("head.dense", "head.norm", "classifier"),
        foreign=(r"decoder\..*",),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, architecture="XLMRobertaForSequenceClassification"),
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


def with_prefix(family: Family, tensors: Mapping[str, np.ndarray], *, where: object) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under the keys of `family.architecture`: a bare encoder's get their prefix.

    Raises UserError for two keys that mean the same tensor.
    """
    renamed: dict[str, np.ndarray] = {}
    twice: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(family.prefix)
        for pattern, replacement in _OLD_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.split(".")[0] in family.encoder:
            name = family.prefix + name
        if name in renamed:
            twice.append(f"{key} (as {name})")
        renamed[name] = tensor
    if twice:
        raise UserError(f"{where}: tensors that are there twice under different names:\n{listed(twice)}")
    return renamed
