"""Pointwise, pairwise and listwise ranking losses.

A loss is a pair of float32 scalars (numerator, denominator). Both are summed over devices and micro-batches,
then divided by `ratio`. Denominators depend on the data only. Lists without a positive add 0 to both.
Reference: common/reference/losses.py. Twin: jax_impl/losses/ranking.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

Pair = tuple[mx.array, mx.array]


def ratio(pair: Pair) -> mx.array:
    """numerator / max(1, denominator)."""
    return pair[0] / mx.maximum(1.0, pair[1])


def relevant_candidates(labels: mx.array, mask: mx.array) -> mx.array:
    """Real candidates with a grade above 0, bool [B, L]."""
    return mask & (labels > 0)


def counted_candidates(labels: mx.array, mask: mx.array) -> mx.array:
    """Real candidates of lists that have a positive, bool [B, L]."""
    return mask & mx.any(relevant_candidates(labels, mask), axis=1, keepdims=True)


def total(values: mx.array, where: mx.array) -> mx.array:
    """Sum of the values selected by `where`, float32; the others have a zero gradient."""
    return mx.sum(mx.where(where, values, 0.0))


def count(where: mx.array) -> mx.array:
    """How many are true, float32."""
    return mx.sum(where.astype(mx.float32))


def pointwise_bce(scores: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """Binary cross-entropy of each candidate, relevant or not: -log sigmoid(s) or -log sigmoid(-s).

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool. Gradient sigmoid(s) - y; 0 at padding.
    """
    counted = counted_candidates(labels, mask)
    scores = mx.where(counted, scores.astype(mx.float32), 0.0)
    target = relevant_candidates(labels, mask).astype(mx.float32)
    return total(nn.softplus(scores) - target * scores, counted), pointwise_denominator(labels, mask)


def pointwise_denominator(labels: mx.array, mask: mx.array) -> mx.array:
    """Candidates of lists that have a positive."""
    return count(counted_candidates(labels, mask))


def listwise_softmax(scores: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """-sum_j y_j log p_j for each list, p = softmax(s), y = labels normalised over the list.

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool.
    Gradient p - y; 0 at padding and with one candidate.
    """
    cross_entropy = listwise_cross_entropy(log_probabilities(scores, mask), labels, mask)  # [B]
    return mx.sum(cross_entropy), listwise_denominator(labels, mask)


def listwise_denominator(labels: mx.array, mask: mx.array) -> mx.array:
    """Lists that have a positive."""
    return count(mx.any(relevant_candidates(labels, mask), axis=1))


def log_probabilities(scores: mx.array, mask: mx.array, temperature: mx.array | float = 1.0) -> mx.array:
    """log softmax(s / temperature) over the real candidates, [B, L] -> [B, L]; 0 at padding."""
    # A finite constant and a second `where`: with -inf an empty list depends on how softmax treats inf - inf.
    logits = mx.where(mask, scores.astype(mx.float32) / temperature, -1e30)
    return mx.where(mask, nn.log_softmax(logits, axis=1), 0.0)


def listwise_cross_entropy(log_p: mx.array, labels: mx.array, mask: mx.array) -> mx.array:
    """-sum_j y_j log p_j, [B]; 0 for lists without a positive."""
    grades = mx.where(relevant_candidates(labels, mask), labels.astype(mx.float32), 0.0)  # [B, L]
    sums = mx.sum(grades, axis=1, keepdims=True)  # [B, 1]
    return -mx.sum(grades / mx.where(sums > 0, sums, 1.0) * log_p, axis=1)


def ranknet(scores: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """-log sigmoid(s_i - s_j) for each pair of a list with y_i > y_j (Burges et al. 2005).

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool. Gradient of a pair -+sigmoid(s_j - s_i); 0 at
    padding and with one candidate, -+1/2 at equal scores.
    """
    return total(pair_losses(scores), ordered_pairs(labels, mask)), ranknet_denominator(labels, mask)


def ranknet_denominator(labels: mx.array, mask: mx.array) -> mx.array:
    """Pairs of a list with different grades."""
    return count(ordered_pairs(labels, mask))


def lambda_loss(scores: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """RankNet's loss of each pair times the NDCG that swapping the two would change, summed over a list.

    |y_i - y_j| |1/log2(1 + rank_i) - 1/log2(1 + rank_j)| / ideal DCG, ranks by the present scores, without a
    gradient; gains are the grades, as in our nDCG (Burges 2010, LambdaRank; Wang et al. 2018, LambdaLoss).
    scores [B, L], labels [B, L], mask [B, L] bool. Gradient 0 at padding and with one candidate; at equal
    scores candidates rank in their order.
    """
    grades = mx.where(mask, labels.astype(mx.float32), 0.0)  # [B, L]
    discounts = mx.where(mask, 1.0 / mx.log2(1.0 + ranks(scores, mask)), 0.0)  # [B, L]
    places = mx.arange(1.0, labels.shape[1] + 1.0)
    ideal = mx.sum(-mx.sort(-grades, axis=1) / mx.log2(1.0 + places), axis=1)  # [B]
    change = mx.abs(differences(grades)) * mx.abs(differences(discounts))  # [B, L, L]
    weights = change / mx.where(ideal > 0, ideal, 1.0)[:, None, None]
    loss = weights * pair_losses(scores)
    return total(loss, ordered_pairs(labels, mask)), listwise_denominator(labels, mask)


def listnet(scores: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """Cross-entropy of softmax(s) against softmax(y), the chances of being first (Cao et al. 2007).

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool. Gradient softmax(s) - softmax(y); 0 at padding
    and with one candidate.
    """
    target = mx.exp(log_probabilities(labels, mask))  # [B, L], 1 at padding
    counted = counted_candidates(labels, mask)
    return total(-target * log_probabilities(scores, mask), counted), listwise_denominator(labels, mask)


def plistmle(scores: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """-sum_i w_i log P(the i-th best is chosen from the i-th on), w_i = 2^(n - i) - 1 over their sum.

    The likelihood of the list in the order of its grades, ties as they stand, the upper places weighted more
    (Lan et al. 2014, position-aware ListMLE). scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool.
    Gradient 0 at padding and with one candidate.
    """
    order = mx.argsort(mx.where(mask, -labels.astype(mx.float32), mx.inf), axis=1)  # [B, L]
    real = mx.take_along_axis(mask, order, axis=1)
    sorted_scores = mx.take_along_axis(mx.where(mask, scores.astype(mx.float32), -1e30), order, axis=1)
    place = mx.arange(labels.shape[1])  # not logcumsumexp: its gradient is good to 1e-5 only
    ahead = mx.where(place >= place[:, None], sorted_scores[:, None], -1e30)  # [B, L, L]
    rest = mx.logsumexp(ahead, axis=-1)  # [B, L] log of the sum from i on
    last = mx.sum(real, axis=1, keepdims=True) - 1  # [B, 1] n - 1, by whose power of 2 all are divided
    weights = mx.where(real, 0.5**place - 0.5**last, 0.0)  # [B, L]
    sums = mx.sum(weights, axis=1, keepdims=True)
    weights = weights / mx.where(sums > 0, sums, 1.0)
    counted = real & mx.any(relevant_candidates(labels, mask), axis=1, keepdims=True)
    chosen = mx.where(real, rest - sorted_scores, 0.0)
    return total(weights * chosen, counted), listwise_denominator(labels, mask)


def margin_mse(scores: mx.array, labels: mx.array, mask: mx.array, teacher: mx.array) -> Pair:
    """((s_i - s_j) - (t_i - t_j))^2 for each relevant i and irrelevant j that the teacher has scored.

    scores [B, L], labels [B, L] grades >= 0, mask [B, L] bool, teacher [B, L], NaN where unknown
    (Hofstaetter et al. 2020). Gradient of a pair +-2 times the error; 0 at padding and with one candidate.
    """
    known = mx.where(mx.isfinite(teacher), teacher.astype(mx.float32), 0.0)  # [B, L]
    error = differences(scores.astype(mx.float32)) - differences(known)  # [B, L, L]
    return total(error**2, taught_pairs(labels, mask, teacher)), margin_mse_denominator(labels, mask, teacher)


def margin_mse_denominator(labels: mx.array, mask: mx.array, teacher: mx.array) -> mx.array:
    """Pairs of a relevant and an irrelevant candidate that the teacher has scored."""
    return count(taught_pairs(labels, mask, teacher))


def taught_pairs(labels: mx.array, mask: mx.array, teacher: mx.array) -> mx.array:
    """Pairs (i, j) of a relevant and an irrelevant real candidate with a teacher's score, bool [B, L, L]."""
    relevant = relevant_candidates(labels, mask)
    known = mask & mx.isfinite(teacher)
    return (known & relevant)[:, :, None] & (known & ~relevant)[:, None, :]


def soft_labels(
    scores: mx.array, mask: mx.array, teacher: mx.array, temperature: mx.array | float = 1.0
) -> Pair:
    """T^2 KL(softmax(t / T) || softmax(s / T)) over the candidates of a list that the teacher has scored.

    scores [B, L], mask [B, L] bool, teacher [B, L], NaN where unknown, T > 0 (Hinton et al. 2015). Grades
    do not count. Gradient T (softmax(s / T) - softmax(t / T)); 0 at padding and with one candidate.
    """
    known = mask & mx.isfinite(teacher)
    target = log_probabilities(mx.where(known, teacher, 0.0), known, temperature)  # [B, L]
    divergence = mx.exp(target) * (target - log_probabilities(scores, known, temperature))
    return temperature**2 * total(divergence, known), soft_labels_denominator(mask, teacher)


def soft_labels_denominator(mask: mx.array, teacher: mx.array) -> mx.array:
    """Lists with at least two candidates that the teacher has scored."""
    return count(mx.sum(mask & mx.isfinite(teacher), axis=1) > 1)


def differences(values: mx.array) -> mx.array:
    """x_i - x_j, [B, L] -> [B, L, L]."""
    return values[:, :, None] - values[:, None, :]


def pair_losses(scores: mx.array) -> mx.array:
    """-log sigmoid(s_i - s_j), [B, L] -> [B, L, L]."""
    return nn.softplus(-differences(scores.astype(mx.float32)))


def ordered_pairs(labels: mx.array, mask: mx.array) -> mx.array:
    """Pairs (i, j) of real candidates with y_i > y_j, bool [B, L, L]."""
    return mask[:, :, None] & mask[:, None, :] & (differences(labels) > 0)


def ranks(scores: mx.array, mask: mx.array) -> mx.array:
    """Places from 1 by falling score among the real candidates, ties as they stand; float32 [B, L]."""
    order = mx.argsort(mx.where(mask, -scores.astype(mx.float32), mx.inf), axis=1)
    return mx.argsort(order, axis=1).astype(mx.float32) + 1.0
