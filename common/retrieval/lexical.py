"""BM25 (Robertson and Walker 1994) through bm25s, in Lucene's form and with Anserini's settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.records import Run

K1, B = 0.9, 0.4  # Anserini's; not tuned on any collection here


class BM25:
    """An index over passages [N]: words of two characters or more, English stopwords out, Snowball stems."""

    def __init__(self, passages: Sequence[str]) -> None:
        import bm25s
        import Stemmer

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it narrates, at a level that it sets itself
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
        self._size = len(passages)
        tokens = self._tokenize(passages)
        self._empty = not any(len(words) for words in tokens)
        if not self._empty:
            self._index.index(tokens, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """BM25 score of every passage, [N], 0 where no word is shared."""
        words = self._tokenize([query])[0]
        known = [word for word in words if word in self._index.vocab_dict] if not self._empty else []
        if not known:
            return np.zeros(self._size, np.float32)
        return np.asarray(self._index.get_scores(known), np.float32)

    def words(self, text: str) -> list[str]:
        """The words of a text as the index has them: no stopwords, stems."""
        return list(self._tokenize([text])[0])

    def weighted(self, words: Mapping[str, float]) -> NDArray[np.float32]:
        """BM25 score of every passage, [N], for words of the index with a weight each."""
        scores = np.zeros(self._size, np.float32)
        for word, weight in words.items():
            if not self._empty and word in self._index.vocab_dict:
                scores += np.float32(weight) * np.asarray(self._index.get_scores([word]), np.float32)
        return scores

    def save(self, folder: Path) -> None:
        """Write the index into a folder, from which `load` maps it into memory. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        if not self._empty:
            self._index.save(folder, show_progress=False)
        (folder / "size.json").write_text(json.dumps([self._size, self._empty]))

    @classmethod
    def load(cls, folder: Path) -> BM25:
        """What `save` wrote. Raises OSError or ValueError for a folder that is not whole."""
        import bm25s

        index = cls([])
        index._size, index._empty = json.loads((folder / "size.json").read_text())
        if not index._empty:
            index._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        return index

    def _tokenize(self, texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(
            list(texts), stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )


def bm25_run(corpus: Mapping[str, str], queries: Mapping[str, str], depth: int) -> Run:
    """The `depth` best passages of each query. A passage that shares no word with the query is left out, so a
    list may be shorter; equal scores stand in the order of the passage ids."""
    ids = sorted(corpus)
    index = BM25([corpus[passage] for passage in ids])
    return {query: top(ids, index.scores(text), depth) for query, text in queries.items()}


def top(ids: Sequence[str], scores: NDArray[np.float32], depth: int) -> dict[str, float]:
    """The `depth` highest of the positive scores [N]; `ids` [N] are sorted, ties go to the lower id."""
    order = np.argsort(-scores, kind="stable")[:depth]
    return {ids[place]: float(scores[place]) for place in order if scores[place] > 0.0}
