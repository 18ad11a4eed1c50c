"""The BERT family of encoders (BERT, MiniLM): attribute paths are the Hugging Face checkpoint's keys.

Source: Devlin et al. 2019, arXiv:1810.04805; names after transformers' `BertModel`.
Twin: jax_impl/models/bert.py.

Letters: N rows, S tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import mlx.core as mx
import mlx.nn as nn

from common.errors import UserError
from mlx_impl.models.cross_encoder import CrossEncoder
from mlx_impl.models.dropout import dropout, fold_in
from mlx_impl.models.layers import Embed, LayerNorm, Linear, Rngs

Settings = TypeVar("Settings", bound=Any)  # a config dataclass

# Added to the logits of padding. Not the least float32: a kernel may scale it, and an empty row would be NaN.
MASKED = -1e9


def _gelu(x: mx.array) -> mx.array:
    """Exact GELU through erf."""
    wide = x.astype(mx.float32)
    return (0.5 * wide * (1.0 + mx.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}


def linear(inputs: int, outputs: int, *, use_bias: bool = True, dtype: mx.Dtype, rngs: Rngs) -> Linear:
    """A linear layer."""
    return Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)


def split_heads(x: mx.array, heads: int) -> mx.array:
    """[..., S, D] -> [..., H, S, K]."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)


def merge_heads(x: mx.array) -> mx.array:
    """[..., H, S, K] -> [..., S, D]."""
    x = x.swapaxes(-3, -2)  # [..., S, H, K]
    return x.reshape(*x.shape[:-2], -1)


def mask_bias(mask: mx.array) -> mx.array:
    """What a boolean mask, true where a token may be read, adds to attention logits."""
    return mx.where(mask.astype(mx.bool_), 0.0, MASKED)


def attend(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    bias: mx.array,
    rate: float,
    keys: mx.array | None,
    *,
    terms: int = 1,
) -> mx.array:
    """softmax(query key^T / sqrt(terms K) + bias) value, [N, H, S, K]; bias broadcasts to [N, H, S, S].

    `rate` and `keys` [N, 2] are the dropout of attention weights.
    """
    scale = (terms * query.shape[-1]) ** -0.5
    if keys is None or rate == 0:  # the fused kernel, which keeps no [S, S] but has no dropout
        return mx.fast.scaled_dot_product_attention(
            query, key, value, scale=scale, mask=bias.astype(value.dtype)
        )
    logits = (scale * query @ key.swapaxes(2, 3)).astype(mx.float32) + bias  # [N, H, S, S]
    weights = mx.softmax(logits, axis=-1).astype(value.dtype)
    return dropout(weights, rate, keys, site=0) @ value


def layer_keys(keys: mx.array | None, index: int) -> mx.array | None:
    """The dropout keys [N, 2] of one layer."""
    return None if keys is None else fold_in(keys, index)


def check_positions(tokens: int, limit: int) -> None:
    """UserError when a batch is longer than a table of positions: looked up all the same, it is garbage."""
    if tokens > limit:
        raise UserError(
            f"a batch is padded to {tokens} tokens, but this model has positions for {limit}: lower "
            f"data.max_query_tokens and data.max_passage_tokens, and keep data.length_buckets to {limit}."
        )


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The numbers of a BERT checkpoint's `config.json`."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Keep the keys this model knows; ValueError names a variant that it does not compute."""
        require(config, "position_embedding_type", "absolute", None)
        require(config, "is_decoder", False, None)
        return known_settings(cls, config)

    @property
    def positions(self) -> int:
        """The longest input, in tokens."""
        return self.max_position_embeddings


def known_settings(cls: type[Settings], config: Mapping[str, Any]) -> Settings:
    """The dataclass `cls` of the keys it knows, null as if absent.

    ValueError for a value of another type than its default, and for an activation or heads that cannot be.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    made = cls(**{key: value for key, value in config.items() if key in known and value is not None})
    for field in dataclasses.fields(cls):
        value, whole = getattr(made, field.name), isinstance(field.default, int)
        if whole and not isinstance(value, int):
            raise ValueError(f"{field.name} is {value!r}; a whole number is needed")
    for name in known & {"hidden_act", "hidden_activation", "pooler_hidden_act", "classifier_activation"}:
        if getattr(made, name) not in ACTIVATIONS:
            allowed = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"{name} is {getattr(made, name)!r}; allowed: {allowed}")
    width, heads = made.hidden_size, made.num_attention_heads
    if width % heads:
        raise ValueError(f"hidden_size {width} is not a multiple of {heads} heads")
    return made


def require(config: Mapping[str, Any], key: str, *allowed: object) -> None:
    """ValueError unless the setting is absent or one of `allowed`: a variant that is not computed here."""
    if key in config and config[key] not in allowed:
        values = " or ".join(repr(value) for value in allowed if value is not None)
        raise ValueError(f"{key} is {config[key]!r}; only {values} is supported. Choose another base model.")


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig, width: int, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.token_type_embeddings = Embed(config.type_vocab_size, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype)

    def __call__(self, input_ids: mx.array, token_type_ids: mx.array) -> mx.array:
        check_positions(input_ids.shape[1], self.config.positions)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # [N, S, D]
        return self.LayerNorm(x + self.position_embeddings(self.position_ids(input_ids)))

    def position_ids(self, input_ids: mx.array) -> mx.array:
        """Rows of `position_embeddings`, broadcast to [N, S]."""
        return mx.arange(input_ids.shape[1])


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = linear(width, width, dtype=dtype, rngs=rngs)
        self.key = linear(width, width, dtype=dtype, rngs=rngs)
        self.value = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: mx.array, bias: mx.array, rate: float, keys: mx.array | None) -> mx.array:
        query, key, value = (
            split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value)
        )
        return merge_heads(attend(query, key, value, bias, rate, keys))  # [N, S, D]


class BertSelfOutput(nn.Module):
    def __init__(self, width_in: int, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.dense = linear(width_in, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype)

    def __call__(
        self, x: mx.array, residual: mx.array, rate: float, keys: mx.array | None, site: int
    ) -> mx.array:
        return self.LayerNorm(residual + dropout(self.dense(x), rate, keys, site=site))


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.hidden_size, config, dtype=dtype, rngs=rngs)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.dense = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.config = config
        self.attention = BertAttention(config, dtype=dtype, rngs=rngs)
        self.intermediate = BertIntermediate(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.intermediate_size, config, dtype=dtype, rngs=rngs)

    def __call__(self, x: mx.array, bias: mx.array, keys: mx.array | None) -> mx.array:
        hidden_rate, attention_rate = (
            self.config.hidden_dropout_prob,
            self.config.attention_probs_dropout_prob,
        )
        context = self.attention.self(x, bias, attention_rate, keys)
        x = self.attention.output(context, x, hidden_rate, keys, site=1)  # [N, S, D]
        inner = ACTIVATIONS[self.config.hidden_act](self.intermediate.dense(x))
        return self.output(inner, x, hidden_rate, keys, site=2)  # [N, S, D]


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.layer = [BertLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.dense = linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: mx.array) -> mx.array:
        return mx.tanh(self.dense(hidden[:, 0]))  # [N, D]


class BertModel(nn.Module):
    """An encoder: tokens in, one vector per token out.

    Args:
      config: the checkpoint's sizes.
      dtype: of the computation; parameters stay float32.
      rngs: for fresh parameters.
    """

    def __init__(self, config: BertConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config, config.hidden_size, dtype=dtype, rngs=rngs)
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)
        self.pooler = BertPooler(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: mx.array,
        attention_mask: mx.array,
        token_type_ids: mx.array | None = None,
        keys: mx.array | None = None,
        between: mx.array | None = None,
    ) -> mx.array:
        """Hidden states [N, S, D] of the last layer.

        Args:
          input_ids: [N, S] integers.
          attention_mask: [N, S], true at real tokens.
          token_type_ids: [N, S]; segment 0 throughout when absent.
          keys: [N, 2] random keys, one a row, which turn dropout on; none in evaluation.
          between: [N, 1, S, S], added to the attention logits of every layer.
        """
        if token_type_ids is None:
            token_type_ids = mx.zeros_like(input_ids)
        x = self.embed(input_ids, token_type_ids, keys)  # [N, S, D]
        bias = mask_bias(attention_mask)[:, None, None, :]  # [N, 1, 1, S]
        if between is not None:
            bias = bias + between  # [N, 1, S, S]
        for index, layer in enumerate(self.encoder.layer):
            x = layer(x, bias, layer_keys(keys, index))
        return x

    def embed(self, input_ids: mx.array, token_type_ids: mx.array, keys: mx.array | None) -> mx.array:
        """What the first layer reads, [N, S, D]."""
        x = self.embeddings(input_ids, token_type_ids)
        return dropout(x, self.config.hidden_dropout_prob, keys, site=3)


class BertCrossEncoder(CrossEncoder):
    """transformers' `BertForSequenceClassification`, of one label, with the resonance head.

    Args:
      config: the checkpoint's sizes.
      dtype: of the encoder's computation.
      rngs: for fresh parameters.
      head: of CrossEncoder.
    """

    def __init__(self, config: BertConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs, **head: Any) -> None:
        super().__init__(config.hidden_size, rngs=rngs, **head)
        self.bert = BertModel(config, dtype=dtype, rngs=rngs)
        self.classifier = Linear(config.hidden_size, 1, rngs=rngs)

    @property
    def encoder(self) -> BertModel:
        return self.bert

    @property
    def output(self) -> Linear:
        return self.classifier

    def pooled(self, hidden: mx.array, mask: mx.array) -> mx.array:
        return self.bert.pooler(hidden)
