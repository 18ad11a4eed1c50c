"""AdamW with warm-up, decay of the rate and clipping; no weight decay on biases and norms.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101. Twin: mlx_impl/training/optimizer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from common.config import TrainConfig
from common.language.config import LanguageTrainConfig

UNDECAYED = {"bias", "scale", "u", "gamma", "b"}  # last names of parameters that weight decay leaves alone
# what the portable score has beside the encoder, in any family
PORTABLE = {"pooler", "pre_classifier", "head", "classifier"}


def learning_rate(config: TrainConfig | LanguageTrainConfig, steps: int) -> Callable[[Any], Any]:
    """Rate as a function of the step: linear warm-up to `learning_rate`, then the schedule down to 0."""
    warmup = min(round(config.warmup * steps), steps - 1)
    rest = steps - warmup
    after = {
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    # The first step already moves: the ramp starts one step in.
    rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: TrainConfig | LanguageTrainConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (b1 0.9, b2 0.999, eps 1e-8), PORTABLE at a rate of its own."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
        optax.masked(optax.scale(config.portable_rate), portable),
    )


def decayed(parameters: Any) -> Any:
    """True at the parameters with weight decay: matrices, except the ones UNDECAYED names."""

    return jax.tree_util.tree_map_with_path(
        lambda path, value: np.ndim(value) >= 2 and not _names(path) & UNDECAYED, parameters
    )


def portable(parameters: Any) -> Any:
    """True at the parameters of the pooler and the classifier."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(_names(path) & PORTABLE), parameters)


def _names(path: tuple[Any, ...]) -> set[str]:
    return {str(getattr(part, "key", getattr(part, "name", part))) for part in path}
