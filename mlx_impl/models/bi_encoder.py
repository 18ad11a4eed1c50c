"""The bi-encoder: a text alone to a unit vector by mean pooling, for the dense first stage.

Source: Reimers and Gurevych 2019, arXiv:1908.10084. Twin: jax_impl/models/bi_encoder.py.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.models.cross_encoder import mean_of

EPSILON = 1e-12


class BiEncoder(nn.Module):
    """`encoder`: of any family, (input_ids, attention_mask) -> hidden [N, S, D]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def __call__(self, input_ids: mx.array, attention_mask: mx.array) -> mx.array:
        """Unit vectors [N, D], float32, of input_ids [N, S] under attention_mask [N, S]."""
        pooled = mean_of(self.encoder(input_ids, attention_mask), attention_mask)
        return pooled / mx.sqrt(mx.sum(pooled**2, axis=-1, keepdims=True) + EPSILON)
