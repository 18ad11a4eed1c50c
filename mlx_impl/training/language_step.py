"""One optimizer step of a language model: segments unrolled, gradients through memory within the step.

Twin: jax_impl/training/language_step.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from common.language.config import LanguageRecipe
from mlx_impl.losses.language import (
    StoredTeacher,
    certainty,
    cross_entropy,
    distillation,
    entropy,
    phase_magnitude,
    stored_distillation,
)
from mlx_impl.losses.ranking import Pair
from mlx_impl.models.decoder import LanguageModel, LanguageOutput
from mlx_impl.models.dropout import fold_in, row_keys
from mlx_impl.training.optimizer import global_norm


class LanguageInput(NamedTuple):
    """B rows of K segments of S tokens (common.data.language.LanguageBatch) as arrays of a backend."""

    input_ids: mx.array  # [B, K, S]
    labels: mx.array  # [B, K, S]
    mask: mx.array  # [B, K, S]
    segments: mx.array  # [B, K, S]
    reset: mx.array  # [B, K]
    stored: (
        mx.array
    )  # [B, S, 2 k + 2], what was stored of a teacher (common.data.teacher); k 0 and S 0 without


@dataclasses.dataclass
class LanguageState:
    """All that changes in training, which a step replaces. `memory` is what the streams have read, by the
    names of its fields, None without one; `average` the running mean of the parameters, None without."""

    model: LanguageModel
    optimizer: optim.Optimizer
    memory: dict[str, mx.array] | None
    average: Any

    @property
    def step(self) -> mx.array:
        """Optimizer steps so far, a whole number []."""
        return self.optimizer.state["states"][0]["step"]

    def arrays(self) -> list[Any]:
        """The trees of all arrays: model, optimizer, memory, average."""
        return [self.model.state, self.optimizer.state, self.memory or {}, self.average or {}]

    def remembered(self) -> Any:
        """The memory as the model takes it."""
        empty = self.model.empty_memory(1)
        return None if empty is None or self.memory is None else type(empty)(**self.memory)


Terms = dict[str, Pair]
LanguageStep = Callable[[LanguageInput], dict[str, mx.array]]


def make_language_step(
    recipe: LanguageRecipe,
    state: LanguageState,
    key: mx.array,
    steps: int,
    teacher: LanguageModel | None = None,
) -> LanguageStep:
    """A step: batch -> every term, loss, gradient norm; it changes `state`.

    Dropout and exploration depend on `key`, the step's number, the segment and the row. `steps` of the run
    say how far it has come. `teacher` runs in every step.
    """
    train, model, optimizer = recipe.train, state.model, state.optimizer
    optimizer.init(model.trainable_parameters())

    def loss(
        memory: Any, batch: LanguageInput, key: mx.array, weights: dict[str, Any]
    ) -> tuple[mx.array, Any, dict[str, mx.array]]:
        terms: Terms = {}
        for k in range(train.unroll):
            memory = emptied(memory, batch.reset[:, k])
            keys = row_keys(fold_in(key, k), len(batch.reset))
            ids, segments, counted = batch.input_ids[:, k], batch.segments[:, k], batch.mask[:, k]
            out = model(ids, segments, memory=memory, keys=keys)
            memory = out.memory
            found = next_token_terms(out.logits, batch.labels[:, k], counted, train.label_smoothing)
            if teacher is not None:
                said = mx.stop_gradient(teacher(ids, segments).logits)
                found |= online_terms(recipe, out, said, counted)
            elif batch.stored.shape[-1]:
                found |= stored_terms(recipe, out, unpacked(batch.stored), counted)
            terms = {name: _added(terms.get(name), pair) for name, pair in found.items()}
        means = {name: top / mx.maximum(1.0, below) for name, (top, below) in terms.items()}
        value = sum((weights[name] * mean for name, mean in means.items()), start=mx.zeros(()))
        return value, memory, means

    gradient = nn.value_and_grad(model, loss)

    def step(batch: LanguageInput) -> dict[str, mx.array]:
        number = int(state.step)
        weights = term_weights(recipe, number / steps)
        (value, memory, means), gradients = gradient(state.remembered(), batch, fold_in(key, number), weights)
        norm = global_norm(gradients)
        optimizer.update(model, gradients)
        state.memory = None if memory is None else memory._asdict()
        state.average = averaged(state.average, model.trainable_parameters(), train.average, number)
        mx.eval(state.arrays(), value, norm, means)
        logged = means | {"loss": value, "gradient_norm": norm}
        if "distillation" in means:
            logged["distillation_weight"] = mx.array(weights["distillation"])
        return logged

    return step


def term_weights(recipe: LanguageRecipe, progress: Any) -> dict[str, Any]:
    """The weight of every term at a share of the run in [0, 1]; `cross_entropy` is only logged."""
    settings = recipe.distillation
    weights = {"next_token": settings.cross_entropy_weight, "cross_entropy": 0.0}
    weights["distillation"] = settings.weight(progress)
    return weights | dict.fromkeys(("magnitude", "phase"), settings.phase_magnitude_weight)


def next_token_terms(logits: mx.array, labels: mx.array, mask: mx.array, smoothing: float) -> Terms:
    """The loss of the next token, and the same without smoothing."""
    return {
        "next_token": cross_entropy(logits, labels, mask, smoothing),
        "cross_entropy": cross_entropy(mx.stop_gradient(logits), labels, mask),
    }


def online_terms(recipe: LanguageRecipe, out: LanguageOutput, teacher: mx.array, mask: mx.array) -> Terms:
    """Distillation from the teacher's logits [B, S, V], and the state's agreement with its certainty."""
    divergence = distillation(out.logits, teacher, mask, recipe.distillation.temperature)
    return {"distillation": divergence} | certainty_terms(recipe, out, entropy(teacher), mask)


def stored_terms(recipe: LanguageRecipe, out: LanguageOutput, stored: StoredTeacher, mask: mx.array) -> Terms:
    """The same of what was stored of a teacher."""
    divergence = stored_distillation(out.logits, stored, mask, recipe.distillation.temperature)
    return {"distillation": divergence} | certainty_terms(recipe, out, stored.entropy, mask)


def certainty_terms(
    recipe: LanguageRecipe, out: LanguageOutput, entropies: mx.array, mask: mx.array
) -> Terms:
    """Magnitude and phase of the second state, of a model that has one and a recipe that weighs it."""
    if out.state is None or not recipe.distillation.phase_magnitude_weight:
        return {}
    sure = certainty(entropies, out.logits.shape[-1])
    magnitude, phase = phase_magnitude(*out.state, sure, mask)
    return {"magnitude": magnitude, "phase": phase}


def unpacked(stored: mx.array) -> StoredTeacher:
    """What `packed` has put into one array [B, S, 2 k + 2]."""
    k = stored.shape[-1] // 2 - 1
    return StoredTeacher(
        stored[..., :k].astype(mx.int32), stored[..., k : 2 * k], stored[..., -2], stored[..., -1]
    )


def packed(stored: StoredTeacher) -> mx.array:
    """Ids, logits, total and entropy in one float32 array [B, S, 2 k + 2]: ids below 2^24 are exact."""
    parts = (
        stored.ids.astype(mx.float32),
        stored.values,
        stored.log_total[..., None],
        stored.entropy[..., None],
    )
    return mx.concatenate(list(parts), axis=-1)


def _added(before: Pair | None, pair: Pair) -> Pair:
    return pair if before is None else (before[0] + pair[0], before[1] + pair[1])


def emptied(memory: Any, reset: Any) -> Any:
    """A memory whose rows are zeros where `reset` [B] says so."""
    if memory is None:
        return None
    kept = {
        name: mx.where(mx.array(reset).reshape(-1, *[1] * (x.ndim - 1)), mx.zeros_like(x), x)
        for name, x in memory._asdict().items()
    }
    return type(memory)(**kept)


def averaged(average: Any, learned: Any, decay: float, step: int) -> Any:
    """The running mean after a step; short of history it forgets faster. None stays None."""
    if average is None:
        return None
    kept = min(decay, (1.0 + step) / (10.0 + step))
    return tree_map(lambda old, new: kept * old + (1 - kept) * new, average, learned)
