"""What Flax NNX has and mlx.nn has not: layers with a computation dtype, and fresh parameters from a seed.

Parameters are float32 and carry the checkpoint's own names and shapes (`weight`, linear ones [out, in]). They
start as NNX's do. No twin: jax_impl takes all this from flax.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


@contextlib.contextmanager
def given_parameters(model: nn.Module, parameters: Any) -> Iterator[None]:
    """The model with other parameters inside the block, its own again afterwards; None leaves it as it is."""
    if parameters is None:
        yield
        return
    learned = tree_map(mx.array, model.trainable_parameters())
    model.update(parameters)
    try:
        yield
    finally:
        model.update(learned)


class Rngs:
    """Keys for fresh parameters, one after the other; MLX's global random state is not used."""

    def __init__(self, seed: int) -> None:
        self._key = mx.random.key(seed)

    def params(self) -> mx.array:
        """The next key."""
        self._key, key = mx.random.split(self._key)
        return key


class Linear(nn.Linear):
    """y = x W^T + b in `dtype`, x [..., inputs] -> [..., outputs]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        dtype: mx.Dtype = mx.float32,
        rngs: Rngs,
    ) -> None:
        super().__init__(inputs, outputs, bias=use_bias)
        self.dtype = dtype
        self.weight = lecun_normal(rngs.params(), (outputs, inputs))
        if use_bias:
            self.bias = mx.zeros(outputs)

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(self.dtype) @ self.weight.astype(self.dtype).T  # [..., outputs]
        return y + self.bias.astype(self.dtype) if "bias" in self else y


class Embed(nn.Embedding):
    """Rows of a table, integers [...] -> [..., features] in `dtype`; NaN beyond the table, as in JAX."""

    def __init__(
        self, num_embeddings: int, features: int, *, dtype: mx.Dtype = mx.float32, rngs: Rngs
    ) -> None:
        super().__init__(num_embeddings, features)
        self.num_embeddings, self.dtype = num_embeddings, dtype
        self.weight = mx.random.normal((num_embeddings, features), key=rngs.params()) / math.sqrt(features)

    def __call__(self, ids: mx.array) -> mx.array:
        known = (ids < self.num_embeddings)[..., None]
        return mx.where(known, self.weight[ids], mx.nan).astype(self.dtype)

    def attend(self, x: mx.array) -> mx.array:
        """x [..., features] times every row of the table, [..., num_embeddings] in `dtype`."""
        return x.astype(self.dtype) @ self.weight.astype(self.dtype).T


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, computed in float32 and returned in `dtype`."""

    def __init__(
        self, features: int, *, epsilon: float, use_bias: bool = True, dtype: mx.Dtype = mx.float32
    ) -> None:
        super().__init__(features, eps=epsilon, bias=use_bias)
        self.dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x.astype(mx.float32)).astype(self.dtype)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + epsilon) over the last axis times `weight`, computed in float32, in `dtype`."""

    def __init__(self, features: int, *, epsilon: float, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__(features, eps=epsilon)
        self.dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x.astype(mx.float32)).astype(self.dtype)


def lecun_normal(key: mx.array, shape: tuple[int, int]) -> mx.array:
    """Normal, cut off at two standard deviations, of variance 1 / inputs; shape [out, in]."""
    deviation = 1.0 / math.sqrt(shape[1]) / 0.87962566103423978  # what the cut leaves of a deviation of 1
    return deviation * mx.random.truncated_normal(-2.0, 2.0, shape, key=key)


def orthogonal(key: mx.array, shape: tuple[int, int]) -> mx.array:
    """A uniformly drawn matrix with orthonormal rows, or columns where it is taller than wide."""
    tall = (max(shape), min(shape))
    q, r = mx.linalg.qr(mx.random.normal(tall, key=key), stream=mx.cpu)  # MLX has no QR on GPU
    q = q * mx.sign(mx.diag(r))  # else the signs that QR happens to choose are not uniform
    return q if shape == tall else q.T
