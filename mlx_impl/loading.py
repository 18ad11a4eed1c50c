"""From a checkpoint directory to a model, strictly, and back.

Three starts of a reranker, read off the checkpoint (DESIGN section 3): a sentence encoder begins with its own
resonance, an existing cross-encoder as it was, a plain masked language model from nothing.
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
    read_json,
    read_tensors,
    surviving,
    write_checkpoint,
)
from common.config import ModelConfig
from common.errors import UserError
from common.text import PairTokenizer
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

WARM_GAMMA = 20.0  # the scale that sentence-transformers trains cosines with
EVEN_COSINE = 0.5  # where a pointwise loss sees an even bet at the warm start
COLD_SPREAD = 0.02  # standard deviation of u from nothing, BERT's own initializer_range

Arrays = dict[str, np.ndarray]

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
    ours = (directory / HEAD_FILE).exists()
    family = keymap.family_of(config, directory)
    rates = {"hidden_dropout_prob": dropout[0], "attention_probs_dropout_prob": dropout[1]}
    sizes = _encoder_config(config | rates, directory)
    tensors = keymap.with_prefix(family, read_tensors(directory), where=directory)
    start = "resumed" if ours else choose_start(directory, family, tensors, model.start)
    settings = dict(config.get("resonance", {})) if ours else _settings(directory, sizes, model, start)
    if ours:
        _check_unchanged(settings, model, directory)
    rngs = Rngs(seed)
    reranker = _build(directory, config, sizes, settings, dtype, rngs)
    optional, droppable = ((), ()) if ours else (family.new, family.foreign)
    _fill(reranker, tensors, directory, optional=optional, droppable=droppable, skip_head=True)
    if ours:
        _fill(reranker.resonance, read_tensors(directory / HEAD_FILE), directory / HEAD_FILE)
    else:
        _begin(reranker, start, rngs)
        settings["start"] = start
    return LoadedReranker(reranker, config, settings, start)


def load_bi_encoder(directory: Path, *, dtype: mx.Dtype = mx.float32) -> BiEncoder:
    """The sentence encoder of a directory: mean pooling and unit length.

    UserError as above, and for a directory whose own pooling is another.
    """
    directory = surviving(directory)
    _check_pooling(directory)
    config = read_config(directory)
    family = keymap.family_of(config, directory)
    sizes, (_, encoder, _) = _encoder_config(config, directory), MODELS[config["model_type"]]
    tensors = keymap.with_prefix(family, read_tensors(directory), where=directory)
    model = BiEncoder(encoder(sizes, dtype=dtype, rngs=Rngs(0)))
    droppable = (*family.foreign, *family.new)
    _fill(model.encoder, tensors, directory, family.prefix, optional=family.new, droppable=droppable)
    return model


def _check_pooling(directory: Path) -> None:
    """Refuse what sentence-transformers wrote for another pooling: its vectors would be wrong in silence."""
    file = directory / "1_Pooling" / "config.json"
    modes = read_json(file) if file.exists() else {}
    used = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value is True]
    used += [modes["pooling_mode"]] if "pooling_mode" in modes else []
    if used and used not in (["pooling_mode_mean_tokens"], ["mean"], [["mean"]]):
        raise UserError(
            f"{directory}: pools by {', '.join(map(str, used))}, and encoders here pool by the mean. "
            "Choose one that does; as --model.base it can begin with --model.start masked_lm."
        )


def choose_start(directory: Path, family: keymap.Family, tensors: Arrays, wanted: str = "auto") -> str:
    """Which of the three starts a base gets, unless the recipe names one.

    Raises UserError for a classifier of several labels: a reranker has one.
    """
    *before, output = family.head
    labels = tensors[f"{output}.weight"].shape[0] if f"{output}.weight" in tensors else None
    if labels is not None and labels != 1:
        raise UserError(
            f"{directory}: its classifier has {labels} labels, a reranker has 1. Choose a base encoder, or a "
            "cross-encoder with num_labels 1."
        )
    lacking = [part for part in family.head if f"{part}.weight" not in tensors]
    if lacking and (wanted == "cross_encoder" or (wanted == "auto" and labels == 1)):
        raise UserError(
            f"{directory}: a cross-encoder's score is {output} of {' of '.join(reversed(before))}, but there "
            f"is no {' and no '.join(lacking)} to begin with. Choose another --model.start or --model.base."
        )
    if wanted != "auto":
        return wanted
    if labels == 1:
        return "cross_encoder"
    return "sentence_encoder" if (directory / "modules.json").exists() else "masked_lm"


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
    tensors = model_tensors(loaded.model)
    head = {key.removeprefix("resonance."): value for key, value in tensors.items() if _is_head(key)}
    portable = {key: value for key, value in tensors.items() if not _is_head(key)}
    config = {key: value for key, value in loaded.config.items() if not key.startswith("_")}
    config |= {
        "architectures": [keymap.family_of(config, directory).architecture],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "num_labels": 1,
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
        "resonance": loaded.settings,
    }
    write_checkpoint(
        directory,
        config=config,
        tensors=portable,
        resonance=head,
        training=training,
        tokenizer_save=lambda place: tokenizer_save(place, int(loaded.settings["passage_segment"])),
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


def _settings(directory: Path, sizes: Any, model: ModelConfig, start: str) -> dict[str, Any]:
    last = max(sizes.type_vocab_size - 1, 0)
    segment: int = model.passage_segment or 0
    if segment > last:
        raise UserError(
            f"model.passage_segment is {segment}, but the model in {directory} has no segment above {last}. "
            "Leave the setting out."
        )
    if model.passage_segment is None and start == "cross_encoder":  # which begins as it was
        segment = min(PairTokenizer(directory).own_passage_segment, last)
    return {
        "state_size": model.complex_width or sizes.hidden_size,
        "parameterisation": model.projector,
        "passage_segment": segment,
    }


def _check_unchanged(settings: Mapping[str, Any], model: ModelConfig, directory: Path) -> None:
    """Refuse a recipe that asks of a directory that we wrote another head than it has."""
    default = ModelConfig()
    wanted = {
        "model.complex_width": (model.complex_width, default.complex_width, "state_size"),
        "model.projector": (model.projector, default.projector, "parameterisation"),
        "model.passage_segment": (model.passage_segment, default.passage_segment, "passage_segment"),
    }
    differ = [
        f"{name} is {value!r}, the checkpoint has {settings.get(key)!r}"
        for name, (value, usual, key) in wanted.items()
        if value not in (usual, settings.get(key))
    ]
    if differ:
        raise UserError(f"{directory} was written by a run and keeps its head: {'; '.join(differ)}.")


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


def _is_head(key: str) -> bool:
    return key.startswith("resonance.")


def _fill(
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
    keyed = {prefix + key: x for key, x in _parameters(model).items() if not (skip_head and _is_head(key))}
    expected = {key: tuple(value.shape) for key, value in keyed.items()}
    found = {key: value.shape for key, value in tensors.items()}
    check_keys(expected, found, optional=optional, droppable=droppable, where=where)
    filled = [
        (key.removeprefix(prefix), mx.array(tensors[key].astype(np.float32)))
        for key in keyed
        if key in tensors
    ]
    model.load_weights(filled, strict=False)
