"""What a retrained reranker keeps of the frozen original: its distribution over a list, and its states.

Labels do not count, so lists without any take part. A loss is a pair (numerator, denominator) as in ranking.
Source: DESIGN section 3, "Modes"; Li and Hoiem 2016 (Learning without Forgetting), arXiv:1606.09282.
Reference: common/reference/losses.py. Twin: jax_impl/losses/preservation.py.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_impl.losses.ranking import Pair, count, soft_labels, total


def preservation_loss(scores: mx.array, original: mx.array, mask: mx.array) -> Pair:
    """KL(p_old || p_new) for each list, p = softmax over the candidates that the original has scored.

    scores [B, L], original [B, L], the frozen model's scores, NaN where unknown, mask [B, L] bool. In
    [0, inf), 0 at equality up to a constant a list. Gradient p_new - p_old; 0 at padding, with one candidate
    and where the original's scores differ by a constant.
    """
    return soft_labels(scores, mask, original)


def state_preservation_loss(
    re: mx.array,
    im: mx.array,
    original_re: mx.array,
    original_im: mx.array,
    mask: mx.array,
) -> Pair:
    """1 - Re<psi_old|psi_new> for each real candidate: how far a state has turned from the original's.

    States [B, L, C] of unit norm, mask [B, L] bool. In [0, 2] a candidate, 0 at equality. Gradient
    -psi_old; 0 at padding.
    """
    overlap = mx.sum(re.astype(mx.float32) * original_re + im.astype(mx.float32) * original_im, axis=-1)
    return total(1.0 - overlap, mask), count(mask)
