"""The cross-encoder: query and passage encoded together, scored by [CLS] and by their states' resonance.

s = u.h_CLS + gamma r + b, with r = Re<psi_q|psi_d> of the projected means of the two sides, or what another
head puts in its place; beside it the portable score classifier.h_CLS, which other libraries load.
Source: DESIGN section 3.
Twin: mlx_impl/models/cross_encoder.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.text import PASSAGE, QUERY
from jax_impl.models.heads import HEADS
from jax_impl.models.projector import Projector, State

CLOSED = 1e-9  # a weight that nobody notices in float32, and whose logarithm is finite


class PairOutput(NamedTuple):
    """What a cross-encoder says of N pairs; all float32."""

    score: jax.Array  # [N] the full score s
    portable: jax.Array  # [N] classifier.h_CLS
    resonance: jax.Array  # [N] r in [-1, 1], or the number of another head
    query: State  # (re, im) each [N, C]
    passage: State  # (re, im) each [N, C]


class ResonanceHead(nnx.Module):
    """What the full score has beside the encoder: `projector`, `compare`, u [D], gamma [] and b [].

    `compare` is the head's function of both states to the number that gamma multiplies.
    """

    def __init__(
        self, hidden_size: int, state_size: int, parameterisation: str, head: str, *, rngs: nnx.Rngs
    ) -> None:
        changes, compare = HEADS[head]
        settings = {"parameterisation": parameterisation} | changes
        self.projector = Projector(hidden_size, state_size, **settings, rngs=rngs)
        self.compare = compare()
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
      head: a name of HEADS.
      passage_segment: segment id of the passage's tokens; the query's is 0.
      rngs: for fresh parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int,
        parameterisation: str = "cartesian",
        head: str = "resonance",
        passage_segment: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.passage_segment = passage_segment
        self.resonance = ResonanceHead(hidden_size, state_size, parameterisation, head, rngs=rngs)

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

    def __call__(
        self,
        input_ids: jax.Array,
        sides: jax.Array,
        keys: jax.Array | None = None,
        openness: jax.Array | float | None = None,
    ) -> PairOutput:
        """Score pairs.

        Args:
          input_ids: [N, S] integers.
          sides: [N, S], 0 padding, 1 the query's side, 2 the passage's; special tokens count with their side.
          keys: [N] random keys for dropout, none in evaluation.
          openness: [] in [0, 1], of attention between the two sides, in training; open when absent.
        """
        segments = self.passage_segment * (sides == PASSAGE).astype(jnp.int32)
        between = () if openness is None else (between_sides(sides, openness),)
        hidden = self.encoder(input_ids, sides > 0, segments, keys, *between)  # [N, S, D]
        query = self.resonance.projector(mean_of(hidden, sides == QUERY))
        passage = self.resonance.projector(mean_of(hidden, sides == PASSAGE))
        r = self.resonance.compare(query, passage)  # [N]
        pooled = self.pooled(hidden, sides > 0)  # [N, D]
        portable = self.output(pooled)[:, 0].astype(jnp.float32)
        linear = pooled.astype(jnp.float32) @ self.resonance.u[...]
        score = linear + self.resonance.gamma[...] * r + self.resonance.b[...]
        return PairOutput(score, portable, r, query, passage)


def between_sides(sides: jax.Array, openness: jax.Array | float) -> jax.Array:
    """What is added to attention logits [N, 1, S, S], so that a token of the other side weighs `openness` []
    times what it would: log openness, where two of sides [N, S] differ."""
    other = sides[:, :, None] != sides[:, None, :]  # [N, S, S]
    return jnp.where(other, jnp.log(jnp.maximum(openness, CLOSED)), 0.0)[:, None]


def mean_of(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of hidden [N, S, D] over mask [N, S] in float32 -> [N, D]; zero where the mask is empty."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("nsd,ns->nd", hidden.astype(jnp.float32), weights)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
