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

from common.config_language import LanguageRecipe
from jax_impl.models.decoder import LanguageModel
from jax_impl.models.dropout import row_keys
from jax_impl.training.parallel import Devices


class LanguageInput(NamedTuple):
    """B rows of K segments of S tokens (common.data.language.LanguageBatch) as arrays of a backend."""

    input_ids: jax.Array  # [B, K, S]
    labels: jax.Array  # [B, K, S]
    mask: jax.Array  # [B, K, S]
    segments: jax.Array  # [B, K, S]
    reset: jax.Array  # [B, K]


class LanguageState(NamedTuple):
    """All that changes in training. `memory` is what the streams have read, None without one; `average` the
    running mean of `learned`, None without."""

    learned: Any
    optimizer: Any
    step: jax.Array
    memory: Any
    average: Any


LanguageStep = Callable[[LanguageState, LanguageInput], tuple[LanguageState, dict[str, jax.Array]]]


def make_language_step(
    recipe: LanguageRecipe,
    graphdef: nnx.GraphDef[LanguageModel],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    devices: Devices,
) -> LanguageStep:
    """A compiled step: (state, batch) -> (state, loss and its parts, gradient norm); donates the old state.

    Dropout and exploration depend on `key`, the step's number, the segment and the row.
    """
    train = recipe.train

    def loss(learned: Any, memory: Any, batch: LanguageInput, key: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, learned)
        counted = jnp.maximum(1.0, jnp.sum(batch.mask, dtype=jnp.float32))
        smoothed, plain = jnp.zeros(()), jnp.zeros(())
        for k in range(train.unroll):
            memory = emptied(memory, batch.reset[:, k])
            keys = row_keys(jax.random.fold_in(key, k), len(batch.reset))
            out = model(batch.input_ids[:, k], batch.segments[:, k], memory=memory, keys=keys)
            memory = out.memory
            nll = token_nll(out.logits, batch.labels[:, k], batch.mask[:, k])
            plain += jnp.sum(nll)
            smoothed += jnp.sum(smoothed_nll(out.logits, nll, batch.mask[:, k], train.label_smoothing))
        terms = {"cross_entropy": plain / counted}
        return smoothed / counted, (jax.lax.stop_gradient(memory), terms)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: LanguageState, batch: LanguageInput) -> tuple[LanguageState, dict[str, jax.Array]]:
        folded = jax.random.fold_in(key, state.step)
        (value, (memory, terms)), gradients = gradient(state.learned, state.memory, batch, folded)
        updates, opt_state = optimizer.update(gradients, state.optimizer, state.learned)
        learned = optax.apply_updates(state.learned, updates)
        average = averaged(state.average, learned, train.average, state.step)
        logged = terms | {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        return LanguageState(learned, opt_state, state.step + 1, memory, average), logged

    return devices.compile(step)


def emptied(memory: Any, reset: Any) -> Any:
    """A memory whose rows are zeros where `reset` [B] says so."""
    return jax.tree.map(lambda x: jnp.where(reset.reshape(-1, *[1] * (x.ndim - 1)), 0, x), memory)


def token_nll(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Nats of each label, [B, S, V], [B, S] -> float32 [B, S]; 0 where `mask` [B, S] is false."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)


def smoothed_nll(logits: jax.Array, nll: jax.Array, mask: jax.Array, smoothing: float) -> jax.Array:
    """(1 - smoothing) of the NLL, and of the mean NLL of all tokens the rest; [B, S]."""
    if not smoothing:
        return nll
    even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * nll + smoothing * jnp.where(mask, even, 0.0)


def averaged(average: Any, learned: Any, decay: float, step: jax.Array) -> Any:
    """The running mean after a step; short of history it forgets faster. None stays None."""
    if average is None:
        return None
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, learned)
