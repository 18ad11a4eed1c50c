"""Dropout whose mask depends on a row's own key alone, so that no batch layout or device count changes it.

Source: Srivastava et al. 2014. Twin: mlx_impl/models/dropout.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LEVELS = 2**8  # a mask is drawn from 8 random bits: a quarter of the cost of 32 on CPU


def row_keys(key: jax.Array, rows: int, first_row: int | jax.Array = 0) -> jax.Array:
    """One key [rows] for each global row of a step: `key` folded with the row's index in the global batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """Zero elements of x [N, ...] with probability `rate` and scale the rest; identity without keys.

    Args:
      x: any shape, rows first.
      rate: in [0, 1), rounded to a multiple of 1/256; the scale uses the rounded rate, so the mean is kept.
      keys: [N] keys from `row_keys`, or None in evaluation.
      site: which of the places that share `keys` this is.
    """
    dropped = round(rate * LEVELS)
    if keys is None or dropped == 0:
        return x
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, site)
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint8))(keys)
    return jnp.where(bits >= dropped, x * (LEVELS / (LEVELS - dropped)), 0).astype(x.dtype)
