"""RoBERTa and XLM-R: BERT whose positions begin after the padding token's id, without segments of use.

Source: Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2020, arXiv:1911.02116; names after transformers'
`RobertaForSequenceClassification`. Twin: mlx_impl/models/roberta.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_impl.models.bert import BertConfig, BertEmbeddings, BertEncoder, BertModel, linear
from jax_impl.models.cross_encoder import CrossEncoder


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The numbers of a RoBERTa or XLM-R checkpoint's `config.json`."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    pad_token_id: int = 1

    @property
    def positions(self) -> int:
        """The longest input, in tokens: the first rows of the table belong to padding."""
        return self.max_position_embeddings - self.pad_token_id - 1


class RobertaEmbeddings(BertEmbeddings):
    config: RobertaConfig

    def position_ids(self, input_ids: jax.Array) -> jax.Array:
        """Rows of `position_embeddings` [N, S]: padding_idx at padding, real tokens count on from there."""
        real = (input_ids != self.config.pad_token_id).astype(jnp.int32)
        return real.cumsum(axis=1) * real + self.config.pad_token_id


class RobertaModel(BertModel):
    """The encoder: BertModel with RoBERTa's positions and no pooler."""

    def __init__(self, config: RobertaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = RobertaEmbeddings(config, config.hidden_size, dtype=dtype, rngs=rngs)
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)


class RobertaClassificationHead(nnx.Module):
    """A dense layer with an activation on the first token, then one score."""

    def __init__(
        self,
        hidden_size: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        self.dense = linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(hidden_size, 1, rngs=rngs)

    def pooled(self, hidden: jax.Array) -> jax.Array:
        return self.activation(self.dense(hidden[:, 0]))  # [N, D]


class RobertaCrossEncoder(CrossEncoder):
    """transformers' `RobertaForSequenceClassification`, of one label, with the resonance head.

    Arguments as BertCrossEncoder.
    """

    def __init__(
        self, config: RobertaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **head: Any
    ) -> None:
        self.roberta = RobertaModel(config, dtype=dtype, rngs=rngs)
        self.classifier = RobertaClassificationHead(config.hidden_size, jnp.tanh, dtype=dtype, rngs=rngs)
        super().__init__(config.hidden_size, rngs=rngs, **head)

    @property
    def encoder(self) -> RobertaModel:
        return self.roberta

    @property
    def output(self) -> nnx.Linear:
        return self.classifier.out_proj

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return self.classifier.pooled(hidden)
