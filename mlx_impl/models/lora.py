"""Low-rank adapters on linear layers; merged into the weights when a checkpoint is saved.

Source: Hu et al. 2021, arXiv:2106.09685. Twin: jax_impl/models/lora.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from common.keymap import FAMILIES
from mlx_impl.models.layers import Linear, Rngs

# what lies directly below an encoder, of any family
_ENCODER_PARTS = {part for family in FAMILIES.values() for part in family.encoder} - {"pooler"}


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
    """Replace the linear layers of `encoder`, or of another model, named in `targets` by adapters, in place.

    Returns their paths. Without targets all of them. A pooler is left alone: the portable head learns in
    full. Raises ValueError, which names the layers there are, when a target names no linear layer.
    """
    layers = [
        (path, module, name)
        for path, module in sorted(encoder.named_modules(), key=lambda named: named[0])
        for name, child in module.items()
        if isinstance(child, Linear) and "pooler" not in path.split(".")
    ]
    there = sorted({name for *_, name in layers})
    missing = [target for target in targets if target not in there]
    if missing:
        known = ", ".join(there)
        raise ValueError(f"LoRA targets {missing} name no linear layer of the model; it has: {known}")
    chosen = [layer for layer in layers if not targets or layer[-1] in targets]
    for _, module, name in chosen:
        setattr(module, name, LoRALinear(module[name], rank, alpha, rngs=rngs))
    return [f"{path}.{name}".lstrip(".") for path, _, name in chosen]


def trainable(path: tuple[str | int, ...], value: mx.array) -> bool:
    """Whether a parameter learns under LoRA: the adapters, the pooler and the heads; the encoder rests."""
    return path[-1] in ("lora_a", "lora_b") or not _ENCODER_PARTS & set(path)


def freeze(model: nn.Module, learns: Callable[[tuple[str | int, ...], mx.array], bool]) -> None:
    """Freeze every parameter that does not learn."""
    for path, module in model.named_modules():
        parts = path.split(".")
        arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        resting = [name for name, value in arrays.items() if not learns((*parts, name), value)]
        module.freeze(recurse=False, keys=resting)
