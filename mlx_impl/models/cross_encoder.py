"""The cross-encoder: query and passage encoded together, scored by [CLS] and by their states' resonance.

s = u.h_CLS + gamma r + b, with r = Re<psi_q|psi_d> of the projected means of the two sides; beside it the
portable score classifier.h_CLS, which other libraries load. Source: DESIGN section 3.
Twin: jax_impl/models/cross_encoder.py.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from common.text import PASSAGE, QUERY
from mlx_impl.models.bert import BertConfig, BertModel
from mlx_impl.models.layers import Linear, Rngs
from mlx_impl.models.projector import Projector, State, resonance


class PairOutput(NamedTuple):
    """What a cross-encoder says of N pairs; all float32."""

    score: mx.array  # [N] the full score s
    portable: mx.array  # [N] classifier.h_CLS
    resonance: mx.array  # [N] r in [-1, 1]
    query: State  # (re, im) each [N, C]
    passage: State  # (re, im) each [N, C]


class ResonanceHead(nn.Module):
    """What the full score has beside the encoder: `projector`, u [D], gamma [] and b []."""

    def __init__(self, hidden_size: int, state_size: int, parameterisation: str, *, rngs: Rngs) -> None:
        super().__init__()
        self.projector = Projector(hidden_size, state_size, parameterisation=parameterisation, rngs=rngs)
        self.u = mx.zeros(hidden_size)
        self.gamma = mx.zeros(())
        self.b = mx.zeros(())


class CrossEncoder(nn.Module):
    """A BERT encoder with the portable `classifier` and the `resonance` head.

    Args:
      config: the encoder's sizes.
      state_size: complex amplitudes C of a state.
      parameterisation: of the projector, cartesian or polar.
      passage_segment: segment id of the passage's tokens; the query's is 0.
      dtype: of the encoder's computation.
      rngs: for fresh parameters.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        state_size: int,
        parameterisation: str = "cartesian",
        passage_segment: int = 0,
        dtype: mx.Dtype = mx.float32,
        rngs: Rngs,
    ) -> None:
        super().__init__()
        self.passage_segment = passage_segment
        self.bert = BertModel(config, dtype=dtype, rngs=rngs)
        self.classifier = Linear(config.hidden_size, 1, rngs=rngs)
        self.resonance = ResonanceHead(config.hidden_size, state_size, parameterisation, rngs=rngs)

    def __call__(self, input_ids: mx.array, sides: mx.array, keys: mx.array | None = None) -> PairOutput:
        """Score pairs.

        Args:
          input_ids: [N, S] integers.
          sides: [N, S], 0 padding, 1 the query's side, 2 the passage's; special tokens count with their side.
          keys: [N, 2] random keys for dropout, none in evaluation.
        """
        segments = self.passage_segment * (sides == PASSAGE).astype(mx.int32)
        hidden = self.bert(input_ids, sides > 0, segments, keys)  # [N, S, D]
        query = self.resonance.projector(mean_of(hidden, sides == QUERY))
        passage = self.resonance.projector(mean_of(hidden, sides == PASSAGE))
        r = resonance(query, passage)  # [N]
        pooled = self.bert.pooler(hidden)  # [N, D]
        portable = self.classifier(pooled)[:, 0].astype(mx.float32)
        linear = pooled.astype(mx.float32) @ self.resonance.u
        score = linear + self.resonance.gamma * r + self.resonance.b
        return PairOutput(score, portable, r, query, passage)


def mean_of(hidden: mx.array, mask: mx.array) -> mx.array:
    """Mean of hidden [N, S, D] over mask [N, S] in float32 -> [N, D]; zero where the mask is empty."""
    weights = mask.astype(mx.float32)
    total = mx.einsum("nsd,ns->nd", hidden.astype(mx.float32), weights)
    return total / mx.maximum(weights.sum(axis=1, keepdims=True), 1.0)
