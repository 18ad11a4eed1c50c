"""What the frozen original of a retraining says of fixed pairs: computed once, kept on disk piece by piece.

A piece is a .npy file named by the model and by its pairs' tokens; pieces are read by memory map.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from common.cache import read_cache, write_cache
from common.errors import UserError
from common.progress import progress
from common.text import Encoded

_PIECE = 2048  # pairs in a file


class Original(Protocol):
    """A frozen reranker. `identity` changes whenever its outputs may."""

    @property
    def identity(self) -> str: ...
    def outputs(
        self, encodeds: Sequence[Encoded], on_batch: Callable[[int], None] | None = None
    ) -> np.ndarray: ...  # float32 [N, 1 + 4C]: score, query re and im, passage re and im; C 0 without states


class OriginalOutputs:
    """The outputs of P pairs, float32 [P, 1 + 4C], read from disk as they are asked for."""

    def __init__(self, pieces: Sequence[np.ndarray]) -> None:
        self._pieces = pieces

    @property
    def state_size(self) -> int:
        """Complex amplitudes C of a state; 0 where no states were kept."""
        return (self._pieces[0].shape[1] - 1) // 4

    def rows(self, start: int, count: int) -> np.ndarray:
        """float32 [count, 1 + 4C] of the pairs from `start` on."""
        return np.stack([self._pieces[i // _PIECE][i % _PIECE] for i in range(start, start + count)])


def original_outputs(original: Original, pairs: Sequence[Encoded], cache: Path) -> OriginalOutputs:
    """The original's outputs of `pairs`: from `cache` where they are known, else computed and written there.

    An interrupted computation goes on with the next piece. Raises UserError for outputs that are not finite
    and for a broken file.
    """
    pieces = [pairs[start : start + _PIECE] for start in range(0, len(pairs), _PIECE)]
    files = [cache / f"original-{_key(original.identity, piece)}.npy" for piece in pieces]
    missing = [place for place, file in enumerate(files) if not file.exists()]
    with progress(sum(len(pieces[place]) for place in missing), "original: pairs scored") as steps:
        for place in missing:
            outputs = original.outputs(pieces[place], steps.advance)
            if not np.isfinite(outputs).all():
                raise UserError(
                    "the original's scores or states are not finite: model.base is damaged or diverged in "
                    "training. Retrain from another checkpoint."
                )
            buffer = io.BytesIO()
            np.save(buffer, outputs.astype(np.float32))
            write_cache(files[place], buffer.getvalue())
    return OriginalOutputs([read_cache(file, _open) for file in files])


def _open(file: Path) -> np.ndarray:
    opened: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return opened


def _key(identity: str, pairs: Sequence[Encoded]) -> str:
    digest = hashlib.sha256(identity.encode())
    for pair in pairs:
        digest.update(f"{len(pair.ids)}:".encode())
        digest.update(np.asarray(pair.ids, np.int32).tobytes())
        digest.update(np.asarray(pair.sides, np.int8).tobytes())
    return digest.hexdigest()[:16]
