"""An external memory that a language model reads by cross-attention and writes after each segment.

Source: DESIGN section 3, Infinito; reading after Wu et al. 2022 (Memorizing Transformers), arXiv:2203.08913.
Twin: jax_impl/models/memory.py.

Letters: N rows, S tokens, M slots, D width, H heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from common.language.architectures import InfinitoConfig
from mlx_impl.models.bert import linear, merge_heads, split_heads
from mlx_impl.models.decoder import gathered, rms_norm
from mlx_impl.models.dropout import dropout, gaussian
from mlx_impl.models.layers import Linear, Rngs

# Added to the logits of empty slots. Not the least float32, which would make the gradient of a sum NaN.
EMPTY = -1e9


class Memory(NamedTuple):
    """What each row remembers; zeros throughout when it knows nothing."""

    slots: mx.array  # [N, M, D] float32, normalised states
    importance: mx.array  # [N, M] float32 in [0, 1], 0 where empty
    age: mx.array  # [N, M] float32, segments since a slot was written


class SlotMemory(nn.Module):
    """Reads a Memory and writes it. Besides the slots there is a permanent null slot of importance 1.

    Args:
      config: `memory_slots`, `memory_writes`, `memory_decay`, `exploration` and the blocks' sizes.
      dtype: of the computation.
      rngs: for fresh parameters.
    """

    def __init__(self, config: InfinitoConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.norm = rms_norm(width, config.blocks(), dtype=dtype)
        self.q_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.importance = Linear(width, 1, rngs=rngs)
        self.null = mx.zeros(width)
        self.gate = mx.zeros(width)

    def __call__(
        self,
        x: mx.array,
        memory: Memory,
        recalled: tuple[mx.array, mx.array] | None,
        real: mx.array,
        keys: mx.array | None,
        explore: mx.array | None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """What is added to x [N, S, D]; the states to write [N, S, D]; mean read weights [N, M + 1].

        `recalled` is what `recall` says of the memory, where a caller has it; the mean counts the positions
        that are `real` [N, S], and the null slot stands last in it. `explore` [N, 2] keys turn on noise of
        the memory queries, `keys` dropout.
        """
        states = self.norm(x)  # [N, S, D]
        query = self.q_proj(states)
        if explore is not None and self.config.exploration > 0:
            noise = self.config.exploration * gaussian(query.shape, explore, site=6)
            query = query + noise.astype(query.dtype)
        query = split_heads(query, self.config.num_attention_heads)  # [N, H, S, K]
        key, value = self.recall(memory) if recalled is None else recalled
        logits = (query * query.shape[-1] ** -0.5 @ key.swapaxes(2, 3)).astype(mx.float32)
        weights = mx.softmax(logits + self.bias(memory)[:, None, None, :], axis=-1)  # [N, H, S, M + 1]
        counted = real.astype(mx.float32)
        share = counted / mx.maximum(1.0, mx.sum(counted, axis=1, keepdims=True))  # [N, S]
        read = mx.sum(mx.mean(weights, axis=1) * share[:, :, None], axis=1)  # [N, M + 1]
        kept = dropout(weights.astype(value.dtype), self.config.attention_dropout, keys, site=0)
        added = self.gate.astype(x.dtype) * self.o_proj(merge_heads(kept @ value))  # [N, S, D]
        return dropout(added, self.config.hidden_dropout, keys, site=1), states, read

    def recall(self, memory: Memory) -> tuple[mx.array, mx.array]:
        """Keys and values of all slots, [N, H, M + 1, K]: the same for every token of a segment."""
        rows, _, width = memory.slots.shape
        null = mx.broadcast_to(self.null, (rows, 1, width))
        slots = mx.concatenate([memory.slots, null], axis=1)  # [N, M + 1, D]
        heads = self.config.num_attention_heads
        return split_heads(self.k_proj(slots), heads), split_heads(self.v_proj(slots), heads)

    def bias(self, memory: Memory) -> mx.array:
        """Log importance [N, M + 1], 0 of the null slot."""
        filled = memory.importance > 0
        log = mx.where(filled, mx.log(mx.where(filled, memory.importance, 1.0)), EMPTY)
        return mx.concatenate([log, mx.zeros((log.shape[0], 1))], axis=1)

    def write(self, memory: Memory, states: mx.array, real: mx.array) -> Memory:
        """The memory after a segment of `states` [N, S, D], of which `real` [N, S] are not padding.

        The `memory_writes` most important positions replace the least important slots; a row of padding alone
        changes nothing.
        """
        decay, writes = self.config.memory_decay, min(self.config.memory_writes, states.shape[1])
        importance = mx.sigmoid(self.importance(states.astype(mx.float32))[..., 0])  # [N, S]
        order = mx.stop_gradient(mx.argsort(mx.where(real, -importance, 1.0), axis=1)[:, :writes])  # [N, W]
        active = mx.any(real, axis=1, keepdims=True)
        old = mx.where(active, decay * memory.importance, memory.importance)  # [N, M]
        ranks = mx.stop_gradient(mx.argsort(mx.argsort(old, axis=1), axis=1))
        source = mx.take_along_axis(order, mx.minimum(ranks, writes - 1), axis=1)  # [N, M]
        replaced = (ranks < writes) & mx.take_along_axis(real, source, axis=1)
        new = gathered(states.astype(mx.float32), source)  # [N, M, D]
        older = memory.age + (active & (old > 0)).astype(mx.float32)
        return Memory(
            slots=mx.where(replaced[:, :, None], new, memory.slots),
            importance=mx.where(replaced, mx.take_along_axis(importance, source, axis=1), old),
            age=mx.where(replaced, 0.0, older),
        )


def empty_memory(config: InfinitoConfig, rows: int) -> Memory:
    """A memory that holds nothing."""
    shape = (rows, config.memory_slots)
    return Memory(
        slots=mx.zeros((*shape, config.hidden_size)),
        importance=mx.zeros(shape),
        age=mx.zeros(shape),
    )
