"""DeBERTa-v3: disentangled attention, where content and relative position read each other.

The logit of query token i and key token j is (Qc_i·Kc_j + Qc_i·Kr_δ + Kc_j·Qr_δ) / sqrt(3 K), δ the bucket of
i − j: exact for near tokens, logarithmic for far ones. Source: He et al. 2021, arXiv:2006.03654 and
arXiv:2111.09543; names after transformers' `DebertaV2ForSequenceClassification`.
Twin: mlx_impl/models/deberta.py.

Letters: N rows, S tokens, D width, H heads, K head width, R = 2 S - 1 relative positions.
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
    BertConfig,
    BertIntermediate,
    BertPooler,
    BertSelfOutput,
    attend,
    known_settings,
    layer_keys,
    linear,
    mask_bias,
    merge_heads,
    product,
    require,
    split_heads,
)
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.dropout import dropout


@dataclasses.dataclass(frozen=True)
class DebertaV2Config(BertConfig):
    """The numbers of a DeBERTa-v3 checkpoint's `config.json` (model_type `deberta-v2`)."""

    vocab_size: int = 128100
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    pooler_hidden_act: str = "gelu"
    max_relative_positions: int = -1
    position_buckets: int = -1
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    norm_rel_ebd: str = "none"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Keep the keys this model knows; ValueError names a variant that it does not compute."""
        width = config.get("hidden_size", cls.hidden_size)
        heads = config.get("num_attention_heads", cls.num_attention_heads)
        require({"relative_attention": False} | config, "relative_attention", True)
        require({"position_biased_input": True} | config, "position_biased_input", False)
        require(config, "conv_kernel_size", 0, None)
        require(config, "embedding_size", width, None)
        require(config, "pooler_hidden_size", width, None)
        require(config, "attention_head_size", width // heads, None)
        require(config, "norm_rel_ebd", "layer_norm", "none")
        kinds = config.get("pos_att_type") or ()
        kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
        kinds = tuple(kind.strip() for kind in kinds)
        if not set(kinds) <= {"c2p", "p2c"}:
            raise ValueError(f"pos_att_type is {config['pos_att_type']!r}; only c2p and p2c are supported.")
        return known_settings(cls, config | {"pos_att_type": kinds})

    @property
    def span(self) -> int:
        """Relative positions on either side that have an embedding of their own."""
        return self.position_buckets if self.position_buckets > 0 else self.farthest

    @property
    def farthest(self) -> int:
        """The distance at which the last bucket begins to hold all others."""
        return (
            self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings
        )


def relative_rows(tokens: int, config: DebertaV2Config) -> np.ndarray:
    """Rows of `rel_embeddings` [R] for the distances i - j = S - 1, ..., -(S - 1)."""
    distance = np.arange(tokens - 1, -tokens, -1)  # [R]
    middle = config.position_buckets // 2
    if config.position_buckets > 0:
        far = np.maximum(np.abs(distance), max(middle, 1)).astype(np.float32)
        scale = np.log(np.float32((config.farthest - 1) / middle))
        bucket = np.ceil(np.log(far / np.float32(middle)) / scale * np.float32(middle - 1)) + middle
        distance = np.where(np.abs(distance) <= middle, distance, np.sign(distance) * bucket).astype(int)
    return np.clip(distance + config.span, 0, 2 * config.span - 1)


def by_pairs(x: jax.Array) -> jax.Array:
    """From logits by distance, [..., S, R] with R from S - 1 down, to logits by pair [..., S, S].

    Entry (i, j) is x[i, S - 1 - i + j]: a reshape that shifts each row by one, where a gather would be slow.
    """
    *rows, tokens, _ = x.shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*rows, -1)  # [..., S * 2 S]
    x = x[..., tokens - 1 : tokens - 1 + tokens * (2 * tokens - 1)]
    return x.reshape(*rows, tokens, 2 * tokens - 1)[..., :tokens]


class DebertaV2Embeddings(nnx.Module):
    def __init__(self, config: DebertaV2Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.segments = config.type_vocab_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        if self.segments:
            self.token_type_embeddings = nnx.Embed(self.segments, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        x = self.word_embeddings(input_ids)  # [N, S, D]
        return self.LayerNorm(x + self.token_type_embeddings(token_type_ids) if self.segments else x)


class DisentangledSelfAttention(nnx.Module):
    def __init__(self, config: DebertaV2Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.hidden_size
        self.query_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.key_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.value_proj = linear(width, width, dtype=dtype, rngs=rngs)
        if not config.share_att_key and "c2p" in config.pos_att_type:
            self.pos_key_proj = linear(width, width, dtype=dtype, rngs=rngs)
        if not config.share_att_key and "p2c" in config.pos_att_type:
            self.pos_query_proj = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, bias: jax.Array, relative: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """x [N, S, D] -> [N, S, D]; `relative` [R, D] embeds the distances from S - 1 down."""
        heads, kinds = self.config.num_attention_heads, self.config.pos_att_type
        query, key, value = (
            split_heads(layer(x), heads) for layer in (self.query_proj, self.key_proj, self.value_proj)
        )  # [N, H, S, K]
        terms = 1 + len(kinds)
        scale = (terms * query.shape[-1]) ** -0.5
        if "c2p" in kinds:
            layer = self.key_proj if self.config.share_att_key else self.pos_key_proj
            positions = split_heads(layer(relative), heads)  # [H, R, K]
            bias = bias + by_pairs(_read(query * scale, positions))  # [N, H, S, S]
        if "p2c" in kinds:
            layer = self.query_proj if self.config.share_att_key else self.pos_query_proj
            positions = split_heads(layer(relative), heads)[:, ::-1]  # [H, R, K], of key token j first
            bias = bias + by_pairs(_read(key * scale, positions)).swapaxes(2, 3)  # [N, H, S, S]
        rate = self.config.attention_probs_dropout_prob
        return merge_heads(attend(query, key, value, bias, rate, keys, terms=terms))


def _read(content: jax.Array, positions: jax.Array) -> jax.Array:
    """Logits [N, H, S, R] of content [N, H, S, K] and positions [H, R, K], in float32."""
    positions = jnp.broadcast_to(positions, (len(content), *positions.shape))  # as `product` takes them
    return product(content, positions.swapaxes(2, 3)).astype(jnp.float32)


class DebertaV2Attention(nnx.Module):
    def __init__(self, config: DebertaV2Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.self = DisentangledSelfAttention(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.hidden_size, config, dtype=dtype, rngs=rngs)


class DebertaV2Layer(nnx.Module):
    def __init__(self, config: DebertaV2Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention = DebertaV2Attention(config, dtype=dtype, rngs=rngs)
        self.intermediate = BertIntermediate(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.intermediate_size, config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, bias: jax.Array, relative: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        rate = self.config.hidden_dropout_prob
        context = self.attention.self(x, bias, relative, keys)
        x = self.attention.output(context, x, rate, keys, site=1)  # [N, S, D]
        inner = ACTIVATIONS[self.config.hidden_act](self.intermediate.dense(x))
        return self.output(inner, x, rate, keys, site=2)  # [N, S, D]


class DebertaV2Encoder(nnx.Module):
    def __init__(self, config: DebertaV2Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.hidden_size
        self.layer = nnx.List(
            [DebertaV2Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.rel_embeddings = nnx.Embed(2 * config.span, width, dtype=dtype, rngs=rngs)
        if config.norm_rel_ebd == "layer_norm":
            self.LayerNorm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def relative(self, tokens: int) -> jax.Array:
        """Embeddings [R, D] of the distances from `tokens` - 1 down; without their dropout of pretraining,
        whose mask a whole batch would share."""
        embedded = self.rel_embeddings(jnp.asarray(relative_rows(tokens, self.config)))  # [R, D]
        return self.LayerNorm(embedded) if self.config.norm_rel_ebd == "layer_norm" else embedded


class DebertaV2Model(nnx.Module):
    """The encoder; arguments as BertModel."""

    def __init__(self, config: DebertaV2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = DebertaV2Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = DebertaV2Encoder(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [N, S, D] of the last layer; arguments as BertModel."""
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        x = self.embeddings(input_ids, token_type_ids)  # [N, S, D]
        x = dropout(x, self.config.hidden_dropout_prob, keys, site=3)
        bias = mask_bias(attention_mask)[:, None, None, :]  # [N, 1, 1, S]
        relative = self.encoder.relative(input_ids.shape[1])  # [R, D]
        for index, layer in enumerate(self.encoder.layer):
            x = layer(x, bias, relative, layer_keys(keys, index))
        return x


class DebertaV2CrossEncoder(CrossEncoder):
    """transformers' `DebertaV2ForSequenceClassification`, of one label, with the resonance head.

    Arguments as BertCrossEncoder.
    """

    def __init__(
        self, config: DebertaV2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **head: Any
    ) -> None:
        self.activation = ACTIVATIONS[config.pooler_hidden_act]
        self.deberta = DebertaV2Model(config, dtype=dtype, rngs=rngs)
        self.pooler = BertPooler(config, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, 1, rngs=rngs)
        super().__init__(config.hidden_size, rngs=rngs, **head)

    @property
    def encoder(self) -> DebertaV2Model:
        return self.deberta

    @property
    def output(self) -> nnx.Linear:
        return self.classifier

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return self.activation(self.pooler.dense(hidden[:, 0]))  # [N, D]
