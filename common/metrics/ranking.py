"""Ranking metrics by query, computed by ir-measures (trec_eval's definitions)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.data.records import Qrels, Run
from common.errors import UserError

DEFAULT_METRICS = ("nDCG@10", "RR@10", "AP", "Success@10", "R@50")  # Success: the hit rate


def ranked(scores: Mapping[str, float], depth: int | None = None) -> list[str]:
    """Passage ids by falling score, ties by id, the first `depth` of them."""
    return sorted(scores, key=lambda passage: (-scores[passage], passage))[:depth]


def evaluate_run(
    run: Run, qrels: Qrels, metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, dict[str, float]]:
    """Metric name -> query id -> value in [0, 1], for every query of `qrels`.

    A query that is missing from the run counts as 0. The ideal DCG comes from the whole of `qrels`, gains are
    the grades (linear). Metric names are those of ir-measures: nDCG@10, RR@10, AP, R@50, Success@1,
    AP(rel=2)... Raises UserError for a name that it does not know, a cutoff below 1 and scores that are not
    numbers.
    """
    import ir_measures

    measures = {name: _measure(name) for name in metrics}
    positions = {query: _positions(query, run[query]) for query in qrels if run.get(query)}
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    names = {measure: name for name, measure in measures.items()}
    if positions:
        for metric in ir_measures.iter_calc(list(names), qrels, positions):
            values[names[metric.measure]][metric.query_id] = float(metric.value)
    return values


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise the UserError of a name that `evaluate_run` does not know, before any work."""
    for name in metrics:
        _measure(name)


def kendall_tau(a: Run, b: Run) -> dict[str, float]:
    """Query -> Kendall's tau-b in [-1, 1] between the scores of two runs, over the passages that both have.

    A query with fewer than two of them, or whose scores are all equal in a run, has none and is left out.
    """
    from scipy.stats import kendalltau

    found = {}
    for query in a.keys() & b.keys():
        shared = sorted(a[query].keys() & b[query].keys())
        ours, theirs = ([run[query][passage] for passage in shared] for run in (a, b))
        if len(set(ours)) > 1 and len(set(theirs)) > 1:
            found[query] = float(kendalltau(ours, theirs).statistic)
    return dict(sorted(found.items()))


def mean(values: Mapping[str, float]) -> float:
    """Mean over queries; NaN without any."""
    return sum(values.values()) / len(values) if values else float("nan")


def _measure(name: str):  # type: ignore[no-untyped-def]  # ir-measures has no types
    import ir_measures

    try:
        measure = ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError, KeyError, TypeError) as error:
        raise UserError(
            f"unknown metric {name!r}; use an ir-measures name: nDCG@10, RR@10, AP, R@50, Success@1"
        ) from error
    cutoff = measure.params.get("cutoff", 1)
    if not 1 <= cutoff < 2**31:  # trec_eval's C code would end the process
        raise UserError(f"metric {name!r}: the cutoff is {cutoff}; allowed: a whole number >= 1, below 2^31")
    return measure


def _positions(query: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores replaced by falling positions, so that every provider breaks ties as `ranked` does."""
    broken = [passage for passage, score in scores.items() if score != score]
    if broken:
        raise UserError(
            f"query {query}: the score of passage {broken[0]} is NaN ({len(broken)} of {len(scores)})"
        )
    return {passage: float(len(scores) - place) for place, passage in enumerate(ranked(scores))}
