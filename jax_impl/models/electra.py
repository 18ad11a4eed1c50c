"""ELECTRA: BERT with embeddings of their own width, and GELU in the head.

Source: Clark et al. 2020, arXiv:2003.10555; names after transformers' `ElectraForSequenceClassification`.
Twin: mlx_impl/models/electra.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_impl.models.bert import ACTIVATIONS, BertConfig, BertEmbeddings, BertEncoder, BertModel, linear
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.roberta import RobertaClassificationHead


@dataclasses.dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """The numbers of an ELECTRA checkpoint's `config.json`."""

    hidden_size: int = 256
    embedding_size: int = 128
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 1024


class ElectraModel(BertModel):
    """The encoder: BertModel without pooler, its embeddings projected where they are of another width."""

    config: ElectraConfig

    def __init__(self, config: ElectraConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embeddings = BertEmbeddings(config, config.embedding_size, dtype=dtype, rngs=rngs)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = linear(
                config.embedding_size, config.hidden_size, dtype=dtype, rngs=rngs
            )
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)

    def embed(self, input_ids: jax.Array, token_type_ids: jax.Array, keys: jax.Array | None) -> jax.Array:
        x = super().embed(input_ids, token_type_ids, keys)  # [N, S, embedding_size]
        return x if self.config.embedding_size == self.config.hidden_size else self.embeddings_project(x)


class ElectraCrossEncoder(CrossEncoder):
    """transformers' `ElectraForSequenceClassification`, of one label, with the resonance head.

    Arguments as BertCrossEncoder.
    """

    def __init__(
        self, config: ElectraConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **head: Any
    ) -> None:
        self.electra = ElectraModel(config, dtype=dtype, rngs=rngs)
        self.classifier = RobertaClassificationHead(
            config.hidden_size, ACTIVATIONS["gelu"], dtype=dtype, rngs=rngs
        )
        super().__init__(config.hidden_size, rngs=rngs, **head)

    @property
    def encoder(self) -> ElectraModel:
        return self.electra

    @property
    def output(self) -> nnx.Linear:
        return self.classifier.out_proj

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return self.classifier.pooled(hidden)
