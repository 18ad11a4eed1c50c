"""Infinito: decoder blocks, one of which reads an external memory that earlier segments wrote.

Source: DESIGN section 3, Infinito. Twin: jax_impl/models/infinito.py.
"""

from __future__ import annotations

import mlx.core as mx

from common.language.architectures import InfinitoConfig
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
    insert,
    past_of,
    rms_norm,
    surroundings,
)
from mlx_impl.models.dropout import dropout
from mlx_impl.models.layers import Embed, Rngs
from mlx_impl.models.memory import Memory, SlotMemory, empty_memory


class Infinito(LanguageModel):
    """Decoder blocks with a memory, or without one: calls as LanguageModel says.

    A call without a cache is one segment: it reads `memory` and returns the one after it. With a cache the
    segment goes on: the memory comes out as it went in, and `remember` writes it when the segment is full.

    Args:
      config: the model's settings; `architecture` infinito or transformer.
      dtype: of the computation; parameters stay float32.
      rngs: for fresh parameters.
    """

    segmented = True

    def __init__(self, config: InfinitoConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs) -> None:
        super().__init__()
        self.config, self.context = config, config.context
        blocks, width = config.blocks(), config.hidden_size
        self.embed_tokens = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = [DecoderLayer(blocks, dtype=dtype, rngs=rngs) for _ in range(blocks.num_hidden_layers)]
        if config.remembers:
            self.memory = SlotMemory(config, dtype=dtype, rngs=rngs)
        self.norm = rms_norm(width, blocks, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: mx.array,
        segments: mx.array | None = None,
        *,
        memory: Memory | None = None,
        cache: Cache | None = None,
        keys: mx.array | None = None,
        explore: mx.array | None = None,
        at: mx.array | None = None,
        attention: bool = False,
    ) -> LanguageOutput:
        config = self.config
        blocks = config.blocks()
        around = surroundings(blocks, input_ids, segments, cache)
        if config.remembers and memory is None:
            memory = self.empty_memory(input_ids.shape[0])
        x = dropped_embeddings(blocks, self.embed_tokens(input_ids), keys)  # [N, S, D]
        presents, weights = [], []
        states = read = None
        recalled = None if cache is None else cache.recalled
        for index, layer in enumerate(self.layers):
            if memory is not None and index == config.reads_at:
                noisy = keys if explore is None else explore
                among = layer_keys(keys, config.num_hidden_layers)
                added, states, read = self.memory(x, memory, recalled, around.real, among, noisy)
                x = x + added
            x, present, weight = layer(
                x, around.bias, around.rotation, past_of(cache, index), layer_keys(keys, index), attention
            )
            presents.append(present)
            weights.append(weight)
        hidden = dropout(self.norm(x), config.hidden_dropout, keys, site=3)  # [N, S, D]
        if cache is not None:
            cache = self._grown(cache, grown(presents, around), states)
        elif memory is not None and states is not None:
            memory = self.memory.write(memory, states, around.real)
        return LanguageOutput(
            logits=self.logits(chosen(hidden, at)),
            hidden=hidden,
            memory=memory,
            cache=cache,
            read=read,
            attention=tuple(weight for weight in weights if weight is not None),
        )

    def empty_memory(self, rows: int) -> Memory | None:
        return empty_memory(self.config, rows) if self.config.remembers else None

    def empty_cache(self, rows: int, capacity: int) -> Cache:
        plain = empty_cache(self.config.blocks(), rows, capacity, self.embed_tokens.dtype)
        shape = (rows, capacity, self.config.hidden_size)
        states = mx.zeros(shape, self.embed_tokens.dtype) if self.config.remembers else None
        return plain._replace(states=states)

    def recall(self, memory: Memory | None, cache: Cache) -> Cache:
        return cache if memory is None else cache._replace(recalled=self.memory.recall(memory))

    def remember(self, memory: Memory | None, cache: Cache) -> Memory | None:
        if memory is None or cache.states is None:
            return memory
        real = mx.arange(cache.states.shape[1]) < cache.length[:, None]  # [N, T]
        return self.memory.write(memory, cache.states, real)

    def _grown(self, before: Cache, after: Cache | None, states: mx.array | None) -> Cache | None:
        """The cache after a call, with the states that may be written."""
        if after is None or before.states is None or states is None:
            return after
        states = insert(before.states[:, None], states[:, None], before.length)[:, 0]  # [N, T, D]
        return after._replace(states=states, recalled=before.recalled)
