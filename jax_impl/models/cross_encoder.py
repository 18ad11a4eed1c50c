"""The cross-encoder: query and passage encoded together, scored by [CLS] and by their states' resonance.

s = u.h_CLS + gamma r + b, with r = Re<psi_q|psi_d> of the projected means of the two sides; beside it the
portable score classifier.h_CLS, which other libraries load. Source: DESIGN section 3.
Twin: mlx_impl/models/cross_encoder.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.text import PASSAGE, QUERY
from jax_impl.models.projector import Projector, State, resonance


class PairOutput(NamedTuple):
    """What a cross-encoder says of N pairs; all float32."""

    score: jax.Array  # [N] the full score s
    portable: jax.Array  # [N] classifier.h_CLS
    resonance: jax.Array  # [N] r in [-1, 1]
    query: State  # (re, im) each [N, C]
    passage: State  # (re, im) each [N, C]


class ResonanceHead(nnx.Module):
    """What the full score has beside the encoder: `projector`, u [D], gamma [] and b []."""

    def __init__(self, hidden_size: int, state_size: int, parameterisation: str, *, rngs: nnx.Rngs) -> None:
        self.projector = Projector(hidden_size, state_size, parameterisation=parameterisation, rngs=rngs)
        self.u = nnx.Param(jnp.zeros(hidden_size))
        self.gamma = nnx.Param(jnp.zeros(()))
        self.b = nnx.Param(jnp.zeros(()))


class CrossEncoder(nnx.Module):
    """An encoder with its family's portable head and the `resonance` head.

    A family's class (`BertCrossEncoder`) holds encoder and portable head under the names of transformers'
    `...ForSequenceClassification`, and says what `pooled` is and which layer is the `output`.

    Args:
      hidden_size: width D of the encoder.
      state_size: complex amplitudes C of a state.
      parameterisation: of the projector, cartesian or polar.
      passage_segment: segment id of the passage's tokens; the query's is 0.
      rngs: for fresh parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int,
        parameterisation: str = "cartesian",
        passage_segment: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.passage_segment = passage_segment
        self.resonance = ResonanceHead(hidden_size, state_size, parameterisation, rngs=rngs)

    @property
    def encoder(self) -> Any:
        """The family's encoder: (input_ids, attention_mask, token_type_ids, keys) -> hidden [N, S, D]."""
        raise NotImplementedError

    @property
    def output(self) -> nnx.Linear:
        """The last layer of the portable head, from `pooled` to one score."""
        raise NotImplementedError

    def pooled(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """h_CLS [N, D], which u and `output` read, of hidden [N, S, D] under mask [N, S]."""
        raise NotImplementedError

    def __call__(self, input_ids: jax.Array, sides: jax.Array, keys: jax.Array | None = None) -> PairOutput:
        """Score pairs.

        Args:
          input_ids: [N, S] integers.
          sides: [N, S], 0 padding, 1 the query's side, 2 the passage's; special tokens count with their side.
          keys: [N] random keys for dropout, none in evaluation.
        """
        segments = self.passage_segment * (sides == PASSAGE).astype(jnp.int32)
        hidden = self.encoder(input_ids, sides > 0, segments, keys)  # [N, S, D]
        query = self.resonance.projector(mean_of(hidden, sides == QUERY))
        passage = self.resonance.projector(mean_of(hidden, sides == PASSAGE))
        r = resonance(query, passage)  # [N]
        pooled = self.pooled(hidden, sides > 0)  # [N, D]
        portable = self.output(pooled)[:, 0].astype(jnp.float32)
        linear = pooled.astype(jnp.float32) @ self.resonance.u[...]
        score = linear + self.resonance.gamma[...] * r + self.resonance.b[...]
        return PairOutput(score, portable, r, query, passage)


def mean_of(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of hidden [N, S, D] over mask [N, S] in float32 -> [N, D]; zero where the mask is empty."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("nsd,ns->nd", hidden.astype(jnp.float32), weights)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
