"""What a language model says of segments: the NLL of their tokens, and the use of a memory.

Twin: jax_impl/language_scoring.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from common.data.language import LanguageBatch
from common.language.evaluation import TokenScores
from mlx_impl.language import load_language_model
from mlx_impl.losses.language import phase_magnitude_means, token_nll
from mlx_impl.models.decoder import LanguageModel
from mlx_impl.models.layers import given_parameters
from mlx_impl.scoring import default_dtype
from mlx_impl.training.language_step import emptied


class ModelScorer:
    """A model in evaluation; `set_state` gives it other weights, for scoring alone."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._state: Any = None

    @property
    def context(self) -> int:
        """Tokens of a segment."""
        return int(self._model.context or 256)

    @property
    def carries(self) -> bool:
        """Whether there is a memory to carry."""
        return self._model.empty_memory(1) is not None

    def set_state(self, state: Any) -> None:
        """Score with these parameters from now on; None: the model's own."""
        self._state = state

    def score(self, batch: LanguageBatch, memory: Any) -> TokenScores:
        """NLL [B, S] of a batch of one segment, after `memory` (None: empty) where the batch resets none."""
        if memory is None:
            memory = self._model.empty_memory(len(batch.reset))
        before = emptied(memory, batch.reset[:, 0])
        names = ("input_ids", "labels", "mask", "segments")
        ids, labels, mask, segments = (mx.array(getattr(batch, name)[:, 0]) for name in names)
        with given_parameters(self._model, self._state):
            out = self._model(ids, segments, memory=before)
            nll = mx.where(mask, token_nll(out.logits, labels), 0.0)
            aligned = None if out.state is None else mx.stack([*phase_magnitude_means(*out.state)], axis=-1)
            mx.eval(nll, [x for x in (out.memory and list(out.memory), out.read, aligned) if x is not None])
        told = None if aligned is None else np.asarray(aligned)
        return TokenScores(np.asarray(nll), out.memory, *_use(before, out.memory, out.read), told)

    def attention(self, input_ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Attention weights [B, H, S, S] of each layer over texts [B, S], after an empty memory."""
        with given_parameters(self._model, self._state):
            return tuple(
                np.asarray(weights) for weights in self._model(mx.array(input_ids), attention=True).attention
            )


def load_segment_scorer(directory: Path) -> ModelScorer:
    """The model of a checkpoint directory, in the precision of this device. Raises UserError."""
    model, _ = load_language_model(directory, dtype=default_dtype("auto"))
    return ModelScorer(model)


def _use(
    before: Any, after: Any, read: Any
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Read weights [B, N + 1], importance and age [B, N], replaced slots [B]; all None without a memory."""
    if read is None:
        return None, None, None, None
    changed = np.any(np.asarray(before.slots) != np.asarray(after.slots), axis=-1)  # [B, N]
    return np.asarray(read), np.asarray(after.importance), np.asarray(after.age), changed.sum(-1)
