"""The BERT family of encoders (BERT, MiniLM): attribute paths are the Hugging Face checkpoint's keys.

Source: Devlin et al. 2019, arXiv:1810.04805; names after transformers' `BertModel`.
Twin: mlx_impl/models/bert.py.

Letters: N rows, S tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.errors import UserError
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.dropout import dropout

Settings = TypeVar("Settings", bound=Any)  # a config dataclass


@jax.checkpoint
def _gelu(x: jax.Array) -> jax.Array:
    """Exact GELU through erf: on CPU a third of the time of jax.nn.gelu, which takes erfc."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@jax.custom_vjp
def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [..., S, D] @ y, either one matrix [D, F] or one for each [..., D, F].

    Its gradient is written for XLA's CPU, which else copies transposed activations or runs on one core.
    """
    return x @ y


def _product_forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ y, (x, y)


def _product_backward(saved: tuple[jax.Array, jax.Array], dz: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = saved
    dx = dz @ y.swapaxes(-1, -2)
    if y.ndim == 2:
        return dx, x.reshape(-1, x.shape[-1]).T @ dz.reshape(-1, dz.shape[-1])
    # x^T dz with the narrower side transposed; without the barriers XLA turns it back.
    as_written = jax.lax.optimization_barrier
    if x.shape[-1] <= dz.shape[-1]:
        return dx, as_written(as_written(x.swapaxes(-1, -2)) @ dz)
    return dx, as_written(as_written(dz.swapaxes(-1, -2)) @ x).swapaxes(-1, -2)


product.defvjp(_product_forward, _product_backward)


def linear(
    inputs: int, outputs: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer over `product`."""
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dot_general=_dot_general, dtype=dtype, rngs=rngs)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **_: Any) -> jax.Array:
    return product(x, kernel)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[..., S, D] -> [..., H, S, K]: heads before tokens, on CPU seven times faster than after."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., H, S, K] -> [..., S, D]."""
    x = x.swapaxes(-3, -2)  # [..., S, H, K]
    return x.reshape(*x.shape[:-2], -1)


def mask_bias(mask: jax.Array) -> jax.Array:
    """What a boolean mask, true where a token may be read, adds to attention logits."""
    return jnp.where(mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    rate: float,
    keys: jax.Array | None,
    *,
    terms: int = 1,
) -> jax.Array:
    """softmax(query key^T / sqrt(terms K) + bias) value, [N, H, S, K]; bias broadcasts to [N, H, S, S].

    `rate` and `keys` [N] are the dropout of attention weights.
    """
    query = query * (terms * query.shape[-1]) ** -0.5
    logits = product(query, key.swapaxes(2, 3)).astype(jnp.float32) + bias  # [N, H, S, S]
    # A softmax divided after the value product: no pass over [S, S] to normalise, forth or back.
    powers = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = powers.sum(axis=-1, keepdims=True)  # [N, H, S, 1]
    weights = dropout(powers.astype(value.dtype), rate, keys, site=0)
    return (product(weights, value) / total).astype(value.dtype)


def layer_keys(keys: jax.Array | None, index: int) -> jax.Array | None:
    """The dropout keys [N] of one layer."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def check_positions(tokens: int, limit: int) -> None:
    """UserError when a batch is longer than a table of positions: looked up all the same, it is NaN."""
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


class BertEmbeddings(nnx.Module):
    def __init__(self, config: BertConfig, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.word_embeddings = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        check_positions(input_ids.shape[1], self.config.positions)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # [N, S, D]
        return self.LayerNorm(x + self.position_embeddings(self.position_ids(input_ids)))

    def position_ids(self, input_ids: jax.Array) -> jax.Array:
        """Rows of `position_embeddings`, broadcast to [N, S]."""
        return jnp.arange(input_ids.shape[1])


class BertSelfAttention(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = linear(width, width, dtype=dtype, rngs=rngs)
        self.key = linear(width, width, dtype=dtype, rngs=rngs)
        self.value = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
        query, key, value = (
            split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value)
        )
        return merge_heads(attend(query, key, value, bias, rate, keys))  # [N, S, D]


class BertSelfOutput(nnx.Module):
    def __init__(self, width_in: int, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dense = linear(width_in, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, residual: jax.Array, rate: float, keys: jax.Array | None, site: int
    ) -> jax.Array:
        return self.LayerNorm(residual + dropout(self.dense(x), rate, keys, site=site))


class BertAttention(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.self = BertSelfAttention(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.hidden_size, config, dtype=dtype, rngs=rngs)


class BertIntermediate(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dense = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)


class BertLayer(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention = BertAttention(config, dtype=dtype, rngs=rngs)
        self.intermediate = BertIntermediate(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.intermediate_size, config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keys: jax.Array | None) -> jax.Array:
        hidden_rate, attention_rate = (
            self.config.hidden_dropout_prob,
            self.config.attention_probs_dropout_prob,
        )
        context = self.attention.self(x, bias, attention_rate, keys)
        x = self.attention.output(context, x, hidden_rate, keys, site=1)  # [N, S, D]
        inner = ACTIVATIONS[self.config.hidden_act](self.intermediate.dense(x))
        return self.output(inner, x, hidden_rate, keys, site=2)  # [N, S, D]


class BertEncoder(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List(
            [BertLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )


class BertPooler(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dense = linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(hidden[:, 0]))  # [N, D]


class BertModel(nnx.Module):
    """An encoder: tokens in, one vector per token out.

    Args:
      config: the checkpoint's sizes.
      dtype: of the computation; parameters stay float32.
      rngs: for fresh parameters.
    """

    def __init__(self, config: BertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = BertEmbeddings(config, config.hidden_size, dtype=dtype, rngs=rngs)
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)
        self.pooler = BertPooler(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        keys: jax.Array | None = None,
        between: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [N, S, D] of the last layer.

        Args:
          input_ids: [N, S] integers.
          attention_mask: [N, S], true at real tokens.
          token_type_ids: [N, S]; segment 0 throughout when absent.
          keys: [N] random keys, one a row, which turn dropout on; none in evaluation.
          between: [N, 1, S, S], added to the attention logits of every layer.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        x = self.embed(input_ids, token_type_ids, keys)  # [N, S, D]
        bias = mask_bias(attention_mask)[:, None, None, :]  # [N, 1, 1, S]
        if between is not None:
            bias = bias + between  # [N, 1, S, S]
        for index, layer in enumerate(self.encoder.layer):
            x = layer(x, bias, layer_keys(keys, index))
        return x

    def embed(self, input_ids: jax.Array, token_type_ids: jax.Array, keys: jax.Array | None) -> jax.Array:
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

    def __init__(
        self, config: BertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **head: Any
    ) -> None:
        self.bert = BertModel(config, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, 1, rngs=rngs)
        super().__init__(config.hidden_size, rngs=rngs, **head)

    @property
    def encoder(self) -> BertModel:
        return self.bert

    @property
    def output(self) -> nnx.Linear:
        return self.classifier

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return self.bert.pooler(hidden)
