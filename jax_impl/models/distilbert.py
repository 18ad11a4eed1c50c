"""DistilBERT: half of BERT's layers, without segments and pooler, under names of its own.

Source: Sanh et al. 2019, arXiv:1910.01108; names after transformers' `DistilBertForSequenceClassification`.
Twin: mlx_impl/models/distilbert.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_impl.models.bert import (
    ACTIVATIONS,
    BertConfig,
    attend,
    check_positions,
    layer_keys,
    linear,
    mask_bias,
    merge_heads,
    require,
    split_heads,
)
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.dropout import dropout

LAYER_NORM_EPS = 1e-12
# this family's setting -> BertConfig's; dropout is the recipe's
_SETTINGS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """The numbers of a DistilBERT checkpoint's `config.json`, under BERT's names."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    type_vocab_size: int = 0

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        require(config, "activation", *ACTIVATIONS)
        return super().from_dict({_SETTINGS.get(key, key): value for key, value in config.items()})


class DistilBertEmbeddings(nnx.Module):
    def __init__(self, config: DistilBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        check_positions(input_ids.shape[1], self.config.positions)
        positions = jnp.arange(input_ids.shape[1])
        return self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions))


class DistilBertSelfAttention(nnx.Module):
    def __init__(self, config: DistilBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.heads, self.rate = config.num_attention_heads, config.attention_probs_dropout_prob
        self.q_lin = linear(width, width, dtype=dtype, rngs=rngs)
        self.k_lin = linear(width, width, dtype=dtype, rngs=rngs)
        self.v_lin = linear(width, width, dtype=dtype, rngs=rngs)
        self.out_lin = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keys: jax.Array | None) -> jax.Array:
        query, key, value = (
            split_heads(layer(x), self.heads) for layer in (self.q_lin, self.k_lin, self.v_lin)
        )  # [N, H, S, K]
        return self.out_lin(merge_heads(attend(query, key, value, bias, self.rate, keys)))  # [N, S, D]


class DistilBertFFN(nnx.Module):
    def __init__(self, config: DistilBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.lin1 = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.lin2 = linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin2(self.activation(self.lin1(x)))


class DistilBertLayer(nnx.Module):
    def __init__(self, config: DistilBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, self.rate = config.hidden_size, config.hidden_dropout_prob
        self.attention = DistilBertSelfAttention(config, dtype=dtype, rngs=rngs)
        self.sa_layer_norm = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)
        self.ffn = DistilBertFFN(config, dtype=dtype, rngs=rngs)
        self.output_layer_norm = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keys: jax.Array | None) -> jax.Array:
        context = dropout(self.attention(x, bias, keys), self.rate, keys, site=1)
        x = self.sa_layer_norm(x + context)  # [N, S, D]
        return self.output_layer_norm(x + dropout(self.ffn(x), self.rate, keys, site=2))  # [N, S, D]


class DistilBertTransformer(nnx.Module):
    def __init__(self, config: DistilBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List(
            [DistilBertLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )


class DistilBertModel(nnx.Module):
    """The encoder; arguments as BertModel, whose segments it does not have."""

    def __init__(self, config: DistilBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = DistilBertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.transformer = DistilBertTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [N, S, D] of the last layer; arguments as BertModel, segments are not read."""
        x = dropout(self.embeddings(input_ids), self.config.hidden_dropout_prob, keys, site=3)  # [N, S, D]
        bias = mask_bias(attention_mask)[:, None, None, :]  # [N, 1, 1, S]
        for index, layer in enumerate(self.transformer.layer):
            x = layer(x, bias, layer_keys(keys, index))
        return x


class DistilBertCrossEncoder(CrossEncoder):
    """transformers' `DistilBertForSequenceClassification`, of one label, with the resonance head.

    Arguments as BertCrossEncoder.
    """

    def __init__(
        self, config: DistilBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **head: Any
    ) -> None:
        width = config.hidden_size
        self.distilbert = DistilBertModel(config, dtype=dtype, rngs=rngs)
        self.pre_classifier = linear(width, width, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(width, 1, rngs=rngs)
        super().__init__(width, rngs=rngs, **head)

    @property
    def encoder(self) -> DistilBertModel:
        return self.distilbert

    @property
    def output(self) -> nnx.Linear:
        return self.classifier

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.relu(self.pre_classifier(hidden[:, 0]))  # [N, D]
