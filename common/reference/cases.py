"""Random cases from a seed, with every edge a loss must survive, and the measure of equality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ListCase:
    """One batch of lists: float64 arrays whose values float32 holds exactly."""

    scores: Array  # [B, L], garbage at padding
    resonance: Array  # [B, L] in [-1, 1]
    labels: Array  # [B, L] grades >= 0, garbage at padding
    mask: NDArray[np.bool_]  # [B, L]
    query_re: Array  # [B, L, C]
    query_im: Array  # [B, L, C]
    related: Array  # [B, B] symmetric, 0 on the diagonal
    query_index: NDArray[np.int32]  # [B], two lists of one query among them
    teacher: Array  # [B, L] a teacher's scores, NaN where unknown


def float32_exact(values: Any) -> Array:
    """Round to float32 and return float64, so that both sides of a comparison see the same input."""
    return np.asarray(values, np.float32).astype(np.float64)


def random_lists(seed: int, width: int = 4) -> ListCase:
    """Ten lists of up to six candidates: graded, padded inside and at the end, one candidate, all padding,
    equal scores, no positive, large scores, and two lists of one query."""
    rng = np.random.default_rng(seed)
    lists, candidates = 10, 6
    scores = rng.normal(0.0, 3.0, (lists, candidates))
    labels = rng.integers(0, 2, (lists, candidates)).astype(np.float64)
    mask = np.arange(candidates) < rng.integers(2, candidates + 1, lists)[:, None]
    labels[:, 0] = 1.0
    labels[0], mask[0] = rng.integers(0, 4, candidates), True  # graded
    labels[0, 1] = 3.0
    mask[1] = [False, True, True, False, True, True]  # padding inside the list
    labels[1, 1] = 1.0
    mask[2] = np.arange(candidates) < 1  # one candidate
    mask[3] = False  # all padding
    scores[4] = scores[4, 0]  # equal scores
    labels[5][mask[5]] = 0.0  # no positive
    scores[6] *= 30.0  # nearly collapsed
    weights = np.triu(rng.uniform(0.1, 1.0, (lists, lists)) * (rng.random((lists, lists)) < 0.5), 1)
    return ListCase(
        scores=float32_exact(np.where(mask, scores, 1e4)),
        resonance=float32_exact(rng.uniform(-1.0, 1.0, (lists, candidates))),
        labels=np.where(mask, labels, 7.0),
        mask=mask,
        query_re=float32_exact(rng.normal(size=(lists, candidates, width))),
        query_im=float32_exact(rng.normal(size=(lists, candidates, width))),
        related=float32_exact(weights + weights.T),
        query_index=np.array([*range(lists - 1), 0], np.int32),
        teacher=np.where(
            rng.random((lists, candidates)) < 0.8, float32_exact(3.0 * labels + scores / 9.0), np.nan
        ),
    )


@dataclass(frozen=True)
class EncoderCase:
    """A tiny encoder and a batch for it. `config` are numbers of a BERT checkpoint's config.json."""

    config: dict[str, Any]
    input_ids: NDArray[np.int32]  # [N, S] within the vocabulary, random at padding too
    sides: NDArray[np.int8]  # [N, S] 0 padding, 1 query, 2 passage; the last row is padding alone


def random_encoder(seed: int, vocabulary: int, hidden_act: str = "gelu") -> EncoderCase:
    """One or two layers of up to four heads; rows of every length, one of them without a passage."""
    rng = np.random.default_rng(seed)
    heads, per_head = int(rng.integers(1, 5)), int(rng.integers(4, 9))
    rows, length = int(rng.integers(3, 6)), int(rng.integers(4, 24))
    queries = rng.integers(1, length, rows)  # tokens of the query's side
    lengths = rng.integers(queries, length + 1)  # tokens of both
    lengths[0] = length
    lengths[-2], queries[-1], lengths[-1] = queries[-2], 0, 0
    place = np.arange(length)
    sides = (place < lengths[:, None]).astype(np.int8) + (
        (place >= queries[:, None]) & (place < lengths[:, None])
    )
    config = {
        "vocab_size": vocabulary,
        "hidden_size": heads * per_head,
        "num_attention_heads": heads,
        "num_hidden_layers": int(rng.integers(1, 3)),
        "intermediate_size": int(rng.integers(8, 48)),
        "layer_norm_eps": float(10 ** rng.uniform(-3.5, -1.5)),  # far from every default: a wrong one shows
        "hidden_act": hidden_act,
    }
    # Not 0: transformers keeps the gradient of the padding token at 0.
    ids = rng.integers(1, vocabulary, (rows, length), dtype=np.int32)
    return EncoderCase(config, ids, sides.astype(np.int8))


def random_states(rng: np.random.Generator, *shape: int) -> tuple[Array, Array]:
    """Unit states drawn uniformly, (re, im) each `shape`, the last axis being C."""
    re, im = rng.normal(size=shape), rng.normal(size=shape)
    norm = np.sqrt(np.sum(re**2 + im**2, axis=-1, keepdims=True))
    return re / norm, im / norm


def parity_error(ours: Any, reference: Any) -> float:
    """max |a - b| / max(1, max |b|); infinite when a value is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.max(np.abs(a - b), initial=0.0) / max(1.0, np.max(np.abs(b), initial=0.0)))


def numeric_gradient(function: Callable[[Array], float], point: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function in float64, the shape of `point`; error about 1e-9."""
    point = np.array(point, np.float64)
    gradient = np.zeros(point.shape)
    for index in np.ndindex(point.shape):
        value = point[index]
        point[index] = value + step
        above = function(point)
        point[index] = value - step
        gradient[index] = (above - function(point)) / (2.0 * step)
        point[index] = value
    return gradient
