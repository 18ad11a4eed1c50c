"""The BERT family of encoders (BERT, MiniLM): attribute paths are the Hugging Face checkpoint's keys.

Source: Devlin et al. 2019, arXiv:1810.04805; names after transformers' `BertModel`.
Twin: mlx_impl/models/bert.py.

Letters: N rows, S tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from jax_impl.models.dropout import dropout


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


def linear(inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer over `product`."""
    return nnx.Linear(inputs, outputs, dot_general=_dot_general, dtype=dtype, rngs=rngs)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **_: Any) -> jax.Array:
    return product(x, kernel)


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


class BertEmbeddings(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, width, dtype=dtype, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        tokens, limit = input_ids.shape[1], self.position_embeddings.num_embeddings
        if tokens > limit:  # looked up all the same, it would be NaN
            raise UserError(
                f"a batch is padded to {tokens} tokens, but this model has positions for {limit}: lower "
                f"data.max_query_tokens and data.max_passage_tokens, and keep data.length_buckets to {limit}."
            )
        positions = jnp.arange(tokens)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # [N, S, D]
        return self.LayerNorm(x + self.position_embeddings(positions))


class BertSelfAttention(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = linear(width, width, dtype=dtype, rngs=rngs)
        self.key = linear(width, width, dtype=dtype, rngs=rngs)
        self.value = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
        rows, tokens, width = x.shape

        def split(y: jax.Array) -> jax.Array:  # heads before tokens: on CPU seven times faster than after
            return y.reshape(rows, tokens, self.heads, -1).swapaxes(1, 2)  # [N, H, S, K]

        query = split(self.query(x) * (width // self.heads) ** -0.5)
        key, value = split(self.key(x)), split(self.value(x))
        logits = product(query, key.swapaxes(2, 3)).astype(jnp.float32) + bias  # [N, H, S, S]
        # A softmax divided after the value product: no pass over [S, S] to normalise, forth or back.
        powers = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
        total = powers.sum(axis=-1, keepdims=True)  # [N, H, S, 1]
        weights = dropout(powers.astype(x.dtype), rate, keys, site=0)
        context = (product(weights, value) / total).astype(x.dtype)
        return context.swapaxes(1, 2).reshape(rows, tokens, width)  # [N, S, D]


class BertSelfOutput(nnx.Module):
    def __init__(self, width_in: int, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.dense = linear(width_in, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, residual: jax.Array, rate: float, keys: jax.Array | None, site: int
    ) -> jax.Array:
        return self.LayerNorm(residual + dropout(self.dense(x), rate, keys, site=site))


class BertAttention(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.self = BertSelfAttention(config, dtype=dtype, rngs=rngs)
        self.output = BertSelfOutput(config.hidden_size, config, dtype=dtype, rngs=rngs)


class BertIntermediate(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.dense = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)


class BertLayer(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
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
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List(
            [BertLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )


class BertPooler(nnx.Module):
    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
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

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = BertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)
        self.pooler = BertPooler(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [N, S, D] of the last layer.

        Args:
          input_ids: [N, S] integers.
          attention_mask: [N, S], true at real tokens.
          token_type_ids: [N, S]; segment 0 throughout when absent.
          keys: [N] random keys, one a row, which turn dropout on; none in evaluation.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        x = self.embeddings(input_ids, token_type_ids)  # [N, S, D]
        x = dropout(x, self.config.hidden_dropout_prob, keys, site=3)
        bias = jnp.where(attention_mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        for index, layer in enumerate(self.encoder.layer):
            layer_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            x = layer(x, bias, layer_keys)
        return x
