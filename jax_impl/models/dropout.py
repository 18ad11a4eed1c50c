"""Dropout whose mask depends on a row's own key alone, so that no batch layout or device count changes it.

Source: Srivastava et al. 2014; the integer hash is `lowbias32` of Chris Wellons' hash-prospector.
Twin: mlx_impl/models/dropout.py.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def row_keys(key: jax.Array, rows: int, first_row: int | jax.Array = 0) -> jax.Array:
    """One key [rows] for each global row of a step: `key` folded with the row's index in the global batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """Zero elements of x [N, ...] with probability `rate` and scale the rest; identity without keys.

    Args:
      x: any shape, rows first.
      rate: in [0, 1).
      keys: [N] keys from `row_keys`, or None in evaluation.
      site: which of the places that share `keys` this is.
    """
    if keys is None or rate == 0:
        return x
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, site)
    # A hash of key and position, fused into the product: jax.random.bits costs a fifth of a step on CPU.
    words = jax.random.key_data(keys).reshape(-1, 2, *[1] * (x.ndim - 1))
    position = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
    bits = _mixed(_mixed(position + words[:, 0]) ^ words[:, 1])
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), x * (1 / (1 - rate)), 0).astype(x.dtype)


def gaussian(shape: tuple[int, ...], keys: jax.Array, site: int) -> jax.Array:
    """Standard normal float32 of `shape` [N, ...], a row from its own key of `keys` [N] (Box-Muller)."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, site)
    words = jax.random.key_data(keys).reshape(-1, 2, *[1] * (len(shape) - 1))
    position = jnp.arange(math.prod(shape[1:]), dtype=jnp.uint32).reshape(shape[1:])
    first = _mixed(_mixed(position + words[:, 0]) ^ words[:, 1])
    second = _mixed(first ^ words[:, 0])
    radius, turn = (((bits >> 8).astype(jnp.float32) + 0.5) * 2.0**-24 for bits in (first, second))
    return jnp.sqrt(-2.0 * jnp.log(radius)) * jnp.cos(2.0 * math.pi * turn)


def _mixed(x: jax.Array) -> jax.Array:
    """A hash of uint32 to uint32 in which every bit of x moves every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
