"""Dropout whose mask depends on a row's own key alone, so that no batch layout or device count changes it.

Source: Srivastava et al. 2014; the integer hash is `lowbias32` of Chris Wellons' hash-prospector; Threefry is
Salmon et al. 2011. Masks are those of the twin, bit for bit. Twin: jax_impl/models/dropout.py.
"""

from __future__ import annotations

import math

import mlx.core as mx


def row_keys(key: mx.array, rows: int, first_row: int | mx.array = 0) -> mx.array:
    """One key [rows, 2] for each global row of a step: `key` folded with its index in the global batch."""
    return fold_in(mx.broadcast_to(key, (rows, 2)), first_row + mx.arange(rows, dtype=mx.uint32))


def dropout(x: mx.array, rate: float, keys: mx.array | None, site: int) -> mx.array:
    """Zero elements of x [N, ...] with probability `rate` and scale the rest; identity without keys.

    Args:
      x: any shape, rows first.
      rate: in [0, 1).
      keys: [N, 2] keys from `row_keys`, or None in evaluation.
      site: which of the places that share `keys` this is.
    """
    if keys is None or rate == 0:
        return x
    words = fold_in(keys, site).reshape(-1, 2, *[1] * (x.ndim - 1))
    position = mx.arange(math.prod(x.shape[1:]), dtype=mx.uint32).reshape(x.shape[1:])
    bits = _mixed(_mixed(position + words[:, 0]) ^ words[:, 1])
    kept = bits >= mx.array(round(rate * 2**32), mx.uint32)
    return mx.where(kept, x * (1 / (1 - rate)), 0).astype(x.dtype)


def gaussian(shape: tuple[int, ...], keys: mx.array, site: int) -> mx.array:
    """Standard normal float32 of `shape` [N, ...], a row from its own key of `keys` [N, 2] (Box-Muller)."""
    words = fold_in(keys, site).reshape(-1, 2, *[1] * (len(shape) - 1))
    position = mx.arange(math.prod(shape[1:]), dtype=mx.uint32).reshape(shape[1:])
    first = _mixed(_mixed(position + words[:, 0]) ^ words[:, 1])
    second = _mixed(first ^ words[:, 0])
    radius, turn = (((bits >> 8).astype(mx.float32) + 0.5) * 2.0**-24 for bits in (first, second))
    return mx.sqrt(-2.0 * mx.log(radius)) * mx.cos(2.0 * math.pi * turn)


def fold_in(keys: mx.array, number: int | mx.array) -> mx.array:
    """Each key [..., 2] with a number >= 0 (or one for each key, [...]) folded in: Threefry-2x32, 20 rounds.

    What jax.random.fold_in does; MLX has only a split into a known number of keys.
    """
    a, b = keys[..., 0], keys[..., 1]
    schedule = (a, b, a ^ b ^ mx.array(0x1BD11BDA, mx.uint32))
    left, right = a, b + mx.array(number, mx.uint32)
    for turn in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            left = left + right
            right = left ^ ((right << bits) | (right >> (32 - bits)))
        left = left + schedule[(turn + 1) % 3]
        right = right + schedule[(turn + 2) % 3] + mx.array(turn + 1, mx.uint32)
    return mx.stack([left, right], axis=-1)


def _mixed(x: mx.array) -> mx.array:
    """A hash of uint32 to uint32 in which every bit of x moves every bit of the result."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)
