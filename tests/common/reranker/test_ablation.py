"""A grid's statistics: the same queries and seeds are compared, whatever else is finished."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import HEAD_PROJECTORS, RerankerConfig
from common.errors import UserError
from common.metrics.ranking import kendall_tau
from common.reranker.ablation import HEAD_VARIANTS, VARIANTS, grid, results


def outcome(*values: float, order: str = "abc", **changes: Any) -> dict[str, Any]:
    """A run of queries with these values, whose candidates it puts in this order."""
    rows = {f"q{place}": value for place, value in enumerate(values)}
    scores = {query: {p: float(-order.index(p)) for p in order} for query in rows}
    about = {"metric": "nDCG@10", "data": "d", "fingerprint": "f", "split": "test", "depth": 3}
    values_of = {"alone": rows, "fused": rows, "portable": rows}
    return about | {"first_stage": "rrf", "values": values_of, "scores": scores} | changes


def test_the_difference_is_over_the_seeds_that_both_have() -> None:
    outcomes = {
        "cartesian": {0: outcome(0.5, 0.5), 1: outcome(0.1, 0.1), 2: outcome(0.9, 0.9)},
        "polar": {0: outcome(0.6, 0.8, order="cba"), 2: outcome(1.0, 1.0)},
    }
    reference, polar = results(outcomes, "cartesian")
    assert reference.mean == pytest.approx(0.5) and reference.spread == pytest.approx(0.4)
    assert polar.mean == pytest.approx(0.85) and polar.difference == pytest.approx(0.15)
    assert polar.tau == pytest.approx(0.0)  # one seed reversed, one the same
    assert reference.tau == 1.0 and reference.p is None


def test_runs_of_different_data_are_not_compared() -> None:
    outcomes = {"a": {0: outcome(0.5)}, "b": {0: outcome(0.5, fingerprint="g")}}
    with pytest.raises(UserError, match="fingerprint is f and g"):
        results(outcomes, "a")


def test_kendall_tau_counts_the_pairs_in_the_same_order() -> None:
    a = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}, "flat": {"a": 1.0, "b": 1.0}, "one": {"a": 1.0}}
    b = {"q": {"a": 3.0, "b": 1.0, "c": 2.0, "x": 9.0}, "flat": {"a": 1.0, "b": 2.0}, "one": {"a": 1.0}}
    assert kendall_tau(a, b) == {"q": pytest.approx(1 / 3)}
    assert kendall_tau(a, a)["q"] == 1.0


def test_every_head_has_a_variant_and_every_variant_a_valid_run() -> None:
    jobs = grid([RerankerConfig()], (), tuple(VARIANTS), (0, 1))
    assert len(jobs) == 2 * len(VARIANTS) and len({(j.config.name, j.collection) for j in jobs}) == len(jobs)
    assert [job.seed for job in jobs] == [job.config.train.seed for job in jobs]
    heads = {(j.config.model.head, j.config.model.projector) for j in jobs if j.variant in HEAD_VARIANTS}
    assert {head for head, _ in heads} == set(HEAD_PROJECTORS)
