"""Fusing rankings: reciprocal rank fusion (Cormack et al. 2009), and a reranker with its first stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.config import EvalConfig
from common.data.records import Qrels, Run
from common.metrics.ranking import evaluate_run, mean, ranked


def rrf(runs: Sequence[Run], k: float = 60.0, depth: int = 100) -> Run:
    """Reciprocal rank fusion: the sum over runs of 1/(k + rank), rank from 1; the `depth` best of a query."""
    fused: Run = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        scores: dict[str, float] = {}
        for run in runs:
            for rank, passage in enumerate(ranked(run.get(query, {})), start=1):
                scores[passage] = scores.get(passage, 0.0) + 1.0 / (k + rank)
        fused[query] = {passage: scores[passage] for passage in ranked(scores, depth)}
    return fused


def standardised(scores: ArrayLike) -> NDArray[np.float64]:
    """z-scores over one query's candidates [L]; equal scores give 0."""
    values = np.asarray(scores, np.float64)
    if values.size == 0:
        return values
    spread = float(values.std())
    if spread <= 1e-9 * max(1e-30, float(np.abs(values).max())):
        return np.zeros_like(values)
    return np.asarray((values - values.mean()) / spread)


def fuse_scores(first_stage: ArrayLike, rerank: ArrayLike, omega: float) -> NDArray[np.float64]:
    """z(rerank) + omega * z(first stage) over a query's candidates [L]; omega 0: the reranker's order."""
    return standardised(rerank) + omega * standardised(first_stage)


def fuse_runs(first_stage: Run, rerank: Run, omega: float) -> Run:
    """`fuse_scores` for every query of `rerank`; its candidates must all be in `first_stage` (KeyError)."""
    fused: Run = {}
    for query, scores in rerank.items():
        first = [first_stage[query][passage] for passage in scores]
        values = fuse_scores(first, list(scores.values()), omega)
        fused[query] = dict(zip(scores, map(float, values), strict=True))
    return fused


def choose_omega(
    first_stage: Run,
    rerank: Run,
    qrels: Qrels,
    grid: Sequence[float] = EvalConfig.fusion_grid,
    metric: str = "nDCG@10",
    source: Callable[[str], str] = lambda query: "",
) -> tuple[float, dict[float, float]]:
    """The omega of `grid` with the best mean metric on these (dev) queries, and the metric of each.

    Where queries are of several sources, the omega whose worst source gains most over its first stage: one
    weight serves them all, and the mean may hide that a search was made worse. Equal values go to the
    smallest omega. Raises ValueError when the grid lacks 0: a reranker alone must be among the choices.
    """
    if 0.0 not in grid:
        raise ValueError(f"the grid {tuple(grid)} must contain 0")
    before = evaluate_run(first_stage, qrels, (metric,))[metric]
    groups: dict[str, list[str]] = {}
    for query in before:
        groups.setdefault(source(query), []).append(query)
    found, worst = dict[float, float](), dict[float, float]()
    for omega in sorted(grid):
        values = evaluate_run(fuse_runs(first_stage, rerank, omega), qrels, (metric,))[metric]
        found[omega] = mean(values)
        gains = [mean({query: values[query] - before[query] for query in group}) for group in groups.values()]
        worst[omega] = min(gains) if len(gains) > 1 else found[omega]
    return max(found, key=lambda omega: (worst[omega], -omega)), found
