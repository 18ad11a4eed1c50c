"""ELECTRA: BERT with embeddings of their own width, and GELU in the head.

Source: Clark et al. 2020, arXiv:2003.10555; names after transformers' `ElectraForSequenceClassification`.
Twin: jax_impl/models/electra.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.models.bert import ACTIVATIONS, BertConfig, BertEmbeddings, BertEncoder, BertModel, linear
from mlx_impl.models.cross_encoder import CrossEncoder
from mlx_impl.models.layers import Linear, Rngs
from mlx_impl.models.roberta import RobertaClassificationHead


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

    def __init__(self, config: ElectraConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs) -> None:
        nn.Module.__init__(self)  # BertModel's own would add a pooler
        self.config = config
        self.embeddings = BertEmbeddings(config, config.embedding_size, dtype=dtype, rngs=rngs)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = linear(
                config.embedding_size, config.hidden_size, dtype=dtype, rngs=rngs
            )
        self.encoder = BertEncoder(config, dtype=dtype, rngs=rngs)

    def embed(self, input_ids: mx.array, token_type_ids: mx.array, keys: mx.array | None) -> mx.array:
        x = super().embed(input_ids, token_type_ids, keys)  # [N, S, embedding_size]
        return x if self.config.embedding_size == self.config.hidden_size else self.embeddings_project(x)


class ElectraCrossEncoder(CrossEncoder):
    """transformers' `ElectraForSequenceClassification`, of one label, with the resonance head.

    Arguments as BertCrossEncoder.
    """

    def __init__(
        self, config: ElectraConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs, **head: Any
    ) -> None:
        super().__init__(config.hidden_size, rngs=rngs, **head)
        self.electra = ElectraModel(config, dtype=dtype, rngs=rngs)
        self.classifier = RobertaClassificationHead(
            config.hidden_size, ACTIVATIONS["gelu"], dtype=dtype, rngs=rngs
        )

    @property
    def encoder(self) -> ElectraModel:
        return self.electra

    @property
    def output(self) -> Linear:
        return self.classifier.out_proj

    def pooled(self, hidden: mx.array, mask: mx.array) -> mx.array:
        return self.classifier.pooled(hidden)
