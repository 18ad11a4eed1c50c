"""Superposition and collapse, resonance, entanglement: the losses of quantum-resonance fine-tuning.

A loss is one or two pairs of float32 scalars (numerator, denominator), to be summed over devices and
micro-batches before `ranking.ratio` divides them; a loss of two pairs is the sum of their ratios.
Weights and ramps are the caller's.
Reference: common/reference/losses.py. Twin: jax_impl/losses/quantum.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.losses.ranking import (
    Pair,
    count,
    counted_candidates,
    listwise_cross_entropy,
    listwise_denominator,
    log_probabilities,
    relevant_candidates,
    total,
)
from mlx_impl.models.projector import State, normalise

Scalar = mx.array | float


def superposition_loss(
    scores: mx.array, labels: mx.array, mask: mx.array, temperature: Scalar, entropy_bonus: Scalar
) -> Pair:
    """-sum_j y_j log p_j - beta H(p) for each list, p = softmax(s / tau): amplitudes sqrt(p), the Born rule.

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool, temperature tau > 0, entropy_bonus beta >= 0.
    Gradient (p - y + beta p (log p + H)) / tau: 0 at padding and with one candidate,
    (p - y) / tau at equal scores.
    """
    log_p = log_probabilities(scores, mask, temperature)  # [B, L]
    entropy = list_entropy(log_p, labels, mask)  # [B]
    cross_entropy = listwise_cross_entropy(log_p, labels, mask)  # [B]
    return mx.sum(cross_entropy - entropy_bonus * entropy), superposition_denominator(labels, mask)


def superposition_denominator(labels: mx.array, mask: mx.array) -> mx.array:
    """Lists that have a positive."""
    return listwise_denominator(labels, mask)


def superposition_entropy(scores: mx.array, labels: mx.array, mask: mx.array, temperature: Scalar) -> Pair:
    """H(p) in nats, for the log: summed over the lists that have a positive, and their number."""
    log_p = log_probabilities(scores, mask, temperature)
    return mx.sum(list_entropy(log_p, labels, mask)), superposition_denominator(labels, mask)


def list_entropy(log_p: mx.array, labels: mx.array, mask: mx.array) -> mx.array:
    """H(p) = -sum_j p_j log p_j in nats, [B, L] -> [B]; 0 for lists without a positive."""
    counted = counted_candidates(labels, mask)
    return -mx.sum(mx.where(counted, mx.exp(log_p) * log_p, 0.0), axis=1)


def resonance_loss(
    resonance: mx.array, labels: mx.array, mask: mx.array, threshold: Scalar, sharpness: Scalar
) -> tuple[Pair, Pair]:
    """Half the BCE of kappa (r_+^2 - theta): towards 1 for relevant pairs, towards 0 for the others.

    resonance [B, L] in [-1, 1], labels [B, L] grades >= 0, mask [B, L] bool, threshold theta in [0, 1]
    (a fidelity), sharpness kappa > 0. Returns the pair of the relevant, then of the others.
    Gradient +-kappa r_+ sigmoid(+-kappa (r_+^2 - theta)): 0 at padding and where r <= 0.
    """
    relevant = relevant_candidates(labels, mask)
    others = counted_candidates(labels, mask) & ~relevant
    positive = mx.maximum(mx.where(mask, resonance.astype(mx.float32), 0.0), 0.0)
    logits = sharpness * (positive**2 - threshold)  # [B, L]
    relevant_count, others_count = resonance_denominator(labels, mask)
    return (
        (total(0.5 * nn.softplus(-logits), relevant), relevant_count),
        (total(0.5 * nn.softplus(logits), others), others_count),
    )


def resonance_denominator(labels: mx.array, mask: mx.array) -> Pair:
    """Relevant candidates, and the other candidates of lists that have a positive."""
    relevant = relevant_candidates(labels, mask)
    return count(relevant), count(counted_candidates(labels, mask) & ~relevant)


def alignment_loss(
    re: mx.array,
    im: mx.array,
    target_re: mx.array,
    target_im: mx.array,
    labels: mx.array,
    mask: mx.array,
) -> Pair:
    """1 - Re<target|psi> for each real candidate: how far a state has moved from where it should be.

    States and their fixed targets [B, L, C], labels, mask [B, L]. Gradient -target; 0 at padding.
    """
    counted = counted_candidates(labels, mask)
    overlap = mx.sum(re.astype(mx.float32) * target_re + im.astype(mx.float32) * target_im, axis=-1)
    return total(1.0 - overlap, counted), count(counted)


def entanglement_loss(
    query_re: mx.array,
    query_im: mx.array,
    labels: mx.array,
    mask: mx.array,
    related: mx.array,
    margin: Scalar,
    query_index: mx.array | None = None,
) -> tuple[Pair, Pair]:
    """Draw the states of related queries together, push those of unrelated queries apart.

    Over pairs a < b of different queries that have a relevant pair: w_ab (1 - Re<a|b>) where w_ab > 0, then
    max(0, Re<a|b> - margin) where w_ab = 0. query_re and query_im [B, L, C]: the query's state beside each
    candidate; labels, mask [B, L]; related w [B, B] in [0, 1], symmetric; margin in [-1, 1];
    query_index [B]: lists of one query form no pair.
    Returns the pair that attracts, then the one that repels. Both and their gradients are
    0 for one query and for padding; a zero state has a finite gradient.
    """
    states = query_states(query_re, query_im, labels, mask)
    attracted, repelled = _query_pairs(labels, mask, related, query_index)  # [B, B]
    # Sums and not a matmul, which newer Apple GPUs may round to fewer bits.
    re, im = (x[:, None] * x[None, :] for x in states)  # [B, B, C]
    overlap = mx.sum(re, axis=-1) + mx.sum(im, axis=-1)  # [B, B]
    return (
        (total(related * (1.0 - overlap), attracted), count(attracted)),
        (total(mx.maximum(0.0, overlap - margin), repelled), count(repelled)),
    )


def entanglement_denominator(
    labels: mx.array, mask: mx.array, related: mx.array, query_index: mx.array | None = None
) -> Pair:
    """Pairs of related queries, and pairs of unrelated queries."""
    attracted, repelled = _query_pairs(labels, mask, related, query_index)
    return count(attracted), count(repelled)


def query_states(query_re: mx.array, query_im: mx.array, labels: mx.array, mask: mx.array) -> State:
    """Normalised mean of a query's states over its relevant pairs, [B, L, C] -> [B, C]; 0 if it has none."""
    relevant = relevant_candidates(labels, mask)[..., None]  # [B, L, 1]
    number = mx.maximum(1.0, mx.sum(relevant.astype(mx.float32), axis=1))  # [B, 1]
    re = mx.sum(mx.where(relevant, query_re.astype(mx.float32), 0.0), axis=1) / number  # [B, C]
    im = mx.sum(mx.where(relevant, query_im.astype(mx.float32), 0.0), axis=1) / number  # [B, C]
    return normalise(re, im)


def _query_pairs(
    labels: mx.array, mask: mx.array, related: mx.array, query_index: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Pairs a < b of different queries that take part, bool [B, B]: the related ones, the unrelated ones."""
    takes_part = mx.any(relevant_candidates(labels, mask), axis=1)  # [B]
    pairs = mx.triu(takes_part[:, None] & takes_part[None, :], k=1)  # [B, B]
    if query_index is not None:
        pairs = pairs & (query_index[:, None] != query_index[None, :])
    return pairs & (related > 0), pairs & (related <= 0)
