"""Losses of language models: the next token, a teacher's distribution, and the state's phase and magnitude.

A loss is a pair of float32 scalars (numerator, denominator) as in losses/ranking.py; the denominator is the
number of counted tokens. Padding has a zero gradient, and so has a batch in which no token counts.
Source: DESIGN section 3, Indra; Hinton et al. 2015, arXiv:1503.02531.
Reference: common/reference/language.py. Twin: mlx_impl/losses/language.py.

Letters: N rows, S tokens, V vocabulary, k stored logits, C complex width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_impl.losses.ranking import Pair, count, total
from jax_impl.models.projector import EPSILON


class StoredTeacher(NamedTuple):
    """What is kept of a teacher's logits."""

    ids: jax.Array  # [N, S, k] the tokens of the k largest logits
    values: jax.Array  # [N, S, k] those logits
    log_total: jax.Array  # [N, S] logsumexp of all logits / T
    entropy: jax.Array  # [N, S] of the full softmax at temperature 1, in nats


def token_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p_label in nats, logits [N, S, V], labels [N, S] integers -> float32 [N, S]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array, smoothing: float = 0.0) -> Pair:
    """-(1 - smoothing) log p_label - smoothing mean_v log p_v of each counted token.

    logits [N, S, V], labels [N, S] integers, mask [N, S] bool, smoothing in [0, 1). Gradient p - y.
    """
    loss = token_nll(logits, labels)
    if smoothing:
        wide = logits.astype(jnp.float32)
        even = jax.nn.logsumexp(wide, axis=-1) - jnp.mean(wide, axis=-1)
        loss = (1.0 - smoothing) * loss + smoothing * even
    return total(loss, mask), count(mask)


def distillation(
    logits: jax.Array, teacher: jax.Array, mask: jax.Array, temperature: jax.Array | float
) -> Pair:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each counted token.

    logits and teacher [N, S, V], mask [N, S] bool, T > 0. In [0, inf). Gradient T (softmax(s / T) -
    softmax(t / T)); the teacher has none.
    """
    target = log_softmax(jax.lax.stop_gradient(teacher), temperature)  # [N, S, V]
    divergence = jnp.sum(jnp.exp(target) * (target - log_softmax(logits, temperature)), axis=-1)
    return temperature**2 * total(divergence, mask), count(mask)


def store_teacher(teacher: jax.Array, k: int, temperature: float) -> StoredTeacher:
    """The k largest logits of each token of teacher [N, S, V], and what is known of the rest."""
    teacher = teacher.astype(jnp.float32)
    values, ids = jax.lax.top_k(teacher, k)
    log_total = jax.nn.logsumexp(teacher / temperature, axis=-1)
    return StoredTeacher(ids, values, log_total, entropy(teacher))


def stored_distillation(
    logits: jax.Array, stored: StoredTeacher, mask: jax.Array, temperature: jax.Array | float
) -> Pair:
    """As `distillation` of stored logits, with all tokens beyond the k stored ones taken as one.

    A lower bound of it, equal to it at k = V. logits [N, S, V], mask [N, S] bool, T that of storing. Where
    the stored tokens have the teacher's whole mass, to rounding, the rest has a zero gradient.
    """
    vocabulary, k = logits.shape[-1], stored.ids.shape[-1]
    scaled = logits.astype(jnp.float32) / temperature
    log_all = jax.nn.logsumexp(scaled, axis=-1)  # [N, S]
    target = stored.values / temperature - stored.log_total[..., None]  # [N, S, k]
    student = jnp.take_along_axis(scaled, stored.ids, axis=-1) - log_all[..., None]  # [N, S, k]
    divergence = jnp.sum(jnp.exp(target) * (target - student), axis=-1)
    if k < vocabulary:
        others = jnp.put_along_axis(scaled, stored.ids, -1e30, axis=-1, inplace=False)
        log_rest = jax.nn.logsumexp(others, axis=-1) - log_all  # [N, S]
        tail = 1.0 - jnp.sum(jnp.exp(target), axis=-1)
        some = tail > 0
        log_tail = jnp.log(jnp.where(some, tail, 1.0))
        divergence = divergence + jnp.where(some, tail * (log_tail - log_rest), 0.0)
    return temperature**2 * total(divergence, mask), count(mask)


def entropy(logits: jax.Array) -> jax.Array:
    """Of softmax(logits), in nats, [N, S, V] -> float32 [N, S]."""
    log_p = log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def certainty(entropy: jax.Array, vocabulary: int) -> jax.Array:
    """c = 1 - H / log V in [0, 1], of entropies in nats."""
    return 1.0 - entropy / jnp.log(float(vocabulary))


def phase_magnitude(re: jax.Array, im: jax.Array, certainty: jax.Array, mask: jax.Array) -> tuple[Pair, Pair]:
    """Squared errors of mean_j m_j / (1 + m_j), then of |mean_j e^{i phi_j}|, against a certainty.

    re, im [N, S, C], a state that is not normalised, certainty [N, S] in [0, 1], mask [N, S] bool. A token
    adds at most 1 to each. Finite gradients at magnitude 0 and at coherence 0.
    """
    salience, coherence = phase_magnitude_means(re, im)
    return (
        (total((salience - certainty) ** 2, mask), count(mask)),
        (total((coherence - certainty) ** 2, mask), count(mask)),
    )


def phase_magnitude_means(re: jax.Array, im: jax.Array) -> tuple[jax.Array, jax.Array]:
    """mean_j m_j / (1 + m_j) and |mean_j e^{i phi_j}|, each [N, S] in [0, 1]: what certainty is read off."""
    magnitude = jnp.sqrt(re**2 + im**2 + EPSILON)  # [N, S, C]
    salience = jnp.mean(magnitude / (1.0 + magnitude), axis=-1)
    mean_re, mean_im = jnp.mean(re / magnitude, axis=-1), jnp.mean(im / magnitude, axis=-1)
    return salience, jnp.sqrt(mean_re**2 + mean_im**2 + EPSILON)


def log_softmax(logits: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
    """log softmax(logits / T) over the vocabulary, float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
