"""One optimizer step of a language model: segments unrolled, gradients through memory within the step.

Twin: jax_impl/training/language_step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from common.config_language import LanguageRecipe
from mlx_impl.models.decoder import LanguageModel
from mlx_impl.models.dropout import fold_in, row_keys
from mlx_impl.training.optimizer import global_norm


class LanguageInput(NamedTuple):
    """B rows of K segments of S tokens (common.data.language.LanguageBatch) as arrays of a backend."""

    input_ids: mx.array  # [B, K, S]
    labels: mx.array  # [B, K, S]
    mask: mx.array  # [B, K, S]
    segments: mx.array  # [B, K, S]
    reset: mx.array  # [B, K]


class LanguageState:
    """All that changes in training, which a step replaces. `memory` is what the streams have read, by the
    names of its fields, None without one; `average` the running mean of the parameters, None without."""

    def __init__(self, model: LanguageModel, optimizer: optim.Optimizer, memory: Any, average: Any) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.memory: dict[str, mx.array] | None = None if memory is None else memory._asdict()
        self._kind = type(memory)

    @property
    def step(self) -> mx.array:
        """Optimizer steps so far, a whole number []."""
        return self.optimizer.state["states"][0]["step"]

    def arrays(self) -> list[Any]:
        """The trees of all arrays: model, optimizer, memory, average."""
        return [self.model.state, self.optimizer.state, self.memory or {}, self.average or {}]

    def remembered(self) -> Any:
        """The memory as the model takes it."""
        return None if self.memory is None else self._kind(**self.memory)


LanguageStep = Callable[[LanguageInput], dict[str, mx.array]]


def make_language_step(recipe: LanguageRecipe, state: LanguageState, key: mx.array) -> LanguageStep:
    """A step: batch -> loss and its parts, gradient norm; it changes `state`.

    Dropout and exploration depend on `key`, the step's number, the segment and the row.
    """
    train, model, optimizer = recipe.train, state.model, state.optimizer
    optimizer.init(model.trainable_parameters())

    def loss(memory: Any, batch: LanguageInput, key: mx.array) -> tuple[mx.array, Any, dict[str, mx.array]]:
        counted = mx.maximum(1.0, mx.sum(batch.mask.astype(mx.float32)))
        smoothed, plain = mx.zeros(()), mx.zeros(())
        for k in range(train.unroll):
            memory = emptied(memory, batch.reset[:, k])
            keys = row_keys(fold_in(key, k), len(batch.reset))
            out = model(batch.input_ids[:, k], batch.segments[:, k], memory=memory, keys=keys)
            memory = out.memory
            nll = token_nll(out.logits, batch.labels[:, k], batch.mask[:, k])
            plain = plain + mx.sum(nll)
            smoothed = smoothed + mx.sum(
                smoothed_nll(out.logits, nll, batch.mask[:, k], train.label_smoothing)
            )
        return smoothed / counted, memory, {"cross_entropy": plain / counted}

    gradient = nn.value_and_grad(model, loss)

    def step(batch: LanguageInput) -> dict[str, mx.array]:
        number = int(state.step)
        (value, memory, terms), gradients = gradient(state.remembered(), batch, fold_in(key, number))
        norm = global_norm(gradients)
        optimizer.update(model, gradients)
        state.memory = None if memory is None else memory._asdict()
        state.average = averaged(state.average, model.trainable_parameters(), train.average, number)
        mx.eval(state.arrays(), value, norm)
        return terms | {"loss": value, "gradient_norm": norm}

    return step


def emptied(memory: Any, reset: Any) -> Any:
    """A memory whose rows are zeros where `reset` [B] says so."""
    if memory is None:
        return None
    kept = {
        name: mx.where(mx.array(reset).reshape(-1, *[1] * (x.ndim - 1)), mx.zeros_like(x), x)
        for name, x in memory._asdict().items()
    }
    return type(memory)(**kept)


def token_nll(logits: mx.array, labels: mx.array, mask: mx.array) -> mx.array:
    """Nats of each label, [B, S, V], [B, S] -> float32 [B, S]; 0 where `mask` [B, S] is false."""
    chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return mx.where(mask, mx.logsumexp(logits, axis=-1) - chosen, 0.0)


def smoothed_nll(logits: mx.array, nll: mx.array, mask: mx.array, smoothing: float) -> mx.array:
    """(1 - smoothing) of the NLL, and of the mean NLL of all tokens the rest; [B, S]."""
    if not smoothing:
        return nll
    even = mx.logsumexp(logits, axis=-1) - mx.mean(logits, axis=-1)
    return (1 - smoothing) * nll + smoothing * mx.where(mask, even, 0.0)


def averaged(average: Any, learned: Any, decay: float, step: int) -> Any:
    """The running mean after a step; short of history it forgets faster. None stays None."""
    if average is None:
        return None
    kept = min(decay, (1.0 + step) / (10.0 + step))
    return tree_map(lambda old, new: kept * old + (1 - kept) * new, average, learned)
