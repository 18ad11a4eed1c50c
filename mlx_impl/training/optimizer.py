"""AdamW with warm-up, decay of the rate and clipping; no weight decay on biases and norms.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101. Twin: jax_impl/training/optimizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from common.config import TrainConfig
from common.language.config import LanguageTrainConfig

UNDECAYED = {"bias", "u", "gamma", "b"}  # last names of parameters that weight decay leaves alone
# what the portable score has beside the encoder, in any family
PORTABLE = {"pooler", "pre_classifier", "head", "classifier"}


def learning_rate(config: TrainConfig | LanguageTrainConfig, steps: int) -> Callable[[Any], mx.array]:
    """Rate as a function of the step: linear warm-up to `learning_rate`, then the schedule down to 0."""
    warmup = min(round(config.warmup * steps), steps - 1)
    rest = steps - warmup
    after = {
        "linear": lambda share: 1.0 - share,
        "cosine": lambda share: 0.5 * (1.0 + mx.cos(math.pi * share)),
        "constant": lambda share: mx.ones_like(share),
    }[config.schedule]

    def rate(step: Any) -> mx.array:
        step = mx.array(step).astype(mx.float32)
        # The first step already moves: the ramp starts one step in.
        rise = (step + 1.0) / (warmup + 1)
        fall = after(mx.clip((step - warmup) / rest, 0.0, 1.0))
        return config.learning_rate * mx.where(step < warmup, rise, fall)

    return rate


def make_optimizer(config: TrainConfig | LanguageTrainConfig, steps: int) -> optim.Optimizer:
    """Clip by global norm, then AdamW (b1 0.9, b2 0.999, eps 1e-8), PORTABLE at a rate of its own."""
    schedule = learning_rate(config, steps)

    def adamw(decays: bool, is_portable: bool) -> optim.AdamW:
        times = config.portable_rate if is_portable else 1.0
        return optim.AdamW(
            learning_rate=lambda step: times * schedule(step),
            betas=[0.9, 0.999],
            eps=1e-8,
            weight_decay=config.weight_decay if decays else 0.0,
            bias_correction=True,  # MLX leaves it out unless asked
        )

    groups = [(decays, is_portable) for decays in (True, False) for is_portable in (True, False)]
    filters = [
        lambda path, value, group=group: (_decays(path, value), _portable(path)) == group
        for group in groups[:-1]
    ]
    return _Clipped(config.max_grad_norm, [adamw(*group) for group in groups], filters)


class _Clipped(optim.MultiOptimizer):
    """Optimizers of their own parameters, after all gradients were clipped by their global norm."""

    def __init__(self, limit: float, optimizers: list[Any], filters: list[Any]) -> None:
        super().__init__(optimizers, filters)
        self.limit = limit

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        norm = global_norm(gradients)
        scale = mx.where(norm < self.limit, 1.0, self.limit / norm)
        return super().apply_gradients(tree_map(lambda x: x * scale, gradients), parameters)


def decayed(parameters: Any) -> Any:
    """True at the parameters with weight decay: matrices, except the ones UNDECAYED names."""
    return tree_map_with_path(_decays, parameters)


def portable(parameters: Any) -> Any:
    """True at the parameters of the pooler and the classifier."""
    return tree_map_with_path(lambda path, _: _portable(path), parameters)


def global_norm(tree: Any) -> mx.array:
    """The root of the sum of all squares in a tree of arrays."""
    leaves: Any = tree_flatten(tree)
    return mx.sqrt(reduce(mx.add, (mx.sum(mx.square(value)) for _, value in leaves)))


def _decays(path: str, value: mx.array) -> bool:
    return value.ndim >= 2 and not {*path.split(".")} & UNDECAYED


def _portable(path: str) -> bool:
    return bool({*path.split(".")} & PORTABLE)
