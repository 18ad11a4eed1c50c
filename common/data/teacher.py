"""What a frozen teacher says of fixed rows of tokens: computed once, kept on disk piece by piece.

A number row is k token ids, their k logits, log of the total at T, entropy. Pieces are read by memory map.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.cache import cache_key, read_cache, write_cache
from common.data.language import PackedRows
from common.progress import progress

_PIECE = 256  # rows in a file

# input_ids, segments [B, S] -> float32 [B, S, 2 k + 2]
Outputs = Callable[[np.ndarray, np.ndarray], np.ndarray]


class StoredOutputs:
    """The teacher's outputs of every row of a plan, read from disk as they are asked for."""

    def __init__(self, pieces: Sequence[np.ndarray]) -> None:
        self._pieces = pieces

    def rows(self, index: np.ndarray) -> np.ndarray:
        """float32 [B, S, 2 k + 2] of the rows `index` [B]."""
        return np.stack([self._pieces[i // _PIECE][i % _PIECE] for i in map(int, index)])


def stored_outputs(
    outputs: Outputs, identity: str, plan: PackedRows, cache: Path, batch_size: int
) -> StoredOutputs:
    """What the teacher says of a plan of fixed rows: from `cache` where it is known, else computed.

    `identity` changes whenever the outputs may. An interrupted computation goes on with the next piece.
    """
    files = []
    with progress(plan.rows, "teacher: rows") as steps:
        for ids, segments in plan.pieces(_PIECE):
            file = cache / f"teacher-{cache_key(identity, ids.tolist(), segments.tolist())}.npy"
            if not file.exists():
                parts = [
                    outputs(ids[place : place + batch_size], segments[place : place + batch_size])
                    for place in range(0, len(ids), batch_size)
                ]
                buffer = io.BytesIO()
                np.save(buffer, np.concatenate(parts).astype(np.float32))
                write_cache(file, buffer.getvalue())
            files.append(file)
            steps.advance(len(ids))
    return StoredOutputs([read_cache(file, lambda path: np.load(path, mmap_mode="r")) for file in files])
