"""Whether a reranker knows when its top passage is relevant: what is counted, and how it is judged."""

from __future__ import annotations

import numpy as np
import pytest

from common.data.records import Qrels, Run
from common.metrics.calibration import Confidence, confidence_features, reliability
from common.reranker.confidence import FITTED, ConfidenceResult, confidence_results


def judged(seed: int, queries: int = 600) -> tuple[Run, Run, Qrels]:
    """Four candidates a query; the further the top score leads, the likelier it is relevant."""
    rng = np.random.default_rng(seed)
    score, resonance, qrels = Run(), Run(), Qrels()
    for query in (f"q{n}" for n in range(queries)):
        lead = rng.uniform(0.0, 4.0)
        score[query] = {"a": 0.0, "b": lead, "c": -1.0, "d": -2.0}
        resonance[query] = {p: float(rng.uniform(-1, 1)) for p in "abcd"}
        qrels[query] = {"b" if rng.random() < 1 - np.exp(-lead) else "a": 1}
    return score, resonance, qrels


def by_name(results: list[ConfidenceResult]) -> dict[str, ConfidenceResult]:
    return {result.what: result for result in results}


def test_a_fitted_confidence_is_better_calibrated_than_any_number_alone() -> None:
    score, resonance, qrels = judged(0)
    features = [confidence_features(list(score[q].values()), list(resonance[q].values())) for q in qrels]
    fitted = Confidence.fit(np.asarray(features), [qrels[q].get("b", 0) for q in qrels], 2)
    new = judged(1)
    results = by_name(confidence_results(*new, fitted))
    assert next(iter(results)) == FITTED
    alone = ("top score alone", "entropy alone", "margin alone", "resonance alone")
    assert set(results) == {FITTED, *alone}
    assert all(results[FITTED].ece < results[name].ece for name in alone)
    assert results[FITTED].auroc > results["resonance alone"].auroc + 0.1
    assert results["resonance alone"].auroc == pytest.approx(0.5, abs=0.08)
    assert min(results[name].auroc for name in ("top score alone", "entropy alone", "margin alone")) > 0.6
    assert results[FITTED].accuracy == pytest.approx(np.mean(["b" in grades for grades in new[2].values()]))
    for result in results.values():
        assert len(result.bins) == 15 and sum(count for _, _, count in result.bins) == 600
        assert all(0 <= p <= 1 and 0 <= share <= 1 for p, share, _ in result.bins)


def test_without_a_fit_the_numbers_alone_are_judged() -> None:
    assert FITTED not in by_name(confidence_results(*judged(2)))


def test_queries_without_candidates_do_not_count_and_grades_above_zero_do() -> None:
    score = {"q1": {"a": 1.0, "b": 2.0}, "q2": {}, "q3": {"a": 3.0}}
    resonance = {"q1": {"a": 0.5, "b": 0.25}, "q3": {"a": 1.0}}
    results = confidence_results(
        score, resonance, {"q1": {"b": 2}, "q2": {"a": 1}, "q3": {"a": 0}, "q4": {"a": 1}}
    )
    assert {(result.queries, result.accuracy) for result in results} == {(2, 0.5)}
    assert confidence_results({}, {}, {"q1": {"a": 1}}) == []


def test_one_kind_of_event_has_no_auroc() -> None:
    results = confidence_results({"q": {"a": 2.0}}, {"q": {"a": 0.5}}, {"q": {"a": 1}})
    assert {result.auroc for result in results} == {None}


def test_the_bins_of_reliability_hold_equally_many_queries_by_rising_confidence() -> None:
    p = np.array([0.9, 0.1, 0.2, 0.8, 0.3, 0.7])
    y = np.array([1, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(reliability(p, y, 3), [[0.15, 0.5, 2], [0.5, 0.0, 2], [0.85, 1.0, 2]])
    assert len(reliability(p, y, 15)) == 6
