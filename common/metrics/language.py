"""Metrics of language models and of what they generate: perplexity, repetition, diversity, BLEU, memory.

Source: Holtzman et al. 2020 (repetition of human text); Papineni et al. 2002 (BLEU), through sacrebleu (Post
2018); Zhu et al. 2018 (Self-BLEU); Grave et al. 2017 (perplexity with what earlier test text left).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.checkpoint import json_numbers

DISTINCT_WINDOW = 100  # tokens
BLEU_ORDERS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Perplexity:
    """Of a split: e^(mean NLL), by three units, each with its standard error over documents."""

    documents: int
    tokens: int  # counted
    words: int  # of the original text, an end of line as one
    bytes: int
    nll: float  # nats, summed over the tokens
    token: float  # e^(nll / tokens), >= 1
    token_se: float  # standard errors; NaN of a single document
    word: float  # e^(nll / words): comparable between tokenizers
    word_se: float
    bits_per_byte: float
    bits_per_byte_se: float

    def json(self) -> dict[str, Any]:
        """As JSON values, null where a number is not finite."""
        return json_numbers(asdict(self))

    def line(self) -> str:
        """The three numbers with their errors, for a terminal."""
        return (
            f"perplexity {self.token:.2f} ± {self.token_se:.2f} a token, "
            f"{self.word:.2f} ± {self.word_se:.2f} a word, "
            f"{self.bits_per_byte:.4f} ± {self.bits_per_byte_se:.4f} bits a byte "
            f"({self.tokens:,} tokens, {self.words:,} words, {self.documents:,} documents)"
        )


def perplexity(nll: np.ndarray, tokens: np.ndarray, words: np.ndarray, bytes_: np.ndarray) -> Perplexity:
    """Of documents, all arguments [N]: nats, and counted tokens, words, bytes of each.

    The error is that of a ratio of sums over documents, drawn whole: tokens of one text are not independent.
    ValueError without a token, or for a NLL that is not finite.
    """
    if not tokens.sum() or not np.isfinite(nll).all():
        raise ValueError("perplexity needs a counted token and finite log-likelihoods")
    token, token_se = _ratio(nll, tokens)
    word, word_se = _ratio(nll, words)
    byte, byte_se = _ratio(nll, bytes_)
    return Perplexity(
        documents=len(nll),
        tokens=int(tokens.sum()),
        words=int(words.sum()),
        bytes=int(bytes_.sum()),
        nll=float(nll.sum()),
        token=_exp(token),
        token_se=_exp(token) * token_se,  # the delta method
        word=_exp(word),
        word_se=_exp(word) * word_se,
        bits_per_byte=byte / math.log(2),
        bits_per_byte_se=byte_se / math.log(2),
    )


def _ratio(total: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """sum(total) / sum(units), and its standard error over the rows; NaN of one row."""
    ratio = float(total.sum() / max(units.sum(), 1))
    if len(total) < 2:
        return ratio, math.nan
    residual = total - ratio * units
    variance = len(total) / (len(total) - 1) * float((residual**2).sum())
    return ratio, math.sqrt(variance) / max(float(units.sum()), 1.0)


def perplexity_ratio(nll: np.ndarray, other: np.ndarray, words: np.ndarray) -> dict[str, float]:
    """Perplexity a word of one model over another's, on the same documents: `ratio`, and `low` and `high` of
    its 95 % interval, NaN of a single document. Arguments [N]: nats by each model, and words.

    Paired over documents: how hard a text is drops out. Comparable between tokenizers.
    """
    mean, error = _ratio(nll - other, words)
    ends = {"ratio": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}
    return {name: _exp(value) for name, value in ends.items()}


def _exp(x: float) -> float:
    return math.inf if x >= 700 else math.exp(x)  # NaN stays NaN


def repetition_rate(sequence: Sequence[Any], n: int) -> float:
    """Share of a text's n-grams that stood in it before, in [0, 1): 1 - distinct / all; NaN without one.

    Of token ids it counts token n-grams. Of a str it counts those of characters, which is what the source's
    formula slices and calls n-grams.
    """
    grams = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def distinct_tokens(ids: Sequence[int], window: int = DISTINCT_WINDOW) -> float:
    """Distinct tokens per `window` tokens, over whole windows one after the other; NaN of a shorter text."""
    parts = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    return float(np.mean([len(set(part)) for part in parts])) if parts else math.nan


def unknown_share(ids: Sequence[int], unknown: Sequence[int]) -> float:
    """Share of tokens that are `<unk>` (or spell it), in [0, 1]; NaN of an empty text."""
    return float(np.isin(np.asarray(ids), np.asarray(unknown)).mean()) if len(ids) else math.nan


def text_metrics(
    samples: Sequence[Sequence[int]], texts: Sequence[str], unknown: Sequence[int]
) -> dict[str, float]:
    """Means over samples (ids, text of each) of what needs no reference; those too short are left out."""
    found: dict[str, list[float]] = {"tokens": [float(len(sample)) for sample in samples]}
    for n in (1, 2, 3):
        found[f"repetition_{n}"] = [repetition_rate(sample, n) for sample in samples]
    for n in (1, 2, 3):
        found[f"character_repetition_{n}"] = [repetition_rate(text, n) for text in texts]
    found["distinct_per_100"] = [distinct_tokens(sample) for sample in samples]
    found["unknown_share"] = [unknown_share(sample, unknown) for sample in samples]
    return {name: _mean(values) for name, values in found.items()}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else math.nan


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """bleu_1 .. bleu_4 in [0, 100] of texts against one reference each, over the corpus (sacrebleu, 13a)."""
    from sacrebleu.metrics import BLEU

    return {
        f"bleu_{order}": BLEU(max_ngram_order=order).corpus_score(list(hypotheses), [list(references)]).score
        for order in BLEU_ORDERS
    }


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 in [0, 100] of each text against all others: high where they are alike; NaN below two."""
    from sacrebleu.metrics import BLEU

    if len(texts) < 2:
        return math.nan
    metric = BLEU(effective_order=True)
    scores = [
        metric.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score
        for place, text in enumerate(texts)
    ]
    return float(np.mean(scores))


def memory_statistics(read: np.ndarray, importance: np.ndarray, replaced: np.ndarray) -> dict[str, float]:
    """What a memory of N slots is used for, over T segments (DESIGN section 3, Infinito).

    Args:
      read: [T, N + 1] mean read weight of each slot, the null slot last; rows sum to 1.
      importance: [T, N] in [0, 1].
      replaced: [T] slots that a segment overwrote.

    Returns utilisation in [0, 1], e^entropy of the mean read weights among slots / N; active_slots, those
    with a weight over 1 / (10 N); null_share, read weight of the null slot; mean_importance; rotation, slots
    replaced per segment / N.
    """
    slots = read.shape[1] - 1
    mean = read.mean(0)
    among = mean[:-1] / max(float(mean[:-1].sum()), 1e-30)
    entropy = -float(np.sum(among * np.log(np.maximum(among, 1e-30))))
    return {
        "utilisation": math.exp(entropy) / slots if mean[:-1].sum() > 0 else 0.0,
        "active_slots": float((mean[:-1] > 1 / (10 * slots)).sum()),
        "null_share": float(mean[-1]),
        "mean_importance": float(importance.mean()),
        "rotation": float(replaced.mean()) / slots,
    }


def alignment_statistics(read: np.ndarray, certainty: np.ndarray) -> dict[str, float]:
    """How well magnitude and phase of a state tell a teacher's certainty c (DESIGN section 3, Indra).

    Args:
      read: [T, 2] of T tokens, mean_j m_j / (1 + m_j) and |mean_j e^{i phi_j}|, each in [0, 1].
      certainty: [T] c = 1 - H / log V in [0, 1], H the entropy of the teacher's distribution.

    Returns, of each, r2 in (-inf, 1]: 1 - squared error / that of the best constant, so 0 says no more than a
    constant does; and entropy_rank in [-1, 1]: Spearman's correlation with H, -1 at best. What is not defined
    (of a teacher that is always as certain, of a state that is always the same) is left out.
    """
    from scipy.stats import spearmanr

    sure = certainty.astype(np.float64)
    spread = float(np.mean((sure - sure.mean()) ** 2))
    if not spread > 0.0:
        return {}
    found = {}
    for name, told in zip(("magnitude", "phase"), read.astype(np.float64).T, strict=True):
        found[f"{name}_r2"] = 1.0 - float(np.mean((told - sure) ** 2)) / spread
        if np.ptp(told) > 0.0:
            found[f"{name}_entropy_rank"] = float(spearmanr(told, -sure).statistic)
    return found


def exploration_share(sampled: np.ndarray, likeliest: np.ndarray) -> float:
    """Share of sampled tokens that are not the likeliest, in [0, 1]; NaN of none."""
    return float((np.asarray(sampled) != np.asarray(likeliest)).mean()) if len(sampled) else math.nan
