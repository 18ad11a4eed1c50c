"""Dense retrieval: an encoder's vectors, searched exactly by faiss; the corpus is embedded once."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.backends import Encoder
from common.cache import read_cache, write_cache
from common.data.records import Run
from common.errors import UserError
from common.progress import progress

_CHUNK = 4096  # texts between two signs of progress


def dense_run(
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    encoder: Encoder,
    depth: int,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
) -> Run:
    """The `depth` passages of each query with the highest inner product, exact search.

    With a `cache_dir` the passages' vectors are kept there as .npy, keyed by `fingerprint` (of the corpus)
    and the encoder's identity.
    """
    import faiss

    ids = sorted(corpus)
    vectors = passage_vectors(corpus, encoder, cache_dir, fingerprint)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    wanted = list(queries)
    if not wanted:
        return {}
    asked = embed([queries[query] for query in wanted], encoder, "query")
    scores, places = index.search(asked, min(depth, len(ids)))  # [Q, depth]
    return {  # faiss fills up with places of -1 where it finds too few
        query: {ids[place]: float(score) for place, score in zip(row_places, row, strict=True) if place >= 0}
        for query, row, row_places in zip(wanted, scores, places, strict=True)
    }


def passage_vectors(
    corpus: Mapping[str, str], encoder: Encoder, cache_dir: str | Path | None = None, fingerprint: str = ""
) -> NDArray[np.float32]:
    """Vectors [N, D] of the passages in the order of their sorted ids, from the cache when it has them."""
    texts = [corpus[passage] for passage in sorted(corpus)]
    if cache_dir is None:
        return embed(texts, encoder, "passage")
    if not fingerprint:
        raise ValueError("a cache needs the fingerprint of the corpus")
    path = vectors_file(encoder, cache_dir, fingerprint)
    if path.exists():
        vectors: NDArray[np.float32] = read_cache(path, lambda file: np.load(file, allow_pickle=False))
        if vectors.shape != (len(texts), encoder.dim) or not np.isfinite(vectors).all():
            raise UserError(
                f"{path}: holds {vectors.shape}, expected {(len(texts), encoder.dim)}, all of it finite. "
                "Delete it; it is computed again."
            )
        return vectors
    vectors = embed(texts, encoder, "passage")
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    write_cache(path, buffer.getvalue())
    return vectors


def vectors_file(encoder: Encoder, cache_dir: str | Path, fingerprint: str) -> Path:
    """Where the passages' vectors of this encoder are kept, once computed."""
    return Path(cache_dir) / f"passages-{fingerprint}-{encoder.identity}.npy"


def embed(texts: Sequence[str], encoder: Encoder, kind: Literal["query", "passage"]) -> NDArray[np.float32]:
    """Vectors [N, D] of the texts, in their order; encoded from the longest to the shortest.

    Raises UserError for a vector that is not finite.
    """
    vectors = np.empty((len(texts), encoder.dim), np.float32)
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    with progress(len(texts), f"{encoder.name}: {kind} vectors") as steps:
        for start in range(0, len(order), _CHUNK):
            places = order[start : start + _CHUNK]
            vectors[places] = encoder.encode([texts[place] for place in places], kind=kind)
            broken = ~np.isfinite(vectors[places]).all(axis=1)
            if broken.any():
                first = texts[places[int(np.argmax(broken))]]
                raise UserError(
                    f"{encoder.name}: {int(broken.sum())} of {len(places)} {kind} vectors are not finite, "
                    f"the first of {first[:60]!r}. The model is damaged: use another."
                )
            steps.advance(len(places))
    return vectors
