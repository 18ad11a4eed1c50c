"""Losses of language models: the next token, a teacher's distribution, and the state's phase and magnitude.

A loss is a pair of float32 scalars (numerator, denominator) as in losses/ranking.py; the denominator is the
number of counted tokens. Padding has a zero gradient, and so has a batch in which no token counts.
Source: DESIGN section 3, Indra; Hinton et al. 2015, arXiv:1503.02531.
Reference: common/reference/language.py. Twin: jax_impl/losses/language.py.

Letters: N rows, S tokens, V vocabulary, k stored logits, C complex width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

from mlx_impl.losses.ranking import Pair, count, total
from mlx_impl.models.projector import EPSILON


class StoredTeacher(NamedTuple):
    """What is kept of a teacher's logits."""

    ids: mx.array  # [N, S, k] the tokens of the k largest logits
    values: mx.array  # [N, S, k] those logits
    log_total: mx.array  # [N, S] logsumexp of all logits / T
    entropy: mx.array  # [N, S] of the full softmax at temperature 1, in nats


def token_nll(logits: mx.array, labels: mx.array) -> mx.array:
    """-log p_label in nats, logits [N, S, V], labels [N, S] integers -> float32 [N, S]."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def cross_entropy(logits: mx.array, labels: mx.array, mask: mx.array, smoothing: float = 0.0) -> Pair:
    """-(1 - smoothing) log p_label - smoothing mean_v log p_v of each counted token.

    logits [N, S, V], labels [N, S] integers, mask [N, S] bool, smoothing in [0, 1). Gradient p - y.
    """
    loss = token_nll(logits, labels)
    if smoothing:
        wide = logits.astype(mx.float32)
        even = mx.logsumexp(wide, axis=-1) - mx.mean(wide, axis=-1)
        loss = (1.0 - smoothing) * loss + smoothing * even
    return total(loss, mask), count(mask)


def distillation(logits: mx.array, teacher: mx.array, mask: mx.array, temperature: mx.array | float) -> Pair:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each counted token.

    logits and teacher [N, S, V], mask [N, S] bool, T > 0. In [0, inf). Gradient T (softmax(s / T) -
    softmax(t / T)); the teacher has none.
    """
    target = log_softmax(mx.stop_gradient(teacher), temperature)  # [N, S, V]
    divergence = mx.sum(mx.exp(target) * (target - log_softmax(logits, temperature)), axis=-1)
    return temperature**2 * total(divergence, mask), count(mask)


def store_teacher(teacher: mx.array, k: int, temperature: float) -> StoredTeacher:
    """The k largest logits of each token of teacher [N, S, V], and what is known of the rest."""
    teacher = teacher.astype(mx.float32)
    ids = mx.argsort(-teacher, axis=-1)[..., :k]
    values = mx.take_along_axis(teacher, ids, axis=-1)
    log_total = mx.logsumexp(teacher / temperature, axis=-1)
    return StoredTeacher(ids, values, log_total, entropy(teacher))


def stored_distillation(
    logits: mx.array, stored: StoredTeacher, mask: mx.array, temperature: mx.array | float
) -> Pair:
    """As `distillation` of stored logits, with all tokens beyond the k stored ones taken as one.

    A lower bound of it, equal to it at k = V. logits [N, S, V], mask [N, S] bool, T that of storing. Where
    the stored tokens have the teacher's whole mass, to rounding, the rest has a zero gradient.
    """
    vocabulary, k = logits.shape[-1], stored.ids.shape[-1]
    scaled = logits.astype(mx.float32) / temperature
    log_all = mx.logsumexp(scaled, axis=-1)  # [N, S]
    target = stored.values / temperature - stored.log_total[..., None]  # [N, S, k]
    student = mx.take_along_axis(scaled, stored.ids, axis=-1) - log_all[..., None]  # [N, S, k]
    divergence = mx.sum(mx.exp(target) * (target - student), axis=-1)
    if k < vocabulary:
        others = mx.put_along_axis(scaled, stored.ids, mx.array(-1e30), axis=-1)
        log_rest = mx.logsumexp(others, axis=-1) - log_all  # [N, S]
        tail = 1.0 - mx.sum(mx.exp(target), axis=-1)
        some = tail > 0
        log_tail = mx.log(mx.where(some, tail, 1.0))
        divergence = divergence + mx.where(some, tail * (log_tail - log_rest), 0.0)
    return temperature**2 * total(divergence, mask), count(mask)


def entropy(logits: mx.array) -> mx.array:
    """Of softmax(logits), in nats, [N, S, V] -> float32 [N, S]."""
    log_p = log_softmax(logits)
    return -mx.sum(mx.exp(log_p) * log_p, axis=-1)


def certainty(entropy: mx.array, vocabulary: int) -> mx.array:
    """c = 1 - H / log V in [0, 1], of entropies in nats."""
    return 1.0 - entropy / math.log(vocabulary)


def phase_magnitude(re: mx.array, im: mx.array, certainty: mx.array, mask: mx.array) -> tuple[Pair, Pair]:
    """Squared errors of mean_j m_j / (1 + m_j), then of |mean_j e^{i phi_j}|, against a certainty.

    re, im [N, S, C], a state that is not normalised, certainty [N, S] in [0, 1], mask [N, S] bool. A token
    adds at most 1 to each. Finite gradients at magnitude 0 and at coherence 0.
    """
    salience, coherence = phase_magnitude_means(re, im)
    return (
        (total((salience - certainty) ** 2, mask), count(mask)),
        (total((coherence - certainty) ** 2, mask), count(mask)),
    )


def phase_magnitude_means(re: mx.array, im: mx.array) -> tuple[mx.array, mx.array]:
    """mean_j m_j / (1 + m_j) and |mean_j e^{i phi_j}|, each [N, S] in [0, 1]: what certainty is read off."""
    magnitude = mx.sqrt(re**2 + im**2 + EPSILON)  # [N, S, C]
    salience = mx.mean(magnitude / (1.0 + magnitude), axis=-1)
    mean_re, mean_im = mx.mean(re / magnitude, axis=-1), mx.mean(im / magnitude, axis=-1)
    return salience, mx.sqrt(mean_re**2 + mean_im**2 + EPSILON)


def log_softmax(logits: mx.array, temperature: mx.array | float = 1.0) -> mx.array:
    """log softmax(logits / T) over the vocabulary, float32."""
    scaled = logits.astype(mx.float32) / temperature
    return scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
