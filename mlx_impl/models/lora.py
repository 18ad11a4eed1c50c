"""Low-rank adapters on linear layers; merged into the weights when a checkpoint is saved.

Source: Hu et al. 2021, arXiv:2106.09685. Twin: jax_impl/models/lora.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.models.layers import Linear, Rngs


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A x, on top of a linear layer whose own path it keeps.

    A is random and B zero, so that it starts as the layer it wraps.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float, *, rngs: Rngs) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.get("bias")
        self.dtype = linear.dtype
        self.scale = alpha / rank
        outputs, inputs = linear.weight.shape
        self.lora_a = mx.random.normal((inputs, rank), key=rngs.params()) / math.sqrt(inputs)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        low = x @ self.lora_a.astype(x.dtype) @ self.lora_b.astype(x.dtype)
        y = x @ self.weight.astype(x.dtype).T + self.scale * low
        return y if self.bias is None else y + self.bias.astype(x.dtype)

    def merged(self) -> mx.array:
        """The weight [out, in] with the adapter added."""
        return self.weight + self.scale * (self.lora_a @ self.lora_b).T


def add_lora(encoder: nn.Module, rank: int, alpha: float, targets: Sequence[str], *, rngs: Rngs) -> list[str]:
    """Replace the linear layers of `encoder` named in `targets` by adapters, in place; returns their paths.

    Raises ValueError when a target names no linear layer.
    """
    found: list[str] = []
    for path, module in sorted(encoder.named_modules()):
        for name, child in list(module.items()):
            if name in targets and isinstance(child, Linear):
                setattr(module, name, LoRALinear(child, rank, alpha, rngs=rngs))
                found.append(f"{path}.{name}".lstrip("."))
    missing = [t for t in targets if not any(path.rsplit(".", 1)[-1] == t for path in found)]
    if missing:
        raise ValueError(f"LoRA targets {missing} name no linear layer of the encoder")
    return found


def trainable(path: tuple[str | int, ...], value: mx.array) -> bool:
    """Whether a parameter learns under LoRA: the adapters, the pooler and the heads; the encoder rests."""
    return path[-1] in ("lora_a", "lora_b") or not {"embeddings", "encoder"} & set(path)
