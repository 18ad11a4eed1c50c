"""An external memory that a language model reads by cross-attention and writes after each segment.

Source: DESIGN section 3, Infinito; reading after Wu et al. 2022 (Memorizing Transformers), arXiv:2203.08913.
Twin: mlx_impl/models/memory.py.

Letters: N rows, S tokens, M slots, D width, H heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.language.architectures import InfinitoConfig
from jax_impl.models.bert import linear, merge_heads, product, split_heads
from jax_impl.models.decoder import gathered, rms_norm
from jax_impl.models.dropout import dropout, gaussian

# Added to the logits of empty slots. Not the least float32, which would make the gradient of a sum NaN.
EMPTY = -1e9


class Memory(NamedTuple):
    """What each row remembers; zeros throughout when it knows nothing."""

    slots: jax.Array  # [N, M, D] float32, normalised states
    importance: jax.Array  # [N, M] float32 in [0, 1], 0 where empty
    age: jax.Array  # [N, M] float32, segments since a slot was written


class SlotMemory(nnx.Module):
    """Reads a Memory and writes it. Besides the slots there is a permanent null slot of importance 1.

    Args:
      config: `memory_slots`, `memory_writes`, `memory_decay`, `exploration` and the blocks' sizes.
      dtype: of the computation.
      rngs: for fresh parameters.
    """

    def __init__(self, config: InfinitoConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.hidden_size
        self.norm = rms_norm(width, config.blocks(), dtype=dtype, rngs=rngs)
        self.q_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.importance = nnx.Linear(width, 1, rngs=rngs)
        self.null = nnx.Param(jnp.zeros(width))
        self.gate = nnx.Param(jnp.zeros(width))

    def __call__(
        self,
        x: jax.Array,
        memory: Memory,
        recalled: tuple[jax.Array, jax.Array] | None,
        real: jax.Array,
        keys: jax.Array | None,
        explore: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What is added to x [N, S, D]; the states to write [N, S, D]; mean read weights [N, M + 1].

        `recalled` is what `recall` says of the memory, where a caller has it; the mean counts the positions
        that are `real` [N, S], and the null slot stands last in it. `explore` [N] keys turn on noise of the
        memory queries, `keys` dropout.
        """
        states = self.norm(x)  # [N, S, D]
        query = self.q_proj(states)
        if explore is not None and self.config.exploration > 0:
            noise = self.config.exploration * gaussian(query.shape, explore, site=6)
            query = query + noise.astype(query.dtype)
        query = split_heads(query, self.config.num_attention_heads)  # [N, H, S, K]
        key, value = self.recall(memory) if recalled is None else recalled
        logits = product(query * query.shape[-1] ** -0.5, key.swapaxes(2, 3)).astype(jnp.float32)
        weights = jax.nn.softmax(logits + self.bias(memory)[:, None, None, :], axis=-1)  # [N, H, S, M + 1]
        counted = real.astype(jnp.float32)
        share = counted / jnp.maximum(1.0, jnp.sum(counted, axis=1, keepdims=True))  # [N, S]
        read = jnp.sum(jnp.mean(weights, axis=1) * share[:, :, None], axis=1)  # [N, M + 1]
        kept = dropout(weights.astype(value.dtype), self.config.attention_dropout, keys, site=0)
        added = self.gate[...].astype(x.dtype) * self.o_proj(merge_heads(product(kept, value)))  # [N, S, D]
        return dropout(added, self.config.hidden_dropout, keys, site=1), states, read

    def recall(self, memory: Memory) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all slots, [N, H, M + 1, K]: the same for every token of a segment."""
        rows, _, width = memory.slots.shape
        null = jnp.broadcast_to(self.null[...], (rows, 1, width))
        slots = jnp.concatenate((memory.slots, null), axis=1)  # [N, M + 1, D]
        heads = self.config.num_attention_heads
        return split_heads(self.k_proj(slots), heads), split_heads(self.v_proj(slots), heads)

    def bias(self, memory: Memory) -> jax.Array:
        """Log importance [N, M + 1], 0 of the null slot."""
        filled = memory.importance > 0
        log = jnp.where(filled, jnp.log(jnp.where(filled, memory.importance, 1.0)), EMPTY)
        return jnp.concatenate((log, jnp.zeros((log.shape[0], 1))), axis=1)

    def write(self, memory: Memory, states: jax.Array, real: jax.Array) -> Memory:
        """The memory after a segment of `states` [N, S, D], of which `real` [N, S] are not padding.

        The `memory_writes` most important positions replace the least important slots; a row of padding alone
        changes nothing.
        """
        decay, writes = self.config.memory_decay, min(self.config.memory_writes, states.shape[1])
        importance = jax.nn.sigmoid(self.importance(states.astype(jnp.float32))[..., 0])  # [N, S]
        order = jnp.argsort(jnp.where(real, -importance, 1.0), axis=1, stable=True)[:, :writes]  # [N, W]
        active = jnp.any(real, axis=1, keepdims=True)
        old = jnp.where(active, decay * memory.importance, memory.importance)  # [N, M]
        ranks = jnp.argsort(jnp.argsort(old, axis=1, stable=True), axis=1, stable=True)
        source = jnp.take_along_axis(order, jnp.minimum(ranks, writes - 1), axis=1)  # [N, M]
        replaced = (ranks < writes) & jnp.take_along_axis(real, source, axis=1)
        new = gathered(states.astype(jnp.float32), source)  # [N, M, D]
        older = memory.age + (active & (old > 0)).astype(jnp.float32)
        return Memory(
            slots=jnp.where(replaced[:, :, None], new, memory.slots),
            importance=jnp.where(replaced, jnp.take_along_axis(importance, source, axis=1), old),
            age=jnp.where(replaced, 0.0, older),
        )


def empty_memory(config: InfinitoConfig, rows: int) -> Memory:
    """A memory that holds nothing."""
    shape = (rows, config.memory_slots)
    return Memory(
        slots=jnp.zeros((*shape, config.hidden_size)),
        importance=jnp.zeros(shape),
        age=jnp.zeros(shape),
    )
