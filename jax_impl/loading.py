"""From a checkpoint directory to a model, strictly, and back.

The three starts, and what else is the same in both backends, are in common.reranker.loading.
Twin: mlx_impl/loading.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

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
from jax_impl.models.bert import BertConfig, BertCrossEncoder, BertModel
from jax_impl.models.bi_encoder import BiEncoder
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.deberta import DebertaV2Config, DebertaV2CrossEncoder, DebertaV2Model
from jax_impl.models.distilbert import DistilBertConfig, DistilBertCrossEncoder, DistilBertModel
from jax_impl.models.electra import ElectraConfig, ElectraCrossEncoder, ElectraModel
from jax_impl.models.lora import LoRALinear
from jax_impl.models.modernbert import ModernBertConfig, ModernBertCrossEncoder, ModernBertModel
from jax_impl.models.roberta import RobertaConfig, RobertaCrossEncoder, RobertaModel

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
    dtype: DTypeLike = jnp.float32,
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
    rngs = nnx.Rngs(seed)
    reranker = _build(directory, config, sizes, settings, dtype, rngs)
    optional, droppable = ((), ()) if ours else (family.new, family.foreign)
    fill(reranker, tensors, directory, optional=optional, droppable=droppable, skip_head=True)
    if ours:
        fill(reranker.resonance, read_tensors(directory / HEAD_FILE), directory / HEAD_FILE)
    else:
        _begin(reranker, head_start(settings, start), rngs)
        settings["start"] = start
    return LoadedReranker(reranker, config, settings, start)


def load_bi_encoder(directory: Path, *, dtype: DTypeLike = jnp.float32) -> BiEncoder:
    """The sentence encoder of a directory: mean pooling and unit length.

    UserError as above, and for a directory whose own pooling is another.
    """
    directory = surviving(directory)
    check_pooling(directory)
    config = read_config(directory)
    family = keymap.family_of(config, directory)
    sizes, (_, encoder, _) = _encoder_config(config, directory), MODELS[config["model_type"]]
    tensors = keymap.with_prefix(family, read_tensors(directory), where=directory)
    model = BiEncoder(encoder(sizes, dtype=dtype, rngs=nnx.Rngs(0)))
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


def model_tensors(model: nnx.Module) -> Arrays:
    """Every parameter under its checkpoint key, as stored (linear weights [out, in]), adapters merged."""
    merged = {
        tuple(path): np.asarray(module.merged())
        for path, module in nnx.iter_modules(model)
        if isinstance(module, LoRALinear)
    }
    tensors = {}
    for path, variable in _parameters(model):
        if isinstance(variable, nnx.LoRAParam):
            continue
        key, transform = keymap.to_checkpoint(path)
        value = merged.get(path[:-1]) if path[-1] == "kernel" else None
        value = np.asarray(variable[...]) if value is None else value
        tensors[key] = keymap.apply(transform, value)
    return tensors


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
    dtype: DTypeLike,
    rngs: nnx.Rngs,
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


def _begin(model: CrossEncoder, start: str, rngs: nnx.Rngs) -> None:
    """Set u, gamma and b of a fresh head (DESIGN section 3, three starts)."""
    head = model.resonance
    if start == "sentence_encoder":
        head.gamma[...] = jnp.asarray(WARM_GAMMA)
        head.b[...] = jnp.asarray(-WARM_GAMMA * EVEN_COSINE)
    elif start == "cross_encoder":
        head.u[...] = model.output.kernel[...][:, 0]
        assert model.output.bias is not None
        head.b[...] = model.output.bias[...][0]
    else:
        head.u[...] = COLD_SPREAD * jnp.asarray(rngs.params.normal(head.u[...].shape))


def _parameters(model: nnx.Module) -> list[tuple[keymap.ParamPath, nnx.Variable]]:
    return [
        (tuple(map(_name, path)), variable)
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    ]


def _name(part: object) -> str | int:
    return part if isinstance(part, int) else str(part)


def fill(
    model: nnx.Module,
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
    keyed = {}
    for path, variable in _parameters(model):
        key, transform = keymap.to_checkpoint(path)
        if not (skip_head and is_head(key)):
            keyed[prefix + key] = (variable, transform)
    expected = {
        key: keymap.apply(how, np.asarray(variable[...])).shape for key, (variable, how) in keyed.items()
    }
    found = {key: value.shape for key, value in tensors.items()}
    check_keys(expected, found, optional=optional, droppable=droppable, where=where)
    for key, (variable, transform) in keyed.items():
        if key in tensors:
            variable[...] = jnp.asarray(keymap.apply(transform, tensors[key]), jnp.float32)
