"""The losses of language models, in float64 NumPy, with their gradient where that is short.

A loss is a pair (numerator, denominator) as in common/reference/losses.py; the denominator is the number of
counted tokens. Twins: {jax_impl,mlx_impl}/losses/language.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pair = tuple[float, float]
EPSILON = 1e-12


class StoredTeacher(NamedTuple):
    """What is kept of a teacher's logits, [N, S, ...]."""

    ids: NDArray[np.integer[Any]]  # [N, S, k] the tokens of the k largest logits
    values: Array  # [N, S, k] those logits
    log_total: Array  # [N, S] logsumexp of all logits / T
    entropy: Array  # [N, S] of the full softmax at temperature 1, in nats


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(
    logits: Array, labels: NDArray[np.integer[Any]], mask: Mask, smoothing: float = 0.0
) -> Pair:
    """Sum over counted tokens of -(1 - smoothing) log p_label - smoothing mean_v log p_v."""
    log_p = log_softmax(logits)
    target = _targets(logits.shape, labels, smoothing)
    return float(-(target * log_p).sum(-1)[mask].sum()), float(mask.sum())


def cross_entropy_gradient(
    logits: Array, labels: NDArray[np.integer[Any]], mask: Mask, smoothing: float = 0.0
) -> Array:
    """p - y at counted tokens, [N, S, V]."""
    return (np.exp(log_softmax(logits)) - _targets(logits.shape, labels, smoothing)) * mask[..., None]


def distillation(logits: Array, teacher: Array, mask: Mask, temperature: float) -> Pair:
    """Sum over counted tokens of T^2 KL(softmax(t / T) || softmax(s / T))."""
    target, student = log_softmax(teacher / temperature), log_softmax(logits / temperature)
    divergence = (np.exp(target) * (target - student)).sum(-1)
    return temperature**2 * float(divergence[mask].sum()), float(mask.sum())


def distillation_gradient(logits: Array, teacher: Array, mask: Mask, temperature: float) -> Array:
    """T (softmax(s / T) - softmax(t / T)) at counted tokens, [N, S, V]."""
    student, target = (np.exp(log_softmax(x / temperature)) for x in (logits, teacher))
    return temperature * (student - target) * mask[..., None]


def store_teacher(teacher: Array, k: int, temperature: float) -> StoredTeacher:
    """The k largest logits of each token, largest first, and what is known of the rest."""
    ids = np.argsort(-teacher, axis=-1, kind="stable")[..., :k]
    scaled = teacher / temperature
    log_total = scaled.max(-1) + np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1))
    log_p = log_softmax(teacher)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    return StoredTeacher(ids, np.take_along_axis(teacher, ids, -1), log_total, entropy)


def stored_distillation(logits: Array, stored: StoredTeacher, mask: Mask, temperature: float) -> Pair:
    """As distillation, with all tokens beyond the k stored ones as one: a lower bound, equal at k = V."""
    total = 0.0
    for place in zip(*np.nonzero(mask), strict=True):
        student = log_softmax(logits[place] / temperature)
        target = stored.values[place] / temperature - stored.log_total[place]
        known = stored.ids[place]
        total += float(np.exp(target) @ (target - student[known]))
        rest = np.setdiff1d(np.arange(logits.shape[-1]), known)
        tail = 1.0 - float(np.exp(target).sum())
        if len(rest) and tail > 0:
            total += tail * (np.log(tail) - np.log(np.exp(student[rest]).sum()))
    return temperature**2 * total, float(mask.sum())


def certainty(entropy: Array, vocabulary: int) -> Array:
    """c = 1 - H / log V, in [0, 1]."""
    return 1.0 - entropy / np.log(vocabulary)


def phase_magnitude(re: Array, im: Array, certainty: Array, mask: Mask) -> tuple[Pair, Pair]:
    """Squared errors of mean_j m_j / (1 + m_j), and of |mean_j e^{i phi_j}|, against the certainty [N, S]."""
    magnitude = np.sqrt(re**2 + im**2 + EPSILON)
    salience = (magnitude / (1.0 + magnitude)).mean(-1)
    coherence = np.sqrt((re / magnitude).mean(-1) ** 2 + (im / magnitude).mean(-1) ** 2 + EPSILON)
    counted = float(mask.sum())
    return (
        (float(((salience - certainty) ** 2)[mask].sum()), counted),
        (float(((coherence - certainty) ** 2)[mask].sum()), counted),
    )


def _targets(shape: tuple[int, ...], labels: NDArray[np.integer[Any]], smoothing: float) -> Array:
    return (1.0 - smoothing) * np.eye(shape[-1])[labels] + smoothing / shape[-1]
