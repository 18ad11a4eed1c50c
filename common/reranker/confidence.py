"""How well a reranker knows that its top passage is relevant: calibration error, AUROC and reliability.

The confidence fitted on dev beside what a single number says alone, each read as a probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.data.records import Qrels, Run
from common.metrics.calibration import (
    Confidence,
    auroc,
    confidence_features,
    expected_calibration_error,
    reliability,
)
from common.metrics.ranking import ranked

FITTED = "fitted on dev"
BINS = 15


@dataclass(frozen=True)
class ConfidenceResult:
    """Of the event that the top passage is relevant, over the queries that have candidates."""

    what: str  # FITTED, or the number that stands alone
    queries: int
    accuracy: float  # share of the queries whose top passage is relevant, in [0, 1]
    ece: float  # expected calibration error in [0, 1], over BINS bins of equally many queries
    auroc: float | None  # None when all top passages are relevant, or none is
    bins: list[list[float]]  # (mean confidence, accuracy, queries), by rising confidence


def confidence_results(
    score: Run, resonance: Run, qrels: Qrels, fitted: Confidence | None = None
) -> list[ConfidenceResult]:
    """The results of one reranker's full scores and resonances (query -> passage -> value); the fitted
    confidence comes first, where there is one. Empty without a query that has candidates.

    Alone stand: the top score, as sigmoid(s); 1 - the normalised entropy of softmax(s); the margin of its
    two highest; the resonance of the top passage, cut at 0.
    """
    top, features, correct = _tops(score, resonance, qrels)
    if not len(correct):
        return []
    entropy, margin, r = features.T
    claims = {}
    if fitted is not None:
        claims[FITTED] = fitted.predict(_tops(score, resonance, qrels, fitted.candidates)[1])
    claims |= {
        "top score alone": 0.5 * (1.0 + np.tanh(0.5 * top)),
        "entropy alone": 1.0 - entropy,
        "margin alone": margin,
        "resonance alone": np.maximum(r, 0.0),
    }
    return [_result(what, claim, correct) for what, claim in claims.items()]


def _tops(
    score: Mapping[str, Mapping[str, float]],
    resonance: Mapping[str, Mapping[str, float]],
    qrels: Qrels,
    best: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each query with candidates: the top score [N], its features [N, 3] (of its
    `best` candidates, all when absent), whether its top is relevant [N]."""
    top: list[float] = []
    features: list[np.ndarray] = []
    correct: list[bool] = []
    for query, grades in qrels.items():
        if passages := score.get(query):
            first = ranked(passages, 1)[0]
            names: Sequence[str] = [first, *(name for name in passages if name != first)]
            features.append(
                confidence_features(
                    [passages[n] for n in names], [resonance[query][n] for n in names], best=best
                )
            )
            top.append(passages[first])
            correct.append(grades.get(first, 0) > 0)
    return np.asarray(top), np.asarray(features), np.asarray(correct)


def _result(what: str, claim: np.ndarray, correct: np.ndarray) -> ConfidenceResult:
    told_apart = auroc(claim, correct)
    return ConfidenceResult(
        what=what,
        queries=len(correct),
        accuracy=float(correct.mean()),
        ece=expected_calibration_error(claim, correct, BINS),
        auroc=None if np.isnan(told_apart) else told_apart,
        bins=reliability(claim, correct, BINS).tolist(),
    )
