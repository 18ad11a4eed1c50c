"""Indra: embeddings to phase and magnitude, decoder blocks, and a second state that the logits are made of.

Source: DESIGN section 3, Indra. Twin: jax_impl/models/indra.py.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from common.language.architectures import IndraConfig
from mlx_impl.models.bert import layer_keys, linear
from mlx_impl.models.decoder import (
    Cache,
    DecoderLayer,
    LanguageModel,
    LanguageOutput,
    chosen,
    dropped_embeddings,
    empty_cache,
    grown,
    past_of,
    rms_norm,
    surroundings,
)
from mlx_impl.models.dropout import dropout
from mlx_impl.models.layers import Embed, Rngs
from mlx_impl.models.projector import Projector


class Indra(LanguageModel):
    """A decoder between two projectors; calls as LanguageModel says, without a memory.

    The output's `state` is (re, im) [N, S, C] of the second projector, not normalised: alignment reads
    its magnitudes and phases. With `projector` none there is none, and the blocks stand alone.

    Args:
      config: the model's settings.
      dtype: of the blocks' computation; projectors and parameters are float32.
      rngs: for fresh parameters.
    """

    def __init__(self, config: IndraConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs) -> None:
        super().__init__()
        self.config, self.context = config, config.context
        blocks, width, states = config.blocks(), config.hidden_size, config.complex_width
        self.embed_tokens = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        if config.projector != "none":
            kind = config.projector
            self.projector = Projector(width, states, parameterisation=kind, rngs=rngs)
            self.mix = linear(2 * states, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.layers = [DecoderLayer(blocks, dtype=dtype, rngs=rngs) for _ in range(blocks.num_hidden_layers)]
        self.norm = rms_norm(width, blocks, dtype=dtype)
        if config.projector != "none":
            self.state_projector = Projector(width, states, parameterisation=kind, rngs=rngs)
            self.recombine = linear(2 * states, width, use_bias=False, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: mx.array,
        segments: mx.array | None = None,
        *,
        memory: Any = None,
        cache: Cache | None = None,
        keys: mx.array | None = None,
        explore: mx.array | None = None,
        at: mx.array | None = None,
        attention: bool = False,
    ) -> LanguageOutput:
        config, blocks = self.config, self.config.blocks()
        around = surroundings(blocks, input_ids, segments, cache)
        x = dropped_embeddings(blocks, self.embed_tokens(input_ids), keys)  # [N, S, D]
        if config.projector != "none":
            x = self.mix(mx.concatenate(list(self.projector.amplitudes(x)), axis=-1))  # [N, S, D]
        presents, weights = [], []
        for index, layer in enumerate(self.layers):
            x, present, weight = layer(
                x, around.bias, around.rotation, past_of(cache, index), layer_keys(keys, index), attention
            )
            presents.append(present)
            weights.append(weight)
        hidden, state = self.norm(x), None  # [N, S, D]
        if config.projector != "none":
            state = self.state_projector.amplitudes(hidden)  # [N, S, C] each
            hidden = self.recombine(mx.concatenate(list(state), axis=-1))  # [N, S, D]
        hidden = dropout(hidden, config.hidden_dropout, keys, site=3)
        return LanguageOutput(
            logits=self.logits(chosen(hidden, at)),
            hidden=hidden,
            cache=grown(presents, around),
            state=state,
            attention=tuple(weight for weight in weights if weight is not None),
        )

    def empty_cache(self, rows: int, capacity: int) -> Cache:
        return empty_cache(self.config.blocks(), rows, capacity, self.embed_tokens.dtype)
