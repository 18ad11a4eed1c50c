"""Llama and Qwen3: attribute paths are the Hugging Face checkpoint's keys; its blocks are Indra's too.

Source: Touvron et al. 2023, arXiv:2302.13971; Qwen Team 2025, arXiv:2505.09388; rotary positions: Su et al.
2021, arXiv:2104.09864; names after transformers' `LlamaForCausalLM`. Settings: common.language.architectures.
Twin: mlx_impl/models/decoder.py.

Letters: N rows, S tokens of a call, T tokens of a cache, D width, H heads, G heads of keys and values, K head
width, F inner width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.errors import UserError
from common.language.architectures import DecoderConfig
from jax_impl.models.bert import attend, layer_keys, linear, mask_bias, merge_heads, product, split_heads
from jax_impl.models.dropout import dropout

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines [N or 1, 1, S, K/2]


class Cache(NamedTuple):
    """What a model has read of each row: goes in and comes out of every call of step-by-step decoding."""

    keys: tuple[jax.Array, ...]  # of each layer [N, G, T, K], turned by position
    values: tuple[jax.Array, ...]  # of each layer [N, G, T, K]
    length: jax.Array  # [N] int32, tokens read so far
    states: jax.Array | None = None  # Infinito: [N, T, D], what may be written to the memory
    recalled: tuple[jax.Array, jax.Array] | None = None  # Infinito: what `recall` has put here


class LanguageOutput(NamedTuple):
    """What every language model of this project returns."""

    logits: jax.Array  # [N, S, V] float32; [N, 1, V] with `at`
    hidden: jax.Array  # [N, S, D], what the head reads
    memory: Any = None  # for the next segment; None of a model without one
    cache: Any = None  # for the next call, when one was given
    state: tuple[jax.Array, jax.Array] | None = None  # Indra: (re, im) [N, S, C], not normalised
    read: jax.Array | None = None  # Infinito: mean weight of each slot, the null slot last, [N, slots + 1]
    attention: tuple[jax.Array, ...] = ()  # of each layer [N, H, S, T], when asked for


class LanguageModel(nnx.Module):
    """What training, evaluation and generation know of a language model.

    `model(input_ids, segments, memory=, cache=, keys=, explore=, at=, attention=)` returns a LanguageOutput:

    input_ids: [N, S] integers.
    segments: [N, S] integers, 0 at padding; tokens see only tokens of the same number. One text when absent.
      With a cache padding stands on the right.
    memory: of `empty_memory` or of the call before.
    cache: of `empty_cache` or of the call before; without one, a call reads a whole segment from its start.
    keys: [N] random keys, one a row, which turn dropout and exploration on; none in evaluation.
    explore: [N] keys that turn on exploration alone.
    at: [N] places whose logits are wanted; of all S when absent.
    attention: whether attention weights are returned.
    """

    config: Any
    embed_tokens: nnx.Embed
    lm_head: nnx.Linear
    context: int | None  # tokens that a segment or an input has at most; None without a limit
    segmented: bool = False  # whether a full context ends a segment, not the text

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[N, S, D] -> float32 [N, S, V]."""
        head = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(hidden).astype(jnp.float32)

    def empty_memory(self, rows: int) -> Any:
        """What a row knows at the start of a text: zeros throughout, or None without a memory."""
        return None

    def empty_cache(self, rows: int, capacity: int) -> Any:
        """A cache for up to `capacity` tokens a row."""
        raise NotImplementedError

    def recall(self, memory: Any, cache: Any) -> Any:
        """The cache with what this memory means to the coming calls, which then need not compute it anew."""
        return cache

    def remember(self, memory: Any, cache: Any) -> Any:
        """The memory after the segment that a cache holds."""
        return memory


class RotaryAttention(nnx.Module):
    """transformers' `LlamaAttention`, with `q_norm` and `k_norm` as `Qwen3Attention`."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        width, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_width
        shared = config.key_value_heads * config.head_width
        self.q_proj = linear(width, queries, use_bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, shared, use_bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, shared, use_bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = linear(queries, width, use_bias=bias, dtype=dtype, rngs=rngs)
        if config.family == "qwen3":
            self.q_norm = rms_norm(config.head_width, config, dtype=dtype, rngs=rngs)
            self.k_norm = rms_norm(config.head_width, config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        rotation: Rotation,
        past: tuple[jax.Array, jax.Array, jax.Array] | None,
        keys: jax.Array | None,
        attention: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
        """What is added to x [N, S, D]; keys, values [N, G, S or T, K]; weights [N, H, S, S or T] if asked.

        `past` is (keys, values, length) of a cache.
        """
        groups = self.config.key_value_heads
        query = split_heads(self.q_proj(x), self.config.num_attention_heads)  # [N, H, S, K]
        key, value = split_heads(self.k_proj(x), groups), split_heads(self.v_proj(x), groups)  # [N, G, S, K]
        if self.config.family == "qwen3":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if past is not None:
            key, value = insert(past[0], key, past[2]), insert(past[1], value, past[2])  # [N, G, T, K]
        heads, tokens = query.shape[1:3]
        # heads that share keys stand one after the other: no key is copied
        query = query.reshape(query.shape[0], groups, -1, query.shape[3])  # [N, G, H/G S, K]
        if tokens > 1:
            bias = jnp.tile(bias, (1, 1, heads // groups, 1))  # [N or 1, 1, H/G S, T]
        context = attend(query, key, value, bias, self.config.attention_dropout, keys)
        weights = None
        if attention:
            logits = product(query * query.shape[-1] ** -0.5, key.swapaxes(2, 3)).astype(jnp.float32) + bias
            weights = jax.nn.softmax(logits, axis=-1).reshape(x.shape[0], heads, tokens, -1)
        context = merge_heads(context.reshape(x.shape[0], heads, tokens, -1))  # [N, S, H K]
        return self.o_proj(context), (key, value), weights


class GatedMLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.up_proj = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))  # [N, S, D]


class DecoderLayer(nnx.Module):
    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.rate = config.hidden_dropout
        self.self_attn = RotaryAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)
        self.input_layernorm = rms_norm(config.hidden_size, config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = rms_norm(config.hidden_size, config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        rotation: Rotation,
        past: tuple[jax.Array, jax.Array, jax.Array] | None,
        keys: jax.Array | None,
        attention: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array | None]:
        """States [N, S, D] after the block, and what RotaryAttention returns besides."""
        context, present, weights = self.self_attn(
            self.input_layernorm(x), bias, rotation, past, keys, attention
        )
        x = x + dropout(context, self.rate, keys, site=1)  # [N, S, D]
        return (
            x + dropout(self.mlp(self.post_attention_layernorm(x)), self.rate, keys, site=2),
            present,
            weights,
        )


class Surroundings(NamedTuple):
    """What the blocks of one call share."""

    bias: jax.Array  # [N or 1, 1, S, S or T]
    rotation: Rotation
    real: jax.Array  # [N, S] bool, false at padding
    length: jax.Array | None  # [N] of the cache after the call


def surroundings(
    config: DecoderConfig, input_ids: jax.Array, segments: jax.Array | None, cache: Cache | None
) -> Surroundings:
    """Who sees whom, and where: without a cache from position 0, else on from its length.

    UserError for more tokens than the model's context.
    """
    rows, tokens = input_ids.shape
    if tokens > config.context:
        raise UserError(
            f"a batch has rows of {tokens} tokens, but this model's context is {config.context}: cut them."
        )
    place = jnp.arange(tokens)
    real = jnp.ones((rows, tokens), bool) if segments is None else segments > 0  # [N, S]
    if cache is None:
        visible = place[:, None] >= place  # [S, S]
        if segments is not None:
            visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])  # [N, 1, S, S]
        positions, length = place[None], None  # [1, S]
    else:
        positions = cache.length[:, None] + place  # [N, S]
        slots = jnp.arange(cache.keys[0].shape[2])
        visible = (slots <= positions[:, :, None])[:, None]  # [N, 1, S, T]
        length = cache.length + jnp.sum(real, axis=1, dtype=jnp.int32)
    bias = mask_bias(visible)
    rotation = rotations(positions, jnp.array(config.inverse_frequencies(), jnp.float32))
    return Surroundings(bias if bias.ndim == 4 else bias[None, None], rotation, real, length)


def past_of(cache: Cache | None, layer: int) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """(keys, values, length) of one layer's cache."""
    return None if cache is None else (cache.keys[layer], cache.values[layer], cache.length)


class DecoderModel(nnx.Module):
    """transformers' `LlamaModel`."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = rms_norm(config.hidden_size, config, dtype=dtype, rngs=rngs)


class Decoder(LanguageModel):
    """transformers' `LlamaForCausalLM` or `Qwen3ForCausalLM`; calls as LanguageModel says, without a memory.

    Args:
      config: the checkpoint's sizes.
      dtype: of the computation; parameters stay float32.
      rngs: for fresh parameters.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.context = config, config.context
        self.model = DecoderModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        input_ids: jax.Array,
        segments: jax.Array | None = None,
        *,
        memory: Any = None,
        cache: Cache | None = None,
        keys: jax.Array | None = None,
        explore: jax.Array | None = None,
        at: jax.Array | None = None,
        attention: bool = False,
    ) -> LanguageOutput:
        around = surroundings(self.config, input_ids, segments, cache)
        x = dropped_embeddings(self.config, self.model.embed_tokens(input_ids), keys)  # [N, S, D]
        presents, weights = [], []
        for index, layer in enumerate(self.model.layers):
            x, present, weight = layer(
                x, around.bias, around.rotation, past_of(cache, index), layer_keys(keys, index), attention
            )
            presents.append(present)
            weights.append(weight)
        hidden = dropout(self.model.norm(x), self.config.hidden_dropout, keys, site=3)  # [N, S, D]
        return LanguageOutput(
            logits=self.logits(chosen(hidden, at)),
            hidden=hidden,
            cache=grown(presents, around),
            attention=tuple(weight for weight in weights if weight is not None),
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        head = self.model.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(hidden).astype(jnp.float32)

    def empty_cache(self, rows: int, capacity: int) -> Cache:
        return empty_cache(self.config, rows, capacity, self.model.embed_tokens.dtype)


def empty_cache(config: DecoderConfig, rows: int, capacity: int, dtype: Any) -> Cache:
    """A cache of zeros for up to `capacity` tokens of each row."""
    shape = (rows, config.key_value_heads, capacity, config.head_width)
    layers = config.num_hidden_layers
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        length=jnp.zeros(rows, jnp.int32),
    )


def grown(presents: list[tuple[jax.Array, jax.Array]], around: Surroundings) -> Cache | None:
    """The cache after a call, of what each layer returned; None when the call had none."""
    if around.length is None:
        return None
    keys, values = zip(*presents, strict=True)
    return Cache(tuple(keys), tuple(values), around.length)


def insert(cache: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
    """A cache [N, G, T, K] with `new` [N, G, S, K] from place `length` [N] on; what finds no room is lost."""
    rows = jnp.arange(new.shape[0])[:, None]
    places = length[:, None] + jnp.arange(new.shape[2])  # [N, S]
    return cache.at[rows, :, places].set(new.swapaxes(1, 2).astype(cache.dtype), mode="drop")


def chosen(hidden: jax.Array, at: jax.Array | None) -> jax.Array:
    """States [N, 1, D] of the places `at` [N], or all [N, S, D]."""
    return hidden if at is None else gathered(hidden, at[:, None])


def gathered(x: jax.Array, places: jax.Array) -> jax.Array:
    """The rows `places` [N, P] of x [N, S, D], [N, P, D]."""
    return jnp.take_along_axis(x, places[:, :, None], axis=1)


def dropped_embeddings(config: DecoderConfig, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Embeddings [N, S, D] with whole tokens and single numbers dropped."""
    kept = dropout(jnp.ones((*x.shape[:2], 1), x.dtype), config.word_dropout, keys, site=4)  # [N, S, 1]
    return dropout(x * kept, config.embedding_dropout, keys, site=5)


def rms_norm(width: int, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)


def rotations(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    """Cosines and sines [N, 1, S, K/2] of positions [N, S] times frequencies [K/2], in float32."""
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """x [N, H, S, K] with its first and second half of K turned as pairs."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [N, H, S, K/2]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
