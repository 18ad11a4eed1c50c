"""One optimizer step of a language model: segments unrolled, gradients through memory within the step.

Twin: mlx_impl/training/language_step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.language.config import LanguageRecipe
from jax_impl.losses.language import (
    StoredTeacher,
    certainty,
    cross_entropy,
    distillation,
    entropy,
    phase_magnitude,
    stored_distillation,
)
from jax_impl.losses.ranking import Pair
from jax_impl.models.decoder import LanguageModel, LanguageOutput
from jax_impl.models.dropout import row_keys
from jax_impl.training.parallel import Devices


class LanguageInput(NamedTuple):
    """B rows of K segments of S tokens (common.data.language.LanguageBatch) as arrays of a backend."""

    input_ids: jax.Array  # [B, K, S]
    labels: jax.Array  # [B, K, S]
    mask: jax.Array  # [B, K, S]
    segments: jax.Array  # [B, K, S]
    reset: jax.Array  # [B, K]
    stored: (
        jax.Array
    )  # [B, S, 2 k + 2], what was stored of a teacher (common.data.teacher); k 0 and S 0 without


class LanguageState(NamedTuple):
    """All that changes in training. `memory` is what the streams have read, None without one; `average` the
    running mean of `learned`, None without."""

    learned: Any
    optimizer: Any
    memory: Any
    average: Any
    step: jax.Array


Terms = dict[str, Pair]
LanguageStep = Callable[[LanguageState, LanguageInput, "Resting"], tuple[LanguageState, dict[str, jax.Array]]]


class Resting(NamedTuple):
    """Parameters that do not learn: of a base below its adapters, and of a teacher; None without."""

    base: Any = None
    teacher: Any = None


def make_language_step(
    recipe: LanguageRecipe,
    graphdef: nnx.GraphDef[LanguageModel],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    devices: Devices,
    steps: int,
    teacher: nnx.GraphDef[LanguageModel] | None = None,
) -> LanguageStep:
    """A compiled step: (state, batch, what rests) -> (state, every term, loss, gradient norm).

    The old state is donated. Dropout and exploration depend on `key`, the step's number, the segment and the
    row. `steps` of the run say how far it has come.
    """
    train = recipe.train

    def loss(
        learned: Any,
        memory: Any,
        batch: LanguageInput,
        resting: Resting,
        key: jax.Array,
        weights: dict[str, Any],
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, learned, resting.base)
        terms: Terms = {}
        for k in range(train.unroll):
            memory = emptied(memory, batch.reset[:, k])
            keys = row_keys(jax.random.fold_in(key, k), len(batch.reset))
            ids, segments, counted = batch.input_ids[:, k], batch.segments[:, k], batch.mask[:, k]
            out = model(ids, segments, memory=memory, keys=keys)
            memory = out.memory
            found = next_token_terms(out.logits, batch.labels[:, k], counted, train.label_smoothing)
            if teacher is not None:
                said = jax.lax.stop_gradient(nnx.merge(teacher, resting.teacher)(ids, segments).logits)
                found |= online_terms(recipe, out, said, counted)
            elif batch.stored.shape[-1]:
                found |= stored_terms(recipe, out, unpacked(batch.stored), counted)
            terms = {name: _added(terms.get(name), pair) for name, pair in found.items()}
        means = {name: top / jnp.maximum(1.0, below) for name, (top, below) in terms.items()}
        value = jnp.asarray(sum(weights[name] * mean for name, mean in means.items()))
        return value, (jax.lax.stop_gradient(memory), means)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(
        state: LanguageState, batch: LanguageInput, resting: Resting
    ) -> tuple[LanguageState, dict[str, jax.Array]]:
        folded = jax.random.fold_in(key, state.step)
        weights = term_weights(recipe, state.step / steps)
        (value, (memory, means)), gradients = gradient(
            state.learned, state.memory, batch, resting, folded, weights
        )
        updates, opt_state = optimizer.update(gradients, state.optimizer, state.learned)
        learned = optax.apply_updates(state.learned, updates)
        average = averaged(state.average, learned, train.average, state.step)
        logged = means | {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        if "distillation" in means:
            logged["distillation_weight"] = jnp.asarray(weights["distillation"])
        return LanguageState(learned, opt_state, memory, average, state.step + 1), logged

    return devices.compile(step)


def term_weights(recipe: LanguageRecipe, progress: Any) -> dict[str, Any]:
    """The weight of every term at a share of the run in [0, 1]; `cross_entropy` is only logged."""
    settings = recipe.distillation
    weights = {"next_token": settings.cross_entropy_weight, "cross_entropy": 0.0}
    weights["distillation"] = settings.weight(progress)
    return weights | dict.fromkeys(("magnitude", "phase"), settings.phase_magnitude_weight)


def next_token_terms(logits: jax.Array, labels: jax.Array, mask: jax.Array, smoothing: float) -> Terms:
    """The loss of the next token, and the same without smoothing."""
    return {
        "next_token": cross_entropy(logits, labels, mask, smoothing),
        "cross_entropy": cross_entropy(jax.lax.stop_gradient(logits), labels, mask),
    }


def online_terms(recipe: LanguageRecipe, out: LanguageOutput, teacher: jax.Array, mask: jax.Array) -> Terms:
    """Distillation from the teacher's logits [B, S, V], and the state's agreement with its certainty."""
    divergence = distillation(out.logits, teacher, mask, recipe.distillation.temperature)
    return {"distillation": divergence} | certainty_terms(recipe, out, entropy(teacher), mask)


def stored_terms(
    recipe: LanguageRecipe, out: LanguageOutput, stored: StoredTeacher, mask: jax.Array
) -> Terms:
    """The same of what was stored of a teacher."""
    divergence = stored_distillation(out.logits, stored, mask, recipe.distillation.temperature)
    return {"distillation": divergence} | certainty_terms(recipe, out, stored.entropy, mask)


def certainty_terms(
    recipe: LanguageRecipe, out: LanguageOutput, entropies: jax.Array, mask: jax.Array
) -> Terms:
    """Magnitude and phase of the second state, of a model that has one and a recipe that weighs it."""
    if out.state is None or not recipe.distillation.phase_magnitude_weight:
        return {}
    sure = certainty(entropies, out.logits.shape[-1])
    magnitude, phase = phase_magnitude(*out.state, sure, mask)
    return {"magnitude": magnitude, "phase": phase}


def unpacked(stored: jax.Array) -> StoredTeacher:
    """What `packed` has put into one array [B, S, 2 k + 2]."""
    k = stored.shape[-1] // 2 - 1
    return StoredTeacher(
        stored[..., :k].astype(jnp.int32), stored[..., k : 2 * k], stored[..., -2], stored[..., -1]
    )


def packed(stored: StoredTeacher) -> jax.Array:
    """Ids, logits, total and entropy in one float32 array [B, S, 2 k + 2]: ids below 2^24 are exact."""
    parts = (
        stored.ids.astype(jnp.float32),
        stored.values,
        stored.log_total[..., None],
        stored.entropy[..., None],
    )
    return jnp.concatenate(parts, axis=-1)


def _added(before: Pair | None, pair: Pair) -> Pair:
    return pair if before is None else (before[0] + pair[0], before[1] + pair[1])


def emptied(memory: Any, reset: Any) -> Any:
    """A memory whose rows are zeros where `reset` [B] says so."""
    return jax.tree.map(lambda x: jnp.where(reset.reshape(-1, *[1] * (x.ndim - 1)), 0, x), memory)


def averaged(average: Any, learned: Any, decay: float, step: jax.Array) -> Any:
    """The running mean after a step; short of history it forgets faster. None stays None."""
    if average is None:
        return None
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, learned)
