"""Low-rank adapters on linear layers; merged into the weights when a checkpoint is saved.

Source: Hu et al. 2021, arXiv:2106.09685. Twin: mlx_impl/models/lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from common.keymap import FAMILIES

# what lies directly below an encoder, of any family
_ENCODER_PARTS = {part for family in FAMILIES.values() for part in family.encoder} - {"pooler"}


class LoRALinear(nnx.Module):
    """y = W x + b + (alpha / rank) B A x, on top of a linear layer whose own path it keeps.

    A is random and B zero, so that it starts as the layer it wraps.
    """

    def __init__(self, linear: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs) -> None:
        self.kernel, self.bias = linear.kernel, linear.bias
        self.dtype = linear.dtype
        self.scale = alpha / rank
        inputs, outputs = linear.kernel.shape
        self.lora_a = nnx.LoRAParam(jax.random.normal(rngs.params(), (inputs, rank)) / jnp.sqrt(inputs))
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        low = x @ self.lora_a[...].astype(x.dtype) @ self.lora_b[...].astype(x.dtype)
        y = x @ self.kernel[...].astype(x.dtype) + self.scale * low
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def merged(self) -> jax.Array:
        """The kernel [in, out] with the adapter added."""
        return self.kernel[...] + self.scale * self.lora_a[...] @ self.lora_b[...]


def add_lora(
    encoder: nnx.Module, rank: int, alpha: float, targets: Sequence[str], *, rngs: nnx.Rngs
) -> list[str]:
    """Replace the linear layers of `encoder`, or of another model, named in `targets` by adapters, in place.

    Returns their paths. Without targets all of them. A pooler is left alone: the portable head learns in
    full. Raises ValueError, which names the layers there are, when a target names no linear layer.
    """
    layers = [
        (path, module, name)
        for path, module in nnx.iter_modules(encoder)
        for name, child in vars(module).items()
        if isinstance(child, nnx.Linear) and "pooler" not in path
    ]
    there = sorted({name for *_, name in layers})
    missing = [target for target in targets if target not in there]
    if missing:
        known = ", ".join(there)
        raise ValueError(f"LoRA targets {missing} name no linear layer of the model; it has: {known}")
    chosen = [layer for layer in layers if not targets or layer[-1] in targets]
    for _, module, name in chosen:
        setattr(module, name, LoRALinear(getattr(module, name), rank, alpha, rngs=rngs))
    return [".".join(map(str, (*path, name))) for path, _, name in chosen]


def trainable(path: tuple[str | int, ...], value: nnx.Variable) -> bool:
    """Whether a parameter learns under LoRA: the adapters, the pooler and the heads; the encoder rests."""
    return isinstance(value, nnx.LoRAParam) or (
        isinstance(value, nnx.Param) and not _ENCODER_PARTS & set(path)
    )
