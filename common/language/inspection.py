"""A look into a language model on one text: what its layers attend to, what its memory holds and when.

Written into a run's folder when it ends, for its report and notebooks/training_monitor.ipynb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.backends import language_module
from common.checkpoint import read_json
from common.data.language import TokenDocuments, evaluation_batches
from common.errors import UserError
from common.hub import resolve_model
from common.language.evaluation import AttentiveScorer
from common.language.text import LanguageTokenizer, load_tokenizer

INSPECTION_FILE = "inspection.json"
TOKENS = 48  # of the attention map
SEGMENTS = 48  # of the memory map


def longest_document(documents: TokenDocuments) -> np.ndarray:
    """The ids of the longest document of a split; ValueError of a split without one."""
    if not len(documents):
        raise ValueError("the split has no document")
    return documents.ids[documents.document(int(np.argmax(documents.lengths())))]


def inspect_model(scorer: AttentiveScorer, tokenizer: LanguageTokenizer, ids: np.ndarray) -> dict[str, Any]:
    """What a model does with a text of ids [T]: {"attention", "memory"}, as JSON values.

    attention: {"tokens": S texts, "layers": [L][S][S]}, mean weight over the heads of each layer, of the
    first TOKENS tokens, the end of the text before first; null of a model without attention.
    memory: {"importance", "age": [N][K], "read": [N + 1][K], "replaced": [K]} after each of the first
    SEGMENTS segments, the null slot last in read; null of a model without slots.
    """
    shown = np.concatenate((np.asarray([tokenizer.end], np.int32), ids))[: min(TOKENS, scorer.context)]
    layers = [np.round(weights[0].mean(0), 4).tolist() for weights in scorer.attention(shown[None])]
    tokens = [tokenizer.decode([int(token)], special=True) for token in shown]
    return {
        "attention": {"tokens": tokens, "layers": layers} if layers else None,
        "memory": _memory(scorer, ids, tokenizer.end),
    }


def _memory(scorer: AttentiveScorer, ids: np.ndarray, end: int) -> dict[str, Any] | None:
    one = np.ones(1, np.int64)
    text = TokenDocuments(ids, np.ones(len(ids), bool), np.array([0, len(ids)]), one, one)
    found: dict[str, list[np.ndarray]] = {"importance": [], "age": [], "read": [], "replaced": []}
    memory: Any = None
    batches = evaluation_batches(text, scorer.context, 1, end, stride=scorer.context, carry=True)
    for batch, _ in zip(batches, range(SEGMENTS), strict=False):
        scores = scorer.score(batch, memory)
        if scores.importance is None:
            return None
        memory = scores.memory
        for name, values in found.items():
            values.append(np.asarray(getattr(scores, name))[0])
    return {name: np.round(np.stack(values, -1), 4).tolist() for name, values in found.items()}


def inspect_checkpoint(model: str | Path, text: str, backend: str = "auto") -> dict[str, Any]:
    """`inspect_model` of a checkpoint directory or run. UserError: it cannot be loaded, an empty text."""
    directory = resolve_model(model, say=lambda _: None)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text)
    if not len(ids):
        raise UserError("the text to look at is empty; give at least one word")
    scorer: AttentiveScorer = language_module(backend, "language_scoring").load_segment_scorer(directory)
    return inspect_model(scorer, tokenizer, ids)


def read_inspection(directory: str | Path) -> dict[str, Any] | None:
    """What a run's folder holds of it; None of a run that has not ended. UserError for a broken file."""
    file = Path(directory) / INSPECTION_FILE
    return read_json(file) if file.exists() else None
