"""What an exported language model says of segments: the SegmentScorer of common.language.evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from common.data.language import LanguageBatch
from common.export.onnx_generation import OnnxLanguageModel, Reading, has_memory
from common.language.evaluation import TokenScores


class OnnxSegmentScorer:
    """An exported model in evaluation. How its memory is used is not told: the graph has no such output."""

    def __init__(self, model: OnnxLanguageModel) -> None:
        self._model = model

    @property
    def context(self) -> int:
        """Tokens of a segment."""
        return self._model.config.context

    @property
    def carries(self) -> bool:
        """Whether there is a memory to carry."""
        return has_memory(self._model.config)

    def score(self, batch: LanguageBatch, memory: Reading | None) -> TokenScores:
        """NLL [B, S] of a batch of one segment, after `memory` (None: empty) where the batch resets none.

        ValueError for rows of several texts.
        """
        ids, labels, mask, segments = (
            part[:, 0] for part in (batch.input_ids, batch.labels, batch.mask, batch.segments)
        )
        if ((segments > 0) & (segments != segments.max(axis=1, keepdims=True))).any():
            raise ValueError(
                "an exported model scores rows of one text; the token that ends a text stands within one here"
            )
        before = self._model.start(len(ids)) if memory is None else emptied(memory, batch.reset[:, 0])
        before = dataclasses.replace(before, fresh=np.ones(len(ids), bool))
        after, logits = self._model.read(before, ids.astype(np.int64), segments > 0, keep=0)
        nll = np.zeros(ids.shape, np.float32)
        for row in np.flatnonzero(mask.any(axis=1)):  # one by one: logits are large
            nll[row] = np.where(mask[row], _nll(logits[row], labels[row]), 0.0)
        return TokenScores(nll, after if self.carries else None, None, None, None, None)


def emptied(memory: Reading, reset: np.ndarray) -> Reading:
    """What is known, with nothing in the rows that are reset [N]."""
    from onnxruntime import OrtValue

    past = dict(memory.past)
    for name, value in past.items():
        if name.startswith("past_memory") and reset.any():
            kept = value.numpy() * ~reset.reshape(-1, *[1] * (len(value.shape()) - 1))
            past[name] = OrtValue.ortvalue_from_numpy(kept.astype(np.float32))
    return dataclasses.replace(memory, past=past, mask=memory.mask * ~reset[:, None])


def load_segment_scorer(directory: Path) -> OnnxSegmentScorer:
    """The model of an exported directory. Raises UserError."""
    return OnnxSegmentScorer(OnnxLanguageModel(Path(directory)))


def _nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Nats [S] of labels [S] under logits [S, V]."""
    largest = logits.max(axis=-1)
    total = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
    return total - logits[np.arange(len(labels)), labels]
