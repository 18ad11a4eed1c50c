"""Pointwise, pairwise and listwise ranking losses.

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


def ranknet(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """-log sigmoid(s_i - s_j) for each pair of a list with y_i > y_j (Burges et al. 2005).

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool. Gradient of a pair -+sigmoid(s_j - s_i); 0 at
    padding and with one candidate, -+1/2 at equal scores.
    """
    return total(pair_losses(scores), ordered_pairs(labels, mask)), ranknet_denominator(labels, mask)


def ranknet_denominator(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Pairs of a list with different grades."""
    return count(ordered_pairs(labels, mask))


def lambda_loss(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """RankNet's loss of each pair times the NDCG that swapping the two would change, summed over a list.

    |y_i - y_j| |1/log2(1 + rank_i) - 1/log2(1 + rank_j)| / ideal DCG, ranks by the present scores, without a
    gradient; gains are the grades, as in our nDCG (Burges 2010, LambdaRank; Wang et al. 2018, LambdaLoss).
    scores [B, L], labels [B, L], mask [B, L] bool. Gradient 0 at padding and with one candidate; at equal
    scores candidates rank in their order.
    """
    grades = jnp.where(mask, labels.astype(jnp.float32), 0.0)  # [B, L]
    discounts = jnp.where(mask, 1.0 / jnp.log2(1.0 + ranks(scores, mask)), 0.0)  # [B, L]
    places = jnp.arange(1.0, labels.shape[1] + 1.0)
    ideal = jnp.sum(-jnp.sort(-grades, axis=1) / jnp.log2(1.0 + places), axis=1)  # [B]
    change = jnp.abs(differences(grades)) * jnp.abs(differences(discounts))  # [B, L, L]
    weights = change / jnp.where(ideal > 0, ideal, 1.0)[:, None, None]
    loss = weights * pair_losses(scores)
    return total(loss, ordered_pairs(labels, mask)), listwise_denominator(labels, mask)


def listnet(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """Cross-entropy of softmax(s) against softmax(y), the chances of being first (Cao et al. 2007).

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool. Gradient softmax(s) - softmax(y); 0 at padding
    and with one candidate.
    """
    target = jnp.exp(log_probabilities(labels, mask))  # [B, L], 1 at padding
    counted = counted_candidates(labels, mask)
    return total(-target * log_probabilities(scores, mask), counted), listwise_denominator(labels, mask)


def plistmle(scores: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """-sum_i w_i log P(the i-th best is chosen from the i-th on), w_i = 2^(n - i) - 1 over their sum.

    The likelihood of the list in the order of its grades, ties as they stand, the upper places weighted more
    (Lan et al. 2014, position-aware ListMLE). scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool.
    Gradient 0 at padding and with one candidate.
    """
    order = jnp.argsort(jnp.where(mask, -labels.astype(jnp.float32), jnp.inf), axis=1, stable=True)  # [B, L]
    real = jnp.take_along_axis(mask, order, axis=1)
    sorted_scores = jnp.take_along_axis(jnp.where(mask, scores.astype(jnp.float32), -1e30), order, axis=1)
    rest = jax.lax.cumlogsumexp(sorted_scores, axis=1, reverse=True)  # [B, L] log of the sum from i on
    last = jnp.sum(real, axis=1, keepdims=True) - 1  # [B, 1] n - 1, by whose power of 2 all are divided
    weights = jnp.where(real, 0.5 ** jnp.arange(labels.shape[1]) - 0.5**last, 0.0)  # [B, L]
    sums = jnp.sum(weights, axis=1, keepdims=True)
    weights = weights / jnp.where(sums > 0, sums, 1.0)
    counted = real & jnp.any(relevant_candidates(labels, mask), axis=1, keepdims=True)
    chosen = jnp.where(real, rest - sorted_scores, 0.0)
    return total(weights * chosen, counted), listwise_denominator(labels, mask)


def margin_mse(scores: jax.Array, labels: jax.Array, mask: jax.Array, teacher: jax.Array) -> Pair:
    """((s_i - s_j) - (t_i - t_j))^2 for each relevant i and irrelevant j that the teacher has scored.

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool, teacher [B, L], NaN where unknown
    (Hofstaetter et al. 2020). Gradient of a pair +-2 times the error; 0 at padding and with one candidate.
    """
    known = jnp.where(jnp.isfinite(teacher), teacher.astype(jnp.float32), 0.0)  # [B, L]
    error = differences(scores.astype(jnp.float32)) - differences(known)  # [B, L, L]
    return total(error**2, taught_pairs(labels, mask, teacher)), margin_mse_denominator(labels, mask, teacher)


def margin_mse_denominator(labels: jax.Array, mask: jax.Array, teacher: jax.Array) -> jax.Array:
    """Pairs of a relevant and an irrelevant candidate that the teacher has scored."""
    return count(taught_pairs(labels, mask, teacher))


def taught_pairs(labels: jax.Array, mask: jax.Array, teacher: jax.Array) -> jax.Array:
    """Pairs (i, j) of a relevant and an irrelevant real candidate with a teacher's score, bool [B, L, L]."""
    relevant = relevant_candidates(labels, mask)
    known = mask & jnp.isfinite(teacher)
    return (known & relevant)[:, :, None] & (known & ~relevant)[:, None, :]


def soft_labels(
    scores: jax.Array, mask: jax.Array, teacher: jax.Array, temperature: jax.Array | float = 1.0
) -> Pair:
    """T^2 KL(softmax(t / T) || softmax(s / T)) over the candidates of a list that the teacher has scored.

    scores [B, L], mask [B, L] bool, teacher [B, L], NaN where unknown, T > 0 (Hinton et al. 2015). Grades
    do not count. Gradient T (softmax(s / T) - softmax(t / T)); 0 at padding and with one candidate.
    """
    known = mask & jnp.isfinite(teacher)
    target = log_probabilities(jnp.where(known, teacher, 0.0), known, temperature)  # [B, L]
    divergence = jnp.exp(target) * (target - log_probabilities(scores, known, temperature))
    return temperature**2 * total(divergence, known), soft_labels_denominator(mask, teacher)


def soft_labels_denominator(mask: jax.Array, teacher: jax.Array) -> jax.Array:
    """Lists with at least two candidates that the teacher has scored."""
    return count(jnp.sum(mask & jnp.isfinite(teacher), axis=1) > 1)


def differences(values: jax.Array) -> jax.Array:
    """x_i - x_j, [B, L] -> [B, L, L]."""
    return values[:, :, None] - values[:, None, :]


def pair_losses(scores: jax.Array) -> jax.Array:
    """-log sigmoid(s_i - s_j), [B, L] -> [B, L, L]."""
    return jax.nn.softplus(-differences(scores.astype(jnp.float32)))


def ordered_pairs(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Pairs (i, j) of real candidates with y_i > y_j, bool [B, L, L]."""
    return mask[:, :, None] & mask[:, None, :] & (differences(labels) > 0)


def ranks(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Places from 1 by falling score among the real candidates, ties as they stand; float32 [B, L]."""
    order = jnp.argsort(jnp.where(mask, -scores.astype(jnp.float32), jnp.inf), axis=1, stable=True)
    return jnp.argsort(order, axis=1).astype(jnp.float32) + 1.0
