"""Metrics of language models against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.metrics.language import (
    alignment_statistics,
    bleu,
    distinct_tokens,
    exploration_share,
    memory_statistics,
    perplexity,
    perplexity_ratio,
    repetition_rate,
    self_bleu,
    text_metrics,
    unknown_share,
)


def test_perplexity_by_token_word_and_byte() -> None:
    nll = np.array([10 * math.log(8), 20 * math.log(8)])
    found = perplexity(nll, np.array([10, 20]), np.array([5, 10]), np.array([30, 60]))
    assert found.token == pytest.approx(8) and found.word == pytest.approx(64)
    assert found.bits_per_byte == pytest.approx(1.0)  # 3 bits a token, 3 bytes a token
    assert found.token_se == pytest.approx(0, abs=1e-6)  # both documents say the same
    assert (found.tokens, found.words, found.bytes, found.documents) == (30, 15, 90, 2)


def test_a_ratio_of_perplexities_is_paired_over_documents() -> None:
    """Half a nat a word apart in every document, however hard it is: no doubt is left."""
    rng = np.random.default_rng(0)
    words = rng.integers(5, 50, 30)
    other = words * rng.normal(5, 2, 30)
    found = perplexity_ratio(other - 0.5 * words, other, words)
    assert all(value == pytest.approx(math.exp(-0.5)) for value in found.values())
    found = perplexity_ratio(other + rng.normal(0, 3, 30), other, words)
    assert found["low"] < 1 < found["high"] and found["low"] < found["ratio"] < found["high"]
    found = perplexity_ratio(other[:1] - 0.5 * words[:1], other[:1], words[:1])
    assert found["ratio"] == pytest.approx(math.exp(-0.5))
    assert math.isnan(found["low"]) and math.isnan(found["high"])


def test_the_error_is_that_of_whole_documents() -> None:
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = rng.integers(50, 150, 30)
        nll = tokens * rng.normal(3.0, 0.4, 30)  # each document has its own difficulty
        found = perplexity(nll, tokens, tokens, tokens)
        means.append(math.log(found.token))
        errors.append(found.token_se / found.token)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_one_document_has_no_error_and_nothing_has_no_perplexity() -> None:
    one = np.array([3.0])
    found = perplexity(one, one, one, one)
    assert math.isnan(found.token_se) and found.json()["token_se"] is None
    far = perplexity(np.array([800.0]), one, np.ones(1, int), one)
    assert far.word == math.inf and far.json()["word"] is None
    with pytest.raises(ValueError, match="a counted token"):
        perplexity(one, np.array([0]), one, one)
    with pytest.raises(ValueError, match="finite"):
        perplexity(np.array([math.nan]), one, one, one)


def test_alignment_is_measured_against_the_best_constant() -> None:
    sure = np.array([0.1, 0.3, 0.5, 0.9])
    read = np.stack([sure, 1.0 - sure], axis=-1)  # a magnitude that says it, a phase that says the contrary
    found = alignment_statistics(read, sure)
    assert found["magnitude_r2"] == pytest.approx(1.0) and found["magnitude_entropy_rank"] == -1.0
    assert found["phase_entropy_rank"] == 1.0 and found["phase_r2"] == pytest.approx(
        1.0 - np.mean((1.0 - 2.0 * sure) ** 2) / np.var(sure)
    )
    constant = np.full((4, 2), sure.mean())
    assert alignment_statistics(constant, sure) == pytest.approx({"magnitude_r2": 0.0, "phase_r2": 0.0})
    assert alignment_statistics(read, np.full(4, 0.5)) == {}  # nothing to be explained


def test_repetition_over_tokens_and_over_characters() -> None:
    ids = [1, 2, 1, 2, 1, 3]
    assert repetition_rate(ids, 1) == pytest.approx(1 - 3 / 6)
    assert repetition_rate(ids, 2) == pytest.approx(1 - 3 / 5)  # 12 21 13
    assert repetition_rate(ids, 3) == pytest.approx(1 - 3 / 4)  # 121 212 213
    assert repetition_rate("abab", 2) == pytest.approx(1 - 2 / 3)
    assert math.isnan(repetition_rate([1], 2))


def test_distinct_tokens_count_whole_windows() -> None:
    assert distinct_tokens([1, 1, 2, 3, 4, 4], window=3) == pytest.approx((2 + 2) / 2)
    assert distinct_tokens([1, 2, 3, 3], window=3) == 3
    assert math.isnan(distinct_tokens([1, 2], window=3))


def test_shares_of_unknown_and_of_explored_tokens() -> None:
    assert unknown_share([5, 7, 5, 9], [7, 9]) == 0.5
    assert unknown_share([5, 7], []) == 0
    assert exploration_share(np.array([1, 2, 3]), np.array([1, 2, 4])) == pytest.approx(1 / 3)


def test_a_samples_metrics_leave_out_what_is_too_short() -> None:
    found = text_metrics([[1, 1, 2], [1]], ["aab", "a"], [2])
    assert found["repetition_1"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["repetition_2"] == 0 and found["tokens"] == 2
    assert found["unknown_share"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["character_repetition_1"] == pytest.approx((1 / 3 + 0) / 2)
    assert math.isnan(found["distinct_per_100"])


def test_bleu_of_equal_and_of_half_equal_texts() -> None:
    same = bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert all(value == pytest.approx(100) for value in same.values())
    half = bleu(["a b c d"], ["a b x y"])
    assert half["bleu_1"] == pytest.approx(50)
    assert half["bleu_2"] == pytest.approx(100 * math.sqrt(0.5 * 1 / 3))
    short = bleu(["a b"], ["a b c d"])
    assert short["bleu_1"] == pytest.approx(100 * math.exp(1 - 4 / 2))  # the brevity penalty


def test_self_bleu_tells_alike_from_different() -> None:
    assert self_bleu(["the cat sat on the mat", "the cat sat on the mat"]) == pytest.approx(100)
    assert self_bleu(["a b c d e", "f g h i j"]) < 20
    assert math.isnan(self_bleu(["alone"]))


def test_memory_statistics_of_even_and_of_single_use() -> None:
    even = np.concatenate((np.full((3, 4), 0.2), np.full((3, 1), 0.2)), 1)
    found = memory_statistics(even, np.full((3, 4), 0.5), np.array([2, 1, 0]))
    assert found["utilisation"] == pytest.approx(1) and found["active_slots"] == 4
    assert found["null_share"] == pytest.approx(0.2) and found["mean_importance"] == 0.5
    assert found["rotation"] == pytest.approx(1 / 4)
    single = np.array([[0.9, 0.01, 0.0, 0.0, 0.09]])
    found = memory_statistics(single, np.zeros((1, 4)), np.array([0]))
    assert found["active_slots"] == 1 and 0.25 < found["utilisation"] < 0.28
    unread = np.array([[0.0, 0.0, 1.0]])
    assert memory_statistics(unread, np.zeros((1, 2)), np.array([0]))["utilisation"] == 0
