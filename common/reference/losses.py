"""Every ranking and quantum loss, in float64 NumPy, with its gradient where that is short.

A loss is a pair (numerator, denominator): both are summed over devices and micro-batches, then divided as
numerator / max(1, denominator). Gradients are those of the numerator.
Twins: {jax_impl,mlx_impl}/losses/{ranking,quantum,preservation}.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.reference.projector import normalise

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pair = tuple[float, float]


def ratio(pair: Pair) -> float:
    """numerator / max(1, denominator)."""
    return pair[0] / max(1.0, pair[1])


def _counted(labels: Array, mask: Mask) -> tuple[Mask, Mask]:
    """Relevant candidates, and all real candidates, of the lists that have a positive; both [B, L]."""
    relevant = mask & (labels > 0)
    return relevant, mask & relevant.any(axis=1, keepdims=True)


def pointwise_bce(scores: Array, labels: Array, mask: Mask) -> Pair:
    """Sum over candidates of BCE(s, label > 0), and their number."""
    relevant, counted = _counted(labels, mask)
    loss = np.logaddexp(0.0, scores) - relevant * scores
    return float(loss[counted].sum()), float(counted.sum())


def pointwise_bce_gradient(scores: Array, labels: Array, mask: Mask) -> Array:
    """sigmoid(s) - y, [B, L]."""
    relevant, counted = _counted(labels, mask)
    return np.where(counted, np.exp(-np.logaddexp(0.0, -scores)) - relevant, 0.0)


def listwise_softmax(scores: Array, labels: Array, mask: Mask) -> Pair:
    """Sum over lists of -sum_j y_j log p_j, p = softmax(s), y = labels normalised; and their number."""
    return superposition_loss(scores, labels, mask, 1.0, 0.0)


def superposition_loss(
    scores: Array, labels: Array, mask: Mask, temperature: float, entropy_bonus: float
) -> Pair:
    """Sum over lists of -sum_j y_j log p_j - beta H(p), p = softmax(s / tau); and their number."""
    total, lists = 0.0, 0
    for row, real in zip(*_list_rows(scores, labels, mask), strict=True):
        y, log_p = _targets(labels[row, real]), _log_softmax(scores[row, real] / temperature)
        total += -np.sum(y * log_p) - entropy_bonus * _entropy(log_p)
        lists += 1
    return float(total), float(lists)


def superposition_loss_gradient(
    scores: Array, labels: Array, mask: Mask, temperature: float, entropy_bonus: float
) -> Array:
    """(p - y + beta p (log p + H)) / tau, [B, L]."""
    gradient = np.zeros(scores.shape)
    for row, real in zip(*_list_rows(scores, labels, mask), strict=True):
        y, log_p = _targets(labels[row, real]), _log_softmax(scores[row, real] / temperature)
        p = np.exp(log_p)
        bonus = entropy_bonus * p * (log_p + _entropy(log_p))
        gradient[row, real] = (p - y + bonus) / temperature
    return gradient


def superposition_entropy(scores: Array, labels: Array, mask: Mask, temperature: float) -> Pair:
    """Sum over lists of H(p) in nats, and their number."""
    rows = zip(*_list_rows(scores, labels, mask), strict=True)
    entropies = [_entropy(_log_softmax(scores[row, real] / temperature)) for row, real in rows]
    return float(sum(entropies)), float(len(entropies))


def _list_rows(scores: Array, labels: Array, mask: Mask) -> tuple[list[int], list[Any]]:
    """Indices of the lists with a positive, and the real candidates of each."""
    rows = [row for row in range(len(scores)) if (mask[row] & (labels[row] > 0)).any()]
    return rows, [np.flatnonzero(mask[row]) for row in rows]


def _targets(labels: Array) -> Array:
    return labels / labels.sum()


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _entropy(log_p: Array) -> float:
    return float(-np.sum(np.exp(log_p) * log_p))


def ranknet(scores: Array, labels: Array, mask: Mask) -> Pair:
    """Sum over pairs of a list with y_i > y_j of -log sigmoid(s_i - s_j), and their number."""
    pairs = list(_ordered_pairs(labels, mask))
    losses = [np.logaddexp(0.0, scores[row, j] - scores[row, i]) for row, i, j in pairs]
    return float(sum(losses)), float(len(pairs))


def ranknet_gradient(scores: Array, labels: Array, mask: Mask) -> Array:
    """-+sigmoid(s_j - s_i) of each pair, [B, L]."""
    return _pair_gradient(scores, {pair: 1.0 for pair in _ordered_pairs(labels, mask)})


def lambda_loss(scores: Array, labels: Array, mask: Mask) -> Pair:
    """RankNet's pairs weighted by the NDCG that swapping the two changes; and the lists with a positive."""
    weights = _swaps(scores, labels, mask)
    losses = [
        weight * np.logaddexp(0.0, scores[row, j] - scores[row, i]) for (row, i, j), weight in weights.items()
    ]
    return float(sum(losses)), float(len(_list_rows(scores, labels, mask)[0]))


def lambda_loss_gradient(scores: Array, labels: Array, mask: Mask) -> Array:
    """That of RankNet's pairs times their weights, which have none, [B, L]."""
    return _pair_gradient(scores, _swaps(scores, labels, mask))


def listnet(scores: Array, labels: Array, mask: Mask) -> Pair:
    """Sum over lists of -sum_j softmax(y)_j log softmax(s)_j, and their number."""
    total, rows = 0.0, _list_rows(scores, labels, mask)
    for row, real in zip(*rows, strict=True):
        total -= float(np.exp(_log_softmax(labels[row, real])) @ _log_softmax(scores[row, real]))
    return total, float(len(rows[0]))


def listnet_gradient(scores: Array, labels: Array, mask: Mask) -> Array:
    """softmax(s) - softmax(y), [B, L]."""
    gradient = np.zeros(scores.shape)
    for row, real in zip(*_list_rows(scores, labels, mask), strict=True):
        gradient[row, real] = np.exp(_log_softmax(scores[row, real])) - np.exp(
            _log_softmax(labels[row, real])
        )
    return gradient


def plistmle(scores: Array, labels: Array, mask: Mask) -> Pair:
    """Sum over lists of -sum_i w_i log P(i-th best | from i on), w_i = 2^(n - i) - 1 over their sum."""
    total, rows = 0.0, _list_rows(scores, labels, mask)
    for row, real in zip(*rows, strict=True):
        order = real[np.argsort(-labels[row, real], kind="stable")]
        for place, weight in enumerate(_position_weights(len(order))):
            total -= weight * _log_softmax(scores[row, order[place:]])[0]
    return float(total), float(len(rows[0]))


def plistmle_gradient(scores: Array, labels: Array, mask: Mask) -> Array:
    """Sum over i of w_i (softmax from i on - one at i), [B, L]."""
    gradient = np.zeros(scores.shape)
    for row, real in zip(*_list_rows(scores, labels, mask), strict=True):
        order = real[np.argsort(-labels[row, real], kind="stable")]
        for place, weight in enumerate(_position_weights(len(order))):
            gradient[row, order[place:]] += weight * np.exp(_log_softmax(scores[row, order[place:]]))
            gradient[row, order[place]] -= weight
    return gradient


def margin_mse(scores: Array, labels: Array, mask: Mask, teacher: Array) -> Pair:
    """Sum over taught pairs of ((s_i - s_j) - (t_i - t_j))^2, and their number."""
    pairs = list(_taught_pairs(labels, mask, teacher))
    errors = [scores[r, i] - scores[r, j] - teacher[r, i] + teacher[r, j] for r, i, j in pairs]
    return float(np.sum(np.square(errors))), float(len(pairs))


def margin_mse_gradient(scores: Array, labels: Array, mask: Mask, teacher: Array) -> Array:
    """+-2 times the error of each pair, [B, L]."""
    gradient = np.zeros(scores.shape)
    for row, i, j in _taught_pairs(labels, mask, teacher):
        error = scores[row, i] - scores[row, j] - teacher[row, i] + teacher[row, j]
        gradient[row, i] += 2.0 * error
        gradient[row, j] -= 2.0 * error
    return gradient


def soft_labels(scores: Array, mask: Mask, teacher: Array, temperature: float) -> Pair:
    """Sum over lists of T^2 KL(softmax(t / T) || softmax(s / T)); and those with two taught candidates."""
    total, lists = 0.0, 0
    for row, known in enumerate(mask & np.isfinite(teacher)):
        if known.sum() > 1:
            target = _log_softmax(teacher[row, known] / temperature)
            student = _log_softmax(scores[row, known] / temperature)
            total, lists = total + temperature**2 * float(np.exp(target) @ (target - student)), lists + 1
    return total, float(lists)


def soft_labels_gradient(scores: Array, mask: Mask, teacher: Array, temperature: float) -> Array:
    """T (softmax(s / T) - softmax(t / T)), [B, L]."""
    gradient = np.zeros(scores.shape)
    for row, known in enumerate(mask & np.isfinite(teacher)):
        if known.sum() > 1:
            student, target = (
                np.exp(_log_softmax(values[row, known] / temperature)) for values in (scores, teacher)
            )
            gradient[row, known] = temperature * (student - target)
    return gradient


def _taught_pairs(labels: Array, mask: Mask, teacher: Array) -> Iterator[tuple[int, int, int]]:
    """(row, relevant i, irrelevant j) of real candidates with a teacher's score."""
    for row in range(len(labels)):
        known = np.flatnonzero(mask[row] & np.isfinite(teacher[row])).tolist()
        yield from ((row, i, j) for i in known for j in known if labels[row, i] > 0 and labels[row, j] <= 0)


def _position_weights(size: int) -> Array:
    weights = np.asarray(2.0 ** (size - 1 - np.arange(size)) - 1.0, np.float64)
    return np.asarray(weights / max(1.0, float(weights.sum())), np.float64)


def _ordered_pairs(labels: Array, mask: Mask) -> Iterator[tuple[int, int, int]]:
    """(row, i, j) of real candidates with y_i > y_j."""
    for row in range(len(labels)):
        real = np.flatnonzero(mask[row]).tolist()
        yield from ((row, i, j) for i in real for j in real if labels[row, i] > labels[row, j])


def _swaps(scores: Array, labels: Array, mask: Mask) -> dict[tuple[int, int, int], float]:
    """Ordered pair -> the NDCG that swapping the two changes, at the present ranks."""
    weights = {}
    for row, i, j in _ordered_pairs(labels, mask):
        real = np.flatnonzero(mask[row])
        ranked = real[np.argsort(-scores[row, real], kind="stable")]
        discount = {candidate: 1.0 / np.log2(2.0 + place) for place, candidate in enumerate(ranked)}
        best = np.sort(labels[row, real])[::-1]
        ideal = best @ (1.0 / np.log2(2.0 + np.arange(len(best))))
        gain = labels[row, i] - labels[row, j]
        weights[row, i, j] = float(gain * abs(discount[i] - discount[j]) / ideal)
    return weights


def _pair_gradient(scores: Array, weights: Mapping[tuple[int, int, int], float]) -> Array:
    gradient = np.zeros(scores.shape)
    for (row, i, j), weight in weights.items():
        slope = weight * np.exp(-np.logaddexp(0.0, scores[row, i] - scores[row, j]))
        gradient[row, i] -= slope
        gradient[row, j] += slope
    return gradient


def resonance_loss(
    resonance: Array, labels: Array, mask: Mask, threshold: float, sharpness: float
) -> tuple[Pair, Pair]:
    """((relevant numerator, count), (others' numerator, count)) of BCE(kappa (r_+^2 - theta), y) / 2."""
    relevant, counted = _counted(labels, mask)
    others = counted & ~relevant
    logits = sharpness * (np.maximum(resonance, 0.0) ** 2 - threshold)
    pull, push = 0.5 * np.logaddexp(0.0, -logits), 0.5 * np.logaddexp(0.0, logits)
    return (
        (float(pull[relevant].sum()), float(relevant.sum())),
        (float(push[others].sum()), float(others.sum())),
    )


def resonance_loss_gradient(
    resonance: Array, labels: Array, mask: Mask, threshold: float, sharpness: float
) -> tuple[Array, Array]:
    """Gradients [B, L] of the two numerators: +-1/2 sigmoid(+-logit) 2 kappa r_+."""
    relevant, counted = _counted(labels, mask)
    positive = np.maximum(resonance, 0.0)
    logits = sharpness * (positive**2 - threshold)
    slope = sharpness * positive
    pull = -slope * np.exp(-np.logaddexp(0.0, logits))
    push = slope * np.exp(-np.logaddexp(0.0, -logits))
    return np.where(relevant, pull, 0.0), np.where(counted & ~relevant, push, 0.0)


def alignment_loss(
    re: Array, im: Array, target_re: Array, target_im: Array, labels: Array, mask: Mask
) -> Pair:
    """Sum of 1 - Re<target|psi> over the real candidates of lists that have a positive, and their number."""
    _, counted = _counted(labels, mask)
    overlap = (re * target_re + im * target_im).sum(-1)
    return float((1.0 - overlap)[counted].sum()), float(counted.sum())


def alignment_loss_gradient(
    target_re: Array, target_im: Array, labels: Array, mask: Mask
) -> tuple[Array, Array]:
    """Of the numerator by re and by im: -target, 0 elsewhere."""
    _, counted = _counted(labels, mask)
    return -target_re * counted[..., None], -target_im * counted[..., None]


def entanglement_loss(
    query_re: Array,
    query_im: Array,
    labels: Array,
    mask: Mask,
    related: Array,
    margin: float,
    query_index: NDArray[np.integer[Any]] | None = None,
) -> tuple[Pair, Pair]:
    """((attract numerator, pairs), (repel numerator, pairs)) over pairs a < b of different queries.

    attract: w_ab (1 - Re<a|b>) where w_ab > 0; repel: max(0, Re<a|b> - margin) where w_ab = 0.
    """
    states = {}
    for row in range(len(labels)):
        relevant = mask[row] & (labels[row] > 0)
        if relevant.any():
            states[row] = normalise(query_re[row, relevant].mean(0), query_im[row, relevant].mean(0))
    attract, repel, pulled, pushed = 0.0, 0.0, 0, 0
    for a, (a_re, a_im) in states.items():
        for b, (b_re, b_im) in states.items():
            if a >= b or (query_index is not None and query_index[a] == query_index[b]):
                continue
            overlap = a_re @ b_re + a_im @ b_im
            if related[a, b] > 0:
                attract, pulled = attract + related[a, b] * (1.0 - overlap), pulled + 1
            else:
                repel, pushed = repel + max(0.0, float(overlap) - margin), pushed + 1
    return (float(attract), float(pulled)), (float(repel), float(pushed))


def preservation_loss(scores: Array, original: Array, mask: Mask) -> Pair:
    """Sum over lists of KL(softmax(s_old) || softmax(s_new)) over the candidates that the original has
    scored, and the lists with at least two of them; labels do not count."""
    total, lists = 0.0, 0
    for row, known in enumerate(mask & np.isfinite(original)):
        if known.sum() > 1:
            old, new = _log_softmax(original[row, known]), _log_softmax(scores[row, known])
            total, lists = total + float(np.exp(old) @ (old - new)), lists + 1
    return total, float(lists)


def preservation_loss_gradient(scores: Array, original: Array, mask: Mask) -> Array:
    """p_new - p_old, [B, L]."""
    gradient = np.zeros(scores.shape)
    for row, known in enumerate(mask & np.isfinite(original)):
        if known.sum() > 1:
            old, new = (np.exp(_log_softmax(values[row, known])) for values in (original, scores))
            gradient[row, known] = new - old
    return gradient


def state_preservation_loss(re: Array, im: Array, original_re: Array, original_im: Array, mask: Mask) -> Pair:
    """Sum of 1 - Re<psi_old|psi_new> over the real candidates, and their number; labels do not count."""
    overlap = (re * original_re + im * original_im).sum(-1)
    return float((1.0 - overlap)[mask].sum()), float(mask.sum())


def state_preservation_loss_gradient(
    original_re: Array, original_im: Array, mask: Mask
) -> tuple[Array, Array]:
    """Of the numerator by re and by im: -psi_old, 0 at padding."""
    return -original_re * mask[..., None], -original_im * mask[..., None]
