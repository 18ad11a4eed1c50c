"""Ranking metrics: values a user can check by hand."""

import math

import numpy as np
import pytest

from common.errors import UserError
from common.metrics.ranking import evaluate_run, mean, ranked


def test_metrics_of_a_hand_made_list() -> None:
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    qrels = {"q": {"b": 2, "c": 1, "a": 0}}
    values = evaluate_run(run, qrels, ("nDCG@10", "RR@10", "AP", "R@2", "Success@1"))
    ideal = 2 + 1 / math.log2(3)
    assert values["nDCG@10"]["q"] == pytest.approx((2 / math.log2(3) + 1 / 2) / ideal)
    assert values["RR@10"]["q"] == pytest.approx(0.5)
    assert values["AP"]["q"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert values["R@2"]["q"] == pytest.approx(0.5)
    assert values["Success@1"]["q"] == 0.0


def test_a_query_missing_from_the_run_counts_as_zero() -> None:
    values = evaluate_run({"q1": {"a": 1.0}}, {"q1": {"a": 1}, "q2": {"a": 1}}, ("nDCG@10", "RR@10"))
    assert values["nDCG@10"] == {"q1": 1.0, "q2": 0.0}
    assert mean(values["RR@10"]) == pytest.approx(0.5)
    assert evaluate_run({}, {"q": {"a": 1}}, ("AP",)) == {"AP": {"q": 0.0}}


def test_the_ideal_counts_judged_passages_outside_the_list() -> None:
    values = evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 1, "elsewhere": 1}}, ("nDCG@10",))
    assert values["nDCG@10"]["q"] == pytest.approx(1 / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize("metric", ["nDCG@1", "RR@10", "AP", "Success@1"])
def test_equal_scores_stand_in_the_order_of_passage_ids(metric: str) -> None:
    for scores in ({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}):
        assert ranked(scores) == ["a", "b"]
        assert evaluate_run({"q": scores}, {"q": {"a": 1}}, (metric,))[metric]["q"] == 1.0


def test_scores_closer_than_float32_are_still_told_apart() -> None:
    scores = {"a": 100.0, "b": 100.0 + 1e-9}
    assert evaluate_run({"q": scores}, {"q": {"b": 1}}, ("RR@10",))["RR@10"]["q"] == 1.0


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UserError, match="nDGC@10"):
        evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, ("nDGC@10",))


@pytest.mark.parametrize("metric", ["nDCG@0", "R@0", "R@99999999999"])
def test_a_cutoff_that_cannot_be_is_refused(metric: str) -> None:
    with pytest.raises(UserError, match=rf"metric '{metric}': the cutoff is \d+; allowed: .* >= 1"):
        evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, (metric,))


def test_nan_scores_are_refused() -> None:
    with pytest.raises(UserError, match="query q: the score of passage b is NaN"):
        evaluate_run({"q": {"a": 1.0, "b": float(np.nan)}}, {"q": {"a": 1}})
