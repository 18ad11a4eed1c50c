"""Fusion: reciprocal ranks, z-scores and the choice of omega."""

import numpy as np
import pytest

from common.data.combined import source_of
from common.retrieval.fusion import choose_omega, fuse_runs, fuse_scores, rrf, standardised


def test_rrf_adds_reciprocal_ranks() -> None:
    fused = rrf([{"q": {"a": 9.0, "b": 8.0}}, {"q": {"b": 0.2, "c": 0.1}}], k=60)
    assert fused["q"] == pytest.approx({"b": 1 / 62 + 1 / 61, "a": 1 / 61, "c": 1 / 62})
    assert list(fused["q"]) == ["b", "a", "c"]


def test_rrf_keeps_queries_that_one_run_lacks_and_cuts_to_depth() -> None:
    fused = rrf([{"q": {"a": 1.0, "b": 0.5}}, {"q": {}, "other": {"c": 1.0}}], depth=1)
    assert list(fused["q"]) == ["a"] and list(fused["other"]) == ["c"]


def test_fusion_ignores_the_scale_of_either_side() -> None:
    first, rerank = np.array([3.0, 1.0, 2.0]), np.array([0.1, 0.2, 0.9])
    fused = fuse_scores(first, rerank, 0.5)
    np.testing.assert_allclose(fuse_scores(100 * first - 7, 1e-3 * rerank + 4, 0.5), fused, atol=1e-9)
    np.testing.assert_array_equal(np.argsort(fuse_scores(first, rerank, 0.0)), np.argsort(rerank))


def test_equal_scores_say_nothing() -> None:
    np.testing.assert_array_equal(standardised([5.0, 5.0, 5.0]), [0, 0, 0])
    np.testing.assert_array_equal(standardised([0.1 + 0.2, 0.3]), [0, 0])
    np.testing.assert_allclose(fuse_scores([1.0, 2.0], [7.0, 7.0], 1.0), [-1, 1])
    assert standardised([]).size == 0 and standardised([2.0]) == [0.0]


def test_omega_is_zero_unless_the_first_stage_helps() -> None:
    good, bad = {"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": 1.0, "b": 2.0}}
    qrels = {"q": {"a": 1}}
    omega, values = choose_omega(bad, good, qrels)
    assert omega == 0.0 and values[0.0] == 1.0 and values[2.0] < 1.0
    assert choose_omega(good, good, qrels)[0] == 0.0  # a tie keeps the reranker alone
    omega, values = choose_omega(good, bad, qrels, grid=(0.0, 0.5, 1.5, 2.0))
    assert omega == 1.5 and values[1.5] == 1.0
    with pytest.raises(ValueError, match="must contain 0"):
        choose_omega(good, bad, qrels, grid=(0.5, 1.0))


def test_fused_run_covers_the_reranked_candidates() -> None:
    fused = fuse_runs({"q": {"a": 1.0, "b": 2.0, "c": 0.0}}, {"q": {"a": 0.0, "b": 1.0}}, 1.0)
    assert fused == {"q": {"a": -2.0, "b": 2.0}}


def test_of_several_sources_the_weight_serves_the_worst_one() -> None:
    """The reranker is perfect on nine queries of `a` and reverses the only one of `b`, whose first stage is
    perfect: the mean is best without the first stage, and b would be worse for it."""
    good, bad = {"p": 3.0, "q": 2.0, "r": 1.0}, {"p": 1.0, "q": 2.0, "r": 3.0}
    queries = [*(f"a/{n}" for n in range(9)), "b/0"]
    first = {query: bad if query.startswith("a") else good for query in queries}
    rerank = {query: good if query.startswith("a") else bad for query in queries}
    qrels = {query: {"p": 1} for query in queries}
    grid = (0.0, 0.5, 1.5, 3.0)
    assert choose_omega(first, rerank, qrels, grid)[0] == 0.0
    omega, values = choose_omega(first, rerank, qrels, grid, source=source_of)
    assert omega == 1.5  # above 1, where b's first stage begins to win; a is then no better, and no worse
    assert values[omega] < values[0.0]
    same = {query: good for query in queries}
    assert choose_omega(first, same, qrels, source=source_of)[0] == 0.0  # nobody loses: alone
