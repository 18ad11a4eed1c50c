"""From a checkpoint directory to a model, strictly, and back.

The three starts, and what else is the same in both backends, are in common.reranker.loading.
Twin: jax_impl/loading.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from common import keymap
from common.checkpoint import (
    CONFIG_FILE,
    HEAD_FILE,
    check_keys,
    read_config,
    read_tensors,
    surviving,
)
from common.config import ModelConfig
from common.errors import UserError
from common.reranker.loading import (
    COLD_SPREAD,
    EVEN_COSINE,
    WARM_GAMMA,
    Arrays,
    check_pooling,
    check_unchanged,
    choose_start,
    head_settings,
    head_start,
    is_head,
    is_ours,
    stored_settings,
    write_reranker,
)
from mlx_impl.models.bert import BertConfig, BertCrossEncoder, BertModel
from mlx_impl.models.bi_encoder import BiEncoder
from mlx_impl.models.cross_encoder import CrossEncoder
from mlx_impl.models.deberta import DebertaV2Config, DebertaV2CrossEncoder, DebertaV2Model
from mlx_impl.models.distilbert import DistilBertConfig, DistilBertCrossEncoder, DistilBertModel
from mlx_impl.models.electra import ElectraConfig, ElectraCrossEncoder, ElectraModel
from mlx_impl.models.layers import Rngs
from mlx_impl.models.lora import LoRALinear
from mlx_impl.models.modernbert import ModernBertConfig, ModernBertCrossEncoder, ModernBertModel
from mlx_impl.models.roberta import RobertaConfig, RobertaCrossEncoder, RobertaModel

# model_type -> its config, encoder and cross-encoder; its checkpoints' own names are in common.keymap
MODELS: dict[str, tuple[Any, Any, type[CrossEncoder]]] = {
    "bert": (BertConfig, BertModel, BertCrossEncoder),
    "deberta-v2": (DebertaV2Config, DebertaV2Model, DebertaV2CrossEncoder),
    "distilbert": (DistilBertConfig, DistilBertModel, DistilBertCrossEncoder),
    "electra": (ElectraConfig, ElectraModel, ElectraCrossEncoder),
    "modernbert": (ModernBertConfig, ModernBertModel, ModernBertCrossEncoder),
    "roberta": (RobertaConfig, RobertaModel, RobertaCrossEncoder),
    "xlm-roberta": (RobertaConfig, RobertaModel, RobertaCrossEncoder),
}


@dataclasses.dataclass(frozen=True)
class LoadedReranker:
    """A cross-encoder and where it began; `settings` is the `resonance` part of its config.json."""

    model: CrossEncoder
    config: dict[str, Any]
    settings: dict[str, Any]
    start: str


def load_cross_encoder(
    directory: Path,
    model: ModelConfig,
    *,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    dropout: tuple[float, float] = (0.0, 0.0),
) -> LoadedReranker:
    """A reranker from a base model or from a directory that we wrote (strict both ways).

    `dropout` holds the training rates of hidden states and of attention weights; the checkpoint's own are
    not used. Raises UserError for missing, unexpected or misshaped tensors, all listed.
    """
    directory = surviving(directory)
    config = read_config(directory)
    ours = is_ours(directory, config)
    family = keymap.family_of(config, directory)
    rates = {"hidden_dropout_prob": dropout[0], "attention_probs_dropout_prob": dropout[1]}
    sizes = _encoder_config(config | rates, directory)
    tensors = keymap.with_prefix(family, read_tensors(directory), where=directory)
    start = "resumed" if ours else choose_start(directory, family, tensors, model.start)
    settings = stored_settings(config, directory) if ours else head_settings(directory, sizes, model, start)
    if ours:
        check_unchanged(settings, model, directory)
    rngs = Rngs(seed)
    reranker = _build(directory, config, sizes, settings, dtype, rngs)
    optional, droppable = ((), ()) if ours else (family.new, family.foreign)
    fill(reranker, tensors, directory, optional=optional, droppable=droppable, skip_head=True)
    if ours:
        fill(reranker.resonance, read_tensors(directory / HEAD_FILE), directory / HEAD_FILE)
    else:
        _begin(reranker, head_start(settings, start), rngs)
        settings["start"] = start
    return LoadedReranker(reranker, config, settings, start)


def load_bi_encoder(directory: Path, *, dtype: mx.Dtype = mx.float32) -> BiEncoder:
    """The sentence encoder of a directory: mean pooling and unit length.

    UserError as above, and for a directory whose own pooling is another.
    """
    directory = surviving(directory)
    check_pooling(directory)
    config = read_config(directory)
    family = keymap.family_of(config, directory)
    sizes, (_, encoder, _) = _encoder_config(config, directory), MODELS[config["model_type"]]
    tensors = keymap.with_prefix(family, read_tensors(directory), where=directory)
    model = BiEncoder(encoder(sizes, dtype=dtype, rngs=Rngs(0)))
    droppable = (*family.foreign, *family.new)
    fill(model.encoder, tensors, directory, family.prefix, optional=family.new, droppable=droppable)
    return model


def save_cross_encoder(
    directory: Path,
    loaded: LoadedReranker,
    *,
    training: Mapping[str, Any],
    tokenizer_save: Callable[[Path, int], None],
    card: str,
) -> None:
    """Write a reranker's checkpoint directory, adapters merged; other libraries load its portable score.

    `tokenizer_save` writes the tokenizer into a directory, for passages of the given segment.
    """
    write_reranker(
        directory,
        loaded.config,
        loaded.settings,
        model_tensors(loaded.model),
        training=training,
        tokenizer_save=tokenizer_save,
        card=card,
    )


def model_tensors(model: nn.Module) -> Arrays:
    """Every parameter under its checkpoint key, as stored (linear weights [out, in]), adapters merged."""
    merged = {
        f"{path}.weight": module.merged()
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    return {
        key: np.array(merged.get(key, value))
        for key, value in _parameters(model).items()
        if not key.endswith(("lora_a", "lora_b"))
    }


def _encoder_config(config: Mapping[str, Any], directory: Path) -> Any:
    """The family's own config; UserError for a variant of it that is not computed here."""
    try:
        return MODELS[config["model_type"]][0].from_dict(dict(config))
    except ValueError as error:
        raise UserError(f"{directory / CONFIG_FILE}: {error}") from None


def _build(
    directory: Path,
    config: Mapping[str, Any],
    sizes: Any,
    settings: Mapping[str, Any],
    dtype: mx.Dtype,
    rngs: Rngs,
) -> CrossEncoder:
    build: Any = MODELS[config["model_type"]][2]
    try:
        return build(
            sizes,
            state_size=settings["state_size"],
            parameterisation=settings["parameterisation"],
            head=settings["head"],
            passage_segment=settings["passage_segment"],
            dtype=dtype,
            rngs=rngs,
        )
    except KeyError as error:
        raise UserError(f"{directory / CONFIG_FILE}: its `resonance` part lacks {error}.") from None


def _begin(model: CrossEncoder, start: str, rngs: Rngs) -> None:
    """Set u, gamma and b of a fresh head (DESIGN section 3, three starts)."""
    head = model.resonance
    if start == "sentence_encoder":
        head.gamma = mx.array(WARM_GAMMA)
        head.b = mx.array(-WARM_GAMMA * EVEN_COSINE)
    elif start == "cross_encoder":
        head.u = model.output.weight[0]
        head.b = model.output.bias[0]
    else:
        head.u = COLD_SPREAD * mx.random.normal(head.u.shape, key=rngs.params())


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    """Parameters by path, which is their checkpoint key: MLX stores them as checkpoints do."""
    flat: Any = tree_flatten(model.parameters())
    return dict(sorted(flat))


def fill(
    model: nn.Module,
    tensors: Arrays,
    where: Path,
    prefix: str = "",
    *,
    optional: tuple[str, ...] = (),
    droppable: tuple[str, ...] = (),
    skip_head: bool = False,
) -> None:
    """Put a checkpoint's tensors, each key behind `prefix`, into a model's parameters, in float32.

    Strict as check_keys.
    """
    keyed = {prefix + key: x for key, x in _parameters(model).items() if not (skip_head and is_head(key))}
    expected = {key: tuple(value.shape) for key, value in keyed.items()}
    found = {key: value.shape for key, value in tensors.items()}
    check_keys(expected, found, optional=optional, droppable=droppable, where=where)
    filled = [
        (key.removeprefix(prefix), mx.array(tensors[key].astype(np.float32)))
        for key in keyed
        if key in tensors
    ]
    model.load_weights(filled, strict=False)
