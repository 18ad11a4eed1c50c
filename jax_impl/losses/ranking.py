"""Pointwise and listwise ranking losses.

A loss is a pair of float32 scalars (numerator, denominator). Both are summed over devices and micro-batches,
then divided by `ratio`. Denominators depend on the data only. Lists without a positive add 0 to both.
Reference: common/reference/losses.py. Twin: mlx_impl/losses/ranking.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def ratio(pair: Pair) -> jax.Array:
    """numerator / max(1, denominator)."""
    return pair[0] / jnp.maximum(1.0, pair[1])


def relevant_candidates(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Real candidates with a grade above 0, bool [B, L]."""
    return mask & (labels > 0)


def counted_candidates(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Real candidates of lists that have a positive, bool [B, L]."""
    return mask & jnp.any(relevant_candidates(labels, mask), axis=1, keepdims=True)


def total(values: jax.Array, where: jax.Array) -> jax.Array:
    """Sum of the values selected by `where`, float32; the others have a zero gradient."""
    return jnp.sum(jnp.where(where, values, 0.0))


def count(where: jax.Array) -> jax.Array:
    """How many are true, float32."""
    return jnp.sum(where.astype(jnp.float32))


def pointwise_bce(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """Binary cross-entropy of each candidate, relevant or not: -log sigmoid(s) or -log sigmoid(-s).

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool. Gradient sigmoid(s) - y; 0 at padding.
    """
    counted = counted_candidates(labels, mask)
    scores = jnp.where(counted, scores.astype(jnp.float32), 0.0)
    target = relevant_candidates(labels, mask).astype(jnp.float32)
    return total(jax.nn.softplus(scores) - target * scores, counted), pointwise_denominator(labels, mask)


def pointwise_denominator(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Candidates of lists that have a positive."""
    return count(counted_candidates(labels, mask))


def listwise_softmax(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """-sum_j y_j log p_j for each list, p = softmax(s), y = labels normalised over the list.

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool.
    Gradient p - y; 0 at padding and with one candidate.
    """
    cross_entropy = listwise_cross_entropy(log_probabilities(scores, mask), labels, mask)  # [B]
    return jnp.sum(cross_entropy), listwise_denominator(labels, mask)


def listwise_denominator(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Lists that have a positive."""
    return count(jnp.any(relevant_candidates(labels, mask), axis=1))


def log_probabilities(scores: jax.Array, mask: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
    """log softmax(s / temperature) over the real candidates, [B, L] -> [B, L]; 0 at padding."""
    # A finite constant and a second `where`: with -inf an empty list depends on how softmax treats inf - inf.
    logits = jnp.where(mask, scores.astype(jnp.float32) / temperature, -1e30)
    return jnp.where(mask, jax.nn.log_softmax(logits, axis=1), 0.0)


def listwise_cross_entropy(log_p: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """-sum_j y_j log p_j, [B]; 0 for lists without a positive."""
    grades = jnp.where(relevant_candidates(labels, mask), labels.astype(jnp.float32), 0.0)  # [B, L]
    sums = jnp.sum(grades, axis=1, keepdims=True)  # [B, 1]
    return -jnp.sum(grades / jnp.where(sums > 0, sums, 1.0) * log_p, axis=1)
