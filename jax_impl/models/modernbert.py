"""ModernBERT: rotary positions, attention within a window in most layers, GeGLU, norms before and no biases.

Source: Warner et al. 2024, arXiv:2412.13663; rotary positions: Su et al. 2021, arXiv:2104.09864; names after
transformers' `ModernBertForSequenceClassification`. Twin: mlx_impl/models/modernbert.py.

Letters: N rows, S tokens, D width, H heads, K head width, F inner width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jax_impl.models.bert import (
    ACTIVATIONS,
    attend,
    check_positions,
    known_settings,
    layer_keys,
    linear,
    mask_bias,
    merge_heads,
    require,
    split_heads,
)
from jax_impl.models.cross_encoder import CrossEncoder, mean_of
from jax_impl.models.dropout import dropout

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """The numbers of a ModernBERT checkpoint's `config.json`; the rates of dropout are the recipe's."""

    vocab_size: int = 50368
    hidden_size: int = 768
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    intermediate_size: int = 1152
    max_position_embeddings: int = 8192
    type_vocab_size: int = 0
    hidden_activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: int = 128
    layer_types: tuple[str, ...] = ()
    rope_theta: tuple[tuple[str, float], ...] = ((FULL, 160_000.0), (SLIDING, 10_000.0))
    classifier_pooling: str = "cls"
    classifier_activation: str = "gelu"
    classifier_bias: bool = False
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Keep the keys this model knows, in the hub's spelling or transformers' newer one.

        ValueError names a variant that it does not compute.
        """
        require(config, "classifier_pooling", "cls", "mean")
        require(config, "rope_scaling", None)
        layers, every = (
            config.get(*pair) for pair in (("num_hidden_layers", 22), ("global_attn_every_n_layers", 3))
        )
        types = config.get("layer_types") or [SLIDING if i % every else FULL for i in range(layers)]
        for kind in types:
            require({"layer_types": kind}, "layer_types", FULL, SLIDING)
        if len(types) != layers:
            raise ValueError(f"layer_types names {len(types)} layers, num_hidden_layers is {layers}")
        ropes = config.get("rope_parameters") or {}
        theta = {}
        for (kind, usual), old in zip(cls.rope_theta, ("global_rope_theta", "local_rope_theta"), strict=True):
            rope = ropes.get(kind) or {}
            require(rope, "rope_type", "default")
            theta[kind] = float(rope.get("rope_theta") or config.get(old) or usual)
        return known_settings(cls, config | {"layer_types": tuple(types), "rope_theta": tuple(theta.items())})

    @property
    def positions(self) -> int:
        """The longest input, in tokens."""
        return self.max_position_embeddings


def rotations(tokens: int, width: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [S, K/2] of position times frequency, frequencies theta^(-2i/K).

    In float32 throughout, as in pretraining: at position 8,000 exact angles would be 5e-4 away.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)  # [K/2]
    angles = np.arange(tokens, dtype=np.float32)[:, None] / np.float32(theta) ** exponents  # [S, K/2]
    return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, rotation: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """x [N, H, S, K] with its first and second half of K turned as pairs, by `rotations`."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [N, H, S, K/2]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


class ModernBertEmbeddings(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.tok_embeddings = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(config, dtype=dtype, rngs=rngs)


def layer_norm(config: ModernBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.norm_eps, use_bias=config.norm_bias, dtype=dtype, rngs=rngs
    )


class ModernBertAttention(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        width, bias = config.hidden_size, config.attention_bias
        self.Wqkv = linear(width, 3 * width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.Wo = linear(width, width, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        rotation: tuple[np.ndarray, np.ndarray],
        keys: jax.Array | None,
    ) -> jax.Array:
        query, key, value = (
            split_heads(part, self.config.num_attention_heads) for part in jnp.split(self.Wqkv(x), 3, axis=-1)
        )  # [N, H, S, K]
        rate = self.config.attention_probs_dropout_prob
        context = attend(rotate(query, rotation), rotate(key, rotation), value, bias, rate, keys)
        return self.Wo(merge_heads(context))  # [N, S, D]


class ModernBertMLP(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_activation]
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.Wi = linear(width, 2 * inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.Wo = linear(inner, width, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
        value, gate = jnp.split(self.Wi(x), 2, axis=-1)  # [N, S, F]
        return self.Wo(dropout(self.activation(value) * gate, rate, keys, site=2))  # [N, S, D]


class ModernBertEncoderLayer(nnx.Module):
    """The first layer has no `attn_norm`: the embeddings end in a norm."""

    def __init__(self, config: ModernBertConfig, first: bool, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.first, self.rate = first, config.hidden_dropout_prob
        if not first:
            self.attn_norm = layer_norm(config, dtype=dtype, rngs=rngs)
        self.attn = ModernBertAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = layer_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = ModernBertMLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        rotation: tuple[np.ndarray, np.ndarray],
        keys: jax.Array | None,
    ) -> jax.Array:
        context = self.attn(x if self.first else self.attn_norm(x), bias, rotation, keys)
        x = x + dropout(context, self.rate, keys, site=1)  # [N, S, D]
        return x + self.mlp(self.mlp_norm(x), self.rate, keys)  # [N, S, D]


class ModernBertModel(nnx.Module):
    """The encoder; arguments as BertModel, whose segments it does not have."""

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = ModernBertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                ModernBertEncoderLayer(config, index == 0, dtype=dtype, rngs=rngs)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.final_norm = layer_norm(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [N, S, D] after the last norm; arguments as BertModel, segments are not read.

        Padded rows and positions stay in the batch, where upstream takes them out: the same numbers.
        """
        config, tokens = self.config, input_ids.shape[1]
        check_positions(tokens, config.positions)
        place = np.arange(tokens)
        near = np.abs(place[:, None] - place) <= config.local_attention // 2  # [S, S]
        mask = attention_mask.astype(bool)[:, None, None, :]  # [N, 1, 1, S]
        biases = {FULL: mask_bias(mask), SLIDING: mask_bias(mask & near)}  # [N, 1, 1 or S, S]
        per_head = config.hidden_size // config.num_attention_heads
        turns = {kind: rotations(tokens, per_head, theta) for kind, theta in config.rope_theta}
        x = self.embeddings.norm(self.embeddings.tok_embeddings(input_ids))  # [N, S, D]
        x = dropout(x, config.hidden_dropout_prob, keys, site=3)
        for index, (layer, kind) in enumerate(zip(self.layers, config.layer_types, strict=True)):
            x = layer(x, biases[kind], turns[kind], layer_keys(keys, index))
        return self.final_norm(x)


class ModernBertPredictionHead(nnx.Module):
    """The head of the masked language model too, so that a base brings it along."""

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.activation = ACTIVATIONS[config.classifier_activation]
        self.dense = linear(width, width, use_bias=config.classifier_bias, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.activation(self.dense(x)))  # [N, D]


class ModernBertCrossEncoder(CrossEncoder):
    """transformers' `ModernBertForSequenceClassification`, of one label, with the resonance head.

    Arguments as BertCrossEncoder. `classifier_pooling` of the config says whether the head reads the first
    token or the mean of all.
    """

    def __init__(
        self, config: ModernBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **head: Any
    ) -> None:
        self.classifier_pooling = config.classifier_pooling
        self.model = ModernBertModel(config, dtype=dtype, rngs=rngs)
        self.head = ModernBertPredictionHead(config, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, 1, rngs=rngs)
        super().__init__(config.hidden_size, rngs=rngs, **head)

    @property
    def encoder(self) -> ModernBertModel:
        return self.model

    @property
    def output(self) -> nnx.Linear:
        return self.classifier

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return self.head(hidden[:, 0] if self.classifier_pooling == "cls" else mean_of(hidden, mask))
