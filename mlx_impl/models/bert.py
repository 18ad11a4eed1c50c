"""The BERT family of encoders (BERT, MiniLM): attribute paths are the Hugging Face checkpoint's keys.

Source: Devlin et al. 2019, arXiv:1810.04805; names after transformers' `BertModel`.
Twin: jax_impl/models/bert.py.

Letters: N rows, S tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.errors import UserError
from mlx_impl.models.dropout import dropout, fold_in
from mlx_impl.models.layers import Embed, LayerNorm, Linear, Rngs

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


def linear(inputs: int, outputs: int, *, dtype: mx.Dtype, rngs: Rngs) -> Linear:
    """A linear layer."""
    return Linear(inputs, outputs, dtype=dtype, rngs=rngs)


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
    def from_dict(cls, config: dict[str, Any]) -> BertConfig:
        """Keep the keys this model knows; `hidden_act` must be one of ACTIVATIONS (ValueError)."""
        known = {field.name for field in dataclasses.fields(cls)}
        made = cls(**{key: value for key, value in config.items() if key in known})
        if made.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {made.hidden_act!r}; allowed: {', '.join(sorted(ACTIVATIONS))}")
        if made.hidden_size % made.num_attention_heads:
            raise ValueError(
                f"hidden_size {made.hidden_size} is not a multiple of {made.num_attention_heads} heads"
            )
        return made


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.token_type_embeddings = Embed(config.type_vocab_size, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype)

    def __call__(self, input_ids: mx.array, token_type_ids: mx.array) -> mx.array:
        tokens, limit = input_ids.shape[1], self.position_embeddings.num_embeddings
        if tokens > limit:  # looked up all the same, it would be garbage
            raise UserError(
                f"a batch is padded to {tokens} tokens, but this model has positions for {limit}: lower "
                f"data.max_query_tokens and data.max_passage_tokens, and keep data.length_buckets to {limit}."
            )
        positions = mx.arange(tokens)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # [N, S, D]
        return self.LayerNorm(x + self.position_embeddings(positions))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = linear(width, width, dtype=dtype, rngs=rngs)
        self.key = linear(width, width, dtype=dtype, rngs=rngs)
        self.value = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: mx.array, bias: mx.array, rate: float, keys: mx.array | None) -> mx.array:
        rows, tokens, width = x.shape

        def split(y: mx.array) -> mx.array:
            return y.reshape(rows, tokens, self.heads, -1).swapaxes(1, 2)  # [N, H, S, K]

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scale = (width // self.heads) ** -0.5
        if keys is None or rate == 0:  # the fused kernel, which keeps no [S, S] but has no dropout
            context = mx.fast.scaled_dot_product_attention(
                query, key, value, scale=scale, mask=bias.astype(x.dtype)
            )
        else:
            logits = (scale * query @ key.swapaxes(2, 3)).astype(mx.float32) + bias  # [N, H, S, S]
            weights = mx.softmax(logits, axis=-1).astype(x.dtype)
            context = dropout(weights, rate, keys, site=0) @ value
        return context.swapaxes(1, 2).reshape(rows, tokens, width)  # [N, S, D]


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
        self.embeddings = BertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)
        self.pooler = BertPooler(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: mx.array,
        attention_mask: mx.array,
        token_type_ids: mx.array | None = None,
        keys: mx.array | None = None,
    ) -> mx.array:
        """Hidden states [N, S, D] of the last layer.

        Args:
          input_ids: [N, S] integers.
          attention_mask: [N, S], true at real tokens.
          token_type_ids: [N, S]; segment 0 throughout when absent.
          keys: [N, 2] random keys, one a row, which turn dropout on; none in evaluation.
        """
        if token_type_ids is None:
            token_type_ids = mx.zeros_like(input_ids)
        x = self.embeddings(input_ids, token_type_ids)  # [N, S, D]
        x = dropout(x, self.config.hidden_dropout_prob, keys, site=3)
        bias = mx.where(attention_mask, 0.0, MASKED)[:, None, None, :]
        for index, layer in enumerate(self.encoder.layer):
            layer_keys = None if keys is None else fold_in(keys, index)
            x = layer(x, bias, layer_keys)
        return x
