"""Encoder and Scorer of an exported directory: onnxruntime on the CPU, batches of few tokens on every core.

Texts are sorted by their length and padded to the longest of a batch; a batch holds BATCH_TOKENS at most,
which stay in a core's cache, and each is computed by one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.backends import Scores, checkpoint_identity, checkpoint_name
from common.checkpoint import CONFIG_FILE, ONNX_FILE, read_config, surviving
from common.config import RerankerConfig
from common.errors import UserError
from common.text import PASSAGE, Encoded, PairTokenizer

BATCH_TOKENS = 512  # padding included
LAST_TOKENS = 128
_FIELDS = ("score", "portable", "resonance", "overlap", "coherence")


def accelerator() -> str | None:
    """None: the CPU computes."""
    return None


def batches_by_length(
    encodeds: Sequence[Encoded], budget: int = BATCH_TOKENS, cores: int = 1
) -> Iterator[np.ndarray]:
    """Indices of batches, longest first: as many rows as fit `budget` tokens when padded to their longest.

    The last ones are smaller, with room for LAST_TOKENS, so that all `cores` end together.
    """
    sizes = np.asarray([len(encoded.ids) for encoded in encodeds], int)
    order = np.argsort(-sizes, kind="stable")
    start, left = 0, int(sizes.sum())
    while start < len(order):
        room = min(budget, max(LAST_TOKENS, left // cores))
        batch = order[start : start + max(1, room // max(1, int(sizes[order[start]])))]
        yield batch
        start, left = start + len(batch), left - int(sizes[batch].sum())


def open_session(directory: Path, kind: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """onnxruntime's session of an exported directory, which computes on `threads` cores, and its config.json.

    UserError for an export of another kind, and for a file that cannot be read.
    """
    import onnxruntime

    directory = surviving(directory)
    config = read_config(directory)
    found = (config.get("onnx") or {}).get("kind", "foreign model")
    if found != kind:
        raise UserError(
            f"{directory}: holds a {found}, a {kind} is needed. Export one with scripts/export.py --kind "
            f"{kind}."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # shapes differ from batch to batch
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(directory / ONNX_FILE),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],  # its operator is slow: jax_impl/export/onnx.py
        )
    except Exception as error:  # onnxruntime's own errors have no common class
        raise UserError(
            f"{directory / ONNX_FILE}: cannot be read ({str(error)[:300]}). Export it again."
        ) from error
    return session, config


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxSession:
    """A model of an exported directory. Several threads may call it; it computes on as many cores as there
    are."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = surviving(directory)
        self._session, self.config = open_session(self.directory, kind, 1)
        self.about: dict[str, Any] = self.config["onnx"]
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]
        self._cores = available_cores()
        self._pool = ThreadPoolExecutor(self._cores, "resonance-onnx")

    def run(
        self,
        encodeds: Sequence[Encoded],
        feed: Callable[[Sequence[Encoded]], dict[str, np.ndarray]],
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Output name -> rows in the order of the texts. When `on_batch` raises, what has not begun is
        dropped."""
        found: dict[str, np.ndarray] = {}

        def work(indices: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            given = feed([encodeds[index] for index in indices])
            return indices, self._session.run(self.outputs, {name: given[name] for name in self.inputs})

        batches = batches_by_length(encodeds, cores=self._cores)
        futures = [self._pool.submit(work, indices) for indices in batches]
        try:
            for future in as_completed(futures):
                indices, arrays = future.result()
                for name, array in zip(self.outputs, arrays, strict=True):
                    rows = found.setdefault(name, np.empty((len(encodeds), *array.shape[1:]), np.float32))
                    rows[indices] = array
                if on_batch is not None:
                    on_batch(len(indices))
        finally:
            for future in futures:
                future.cancel()
        return found


class OnnxEncoder:
    """An exported sentence encoder, for the dense first stage."""

    def __init__(self, directory: Path) -> None:
        self._session = OnnxSession(directory, "bi-encoder")
        directory, config = self._session.directory, self._session.config
        self.name = checkpoint_name(directory)
        self.dim = int(config["hidden_size"])
        self.max_tokens = min(int(self._session.about["max_tokens"]), int(config["max_position_embeddings"]))
        self.identity = checkpoint_identity(directory, self.max_tokens)
        self.tokenizer = PairTokenizer(directory)

    def encode(self, texts: Sequence[str], *, kind: Literal["query", "passage"] = "passage") -> np.ndarray:
        """Unit vectors [N, dim], float32. The two kinds of text are encoded alike."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        encodeds = self.tokenizer.encode_texts(texts, self.max_tokens)
        return self._session.run(encodeds, lambda rows: onnx_feed(self.tokenizer, rows))["sentence_embedding"]


class OnnxScorer:
    """An exported reranker. A portable export has that score alone: the other parts are 0."""

    def __init__(self, directory: Path) -> None:
        self._session = OnnxSession(directory, "cross-encoder")
        directory = self._session.directory
        settings = self._session.config.get("resonance") or {}
        try:
            limits = int(settings["max_query_tokens"]), int(settings["max_passage_tokens"])
            self._segment = int(settings["passage_segment"])
        except KeyError as error:
            raise UserError(
                f"{directory / CONFIG_FILE}: `resonance` lacks {error}. Export it again."
            ) from None
        self._positions = int(self._session.config["max_position_embeddings"])
        self.name = checkpoint_name(directory)
        self.identity = checkpoint_identity(directory, *limits)
        self.fusion_weight = float(settings.get("fusion_weight") or 0.0)
        self.tokenizer = PairTokenizer(directory, *limits)

    def score(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        """Scores of the pairs (queries[i], passages[i]), each [N] float32."""
        if not queries:
            return Scores(*(np.zeros(0, np.float32) for _ in _FIELDS))
        encodeds = self.tokenizer.encode_pairs(queries, passages)
        longest = max(len(encoded.ids) for encoded in encodeds)
        if longest > self._positions:
            raise UserError(
                f"{self.name}: a pair of {longest} tokens, and the model has positions for {self._positions}"
            )
        found = self._session.run(
            encodeds, lambda rows: onnx_feed(self.tokenizer, rows, self._segment), on_batch
        )
        if "logits" in found:
            score = found["logits"][:, 0]
            return Scores(score, score, *(np.zeros(len(score), np.float32) for _ in range(3)))
        return Scores(*(found[name] for name in _FIELDS))


def load_encoder(directory: Path) -> OnnxEncoder:
    """The Encoder of an exported directory (common.backends)."""
    return OnnxEncoder(Path(directory))


def load_scorer(directory: Path, recipe: RerankerConfig | None = None) -> OnnxScorer:
    """The Scorer of an exported directory (common.backends); an export needs no recipe."""
    return OnnxScorer(Path(directory))


def onnx_feed(tokenizer: PairTokenizer, rows: Sequence[Encoded], segment: int = 0) -> dict[str, np.ndarray]:
    """Everything that a graph may ask for, each int64 [N, S], padded to the longest row."""
    ids, sides = tokenizer.pad(rows, max(len(row.ids) for row in rows))
    return {
        "input_ids": ids.astype(np.int64),
        "sides": sides.astype(np.int64),
        "attention_mask": (sides > 0).astype(np.int64),
        "token_type_ids": segment * (sides == PASSAGE).astype(np.int64),
    }
