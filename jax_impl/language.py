"""Language models: built from settings, loaded from a checkpoint directory, strictly, and written.

Settings are common.language.architectures's; Llama and Qwen3 directories are those of the hub.
Twin: mlx_impl/language.py.
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

from common.checkpoint import CONFIG_FILE, read_config, read_tensors, surviving, write_checkpoint
from common.language.architectures import (
    DROPPABLE,
    DecoderConfig,
    IndraConfig,
    LanguageModelConfig,
    language_config,
    tied_tensors,
)
from jax_impl.loading import fill, model_tensors
from jax_impl.models.decoder import Decoder, LanguageModel
from jax_impl.models.indra import Indra
from jax_impl.models.infinito import Infinito
from jax_impl.models.lstm import LSTM


def build_language_model(
    config: LanguageModelConfig, *, dtype: DTypeLike = jnp.float32, seed: int = 0
) -> LanguageModel:
    """A fresh model; `dtype` is of the computation, parameters stay float32."""
    rngs = nnx.Rngs(seed)
    if isinstance(config, DecoderConfig):
        return Decoder(config, dtype=dtype, rngs=rngs)
    if isinstance(config, IndraConfig):
        return Indra(config, dtype=dtype, rngs=rngs)
    kind = LSTM if config.architecture == "lstm" else Infinito
    return kind(config, dtype=dtype, rngs=rngs)


def load_language_model(
    directory: Path, *, dtype: DTypeLike = jnp.float32, **rates: Any
) -> tuple[LanguageModel, LanguageModelConfig]:
    """The model of a directory and its settings, changed by `rates` of dropout (`hidden_dropout`, ...).

    Raises UserError for missing, unexpected or misshaped tensors, all listed, and for another kind of model.
    """
    directory = surviving(directory)
    config = language_config(read_config(directory), directory / CONFIG_FILE)
    config = dataclasses.replace(config, **rates)
    model = build_language_model(config, dtype=dtype)
    tensors = tied_tensors(config, read_tensors(directory), directory)
    fill(model, tensors, directory, droppable=DROPPABLE)
    return model, config


def save_language_model(
    directory: Path,
    model: LanguageModel,
    config: LanguageModelConfig,
    *,
    training: Mapping[str, Any],
    tokenizer_save: Callable[[Path], None],
    card: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint directory; transformers loads a Decoder's. `extra` joins config.json (token ids)."""
    write_checkpoint(
        directory,
        config=config.to_dict() | dict(extra or {}),
        tensors=language_tensors(model),
        resonance=None,
        training=training,
        tokenizer_save=tokenizer_save,
        card=card,
    )


def language_tensors(model: LanguageModel) -> dict[str, np.ndarray]:
    """Every parameter under its checkpoint key, as stored (linear weights [out, in])."""
    return model_tensors(model)
