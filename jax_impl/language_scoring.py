"""What a language model says of segments: the NLL of their tokens, and the use of a memory.

Twin: mlx_impl/language_scoring.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.language import LanguageBatch
from common.language.evaluation import TokenScores
from jax_impl.language import load_language_model
from jax_impl.losses.language import phase_magnitude_means, token_nll
from jax_impl.models.decoder import LanguageModel
from jax_impl.scoring import default_dtype
from jax_impl.training.language_step import emptied


class ModelScorer:
    """A model in evaluation, compiled once for each shape of a batch; `set_state` gives it other weights."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._graphdef, self._state = nnx.split(model)
        self._call = jax.jit(self._compute)
        self._attend = jax.jit(
            lambda state, ids: nnx.merge(self._graphdef, state)(ids, attention=True).attention
        )

    @property
    def context(self) -> int:
        """Tokens of a segment."""
        return int(self._model.context or 256)

    @property
    def carries(self) -> bool:
        """Whether there is a memory to carry."""
        return self._model.empty_memory(1) is not None

    def set_state(self, state: Any) -> None:
        """Score with these parameters from now on."""
        self._state = state

    def score(self, batch: LanguageBatch, memory: Any) -> TokenScores:
        """NLL [B, S] of a batch of one segment, after `memory` (None: empty) where the batch resets none."""
        if memory is None:
            memory = self._model.empty_memory(len(batch.reset))
        before = None if memory is None else emptied(memory, batch.reset[:, 0])
        parts = (batch.input_ids[:, 0], batch.labels[:, 0], batch.mask[:, 0], batch.segments[:, 0])
        nll, after, read, aligned = self._call(self._state, before, *parts)
        told = None if aligned is None else np.asarray(aligned)
        return TokenScores(np.asarray(nll), after, *_use(before, after, read), told)

    def attention(self, input_ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Attention weights [B, H, S, S] of each layer over texts [B, S], after an empty memory."""
        return tuple(np.asarray(weights) for weights in self._attend(self._state, input_ids))

    def _compute(
        self, state: Any, memory: Any, ids: Any, labels: Any, mask: Any, segments: Any
    ) -> tuple[jax.Array, Any, Any, jax.Array | None]:
        model = nnx.merge(self._graphdef, state)
        out = model(ids, segments, memory=memory)
        nll = jnp.where(mask, token_nll(out.logits, labels), 0.0)
        aligned = None if out.state is None else jnp.stack(phase_magnitude_means(*out.state), axis=-1)
        return nll, out.memory, out.read, aligned


def _use(
    before: Any, after: Any, read: Any
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Read weights [B, N + 1], importance and age [B, N], replaced slots [B]; all None without a memory."""
    if read is None:
        return None, None, None, None
    changed = np.any(np.asarray(before.slots) != np.asarray(after.slots), axis=-1)  # [B, N]
    return np.asarray(read), np.asarray(after.importance), np.asarray(after.age), changed.sum(-1)


def load_segment_scorer(directory: Path) -> ModelScorer:
    """The model of a checkpoint directory, in the precision of this device. Raises UserError."""
    model, _ = load_language_model(directory, dtype=default_dtype("auto"))
    return ModelScorer(model)
