"""The bi-encoder: a text alone to a unit vector by mean pooling, for the dense first stage.

Source: Reimers and Gurevych 2019, arXiv:1908.10084. Twin: mlx_impl/models/bi_encoder.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl.models.cross_encoder import mean_of

EPSILON = 1e-12


class BiEncoder(nnx.Module):
    """`encoder`: of any family, (input_ids, attention_mask) -> hidden [N, S, D]."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Unit vectors [N, D], float32, of input_ids [N, S] under attention_mask [N, S]."""
        pooled = mean_of(self.encoder(input_ids, attention_mask), attention_mask)
        return pooled / jnp.sqrt(jnp.sum(pooled**2, axis=-1, keepdims=True) + EPSILON)
