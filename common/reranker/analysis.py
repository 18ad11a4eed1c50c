"""What a reranker does on a split: how its score, resonance, overlap and coherence tell relevant pairs from
others, whether its confidence is right, which queries are hardest. Plain JSON; analysis_view draws it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.backends import Scorer
from common.checkpoint import to_json
from common.data.records import Qrels, RankingData, Run, relevant_passages
from common.errors import UserError
from common.metrics.calibration import Confidence, auroc
from common.metrics.ranking import evaluate_run, mean, ranked
from common.reranker.analysis_view import analysis_figure, analysis_page
from common.reranker.confidence import confidence_results
from common.reranker.evaluation import score_pairs, write_bytes

QUANTITIES = ("score", "resonance", "overlap", "coherence")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 40
_SHOWN = 240  # characters of a passage


def analyse(
    scorer: Scorer,
    data: RankingData,
    split: str,
    candidates: Run,
    *,
    first_stage: str,
    depth: int,
    qrels: Qrels | None = None,
    confidence: Confidence | None = None,
    metric: str = "nDCG@10",
    hardest: int = 20,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Analyse a reranker over the `depth` best of each query's `candidates`, and the relevant passages.

    `qrels` are the split's when absent. Distributions and AUC are over all pairs; confidence and the hardest
    queries (lowest `metric`, of those with a relevant candidate) over the candidates alone. Raises UserError
    for an unknown split, and without a relevant and another pair.
    """
    qrels = data.split(split) if qrels is None else qrels
    stage = {query: ranked(candidates.get(query, {}), depth) for query in qrels}
    pairs = {
        query: list(dict.fromkeys((*stage[query], *relevant_passages(grades))))
        for query, grades in qrels.items()
    }
    relevant = np.asarray([qrels[q].get(p, 0) > 0 for q, passages in pairs.items() for p in passages], bool)
    if not relevant.any() or relevant.all():
        lacking = "relevant pair" if not relevant.any() else "pair that is not relevant"
        raise UserError(
            f"{data.name}, split {split!r}: none of {len(relevant):,} pairs of {len(qrels):,} queries is a "
            f"{lacking}, so there is nothing to tell apart. Choose another --split, more queries or a "
            "greater --depth."
        )
    scores = score_pairs(scorer, data, pairs, cache_dir)
    values = {
        name: np.asarray([scores[name][q][p] for q, passages in pairs.items() for p in passages])
        for name in QUANTITIES
    }
    reranked, resonance = (
        {query: {p: scores[name][query][p] for p in passages} for query, passages in stage.items()}
        for name in ("score", "resonance")
    )
    return {
        "model": scorer.name,
        "identity": scorer.identity,
        "data": data.name,
        "fingerprint": data.fingerprint,
        "split": split,
        "first_stage": first_stage,
        "depth": depth,
        "queries": len(qrels),
        "pairs": len(relevant),
        "relevant_pairs": int(relevant.sum()),
        "metric": metric,
        "value": mean(evaluate_run(reranked, qrels, (metric,))[metric]),
        "quantities": {name: _distribution(values[name], relevant) for name in QUANTITIES},
        "confidence": [
            asdict(result) for result in confidence_results(reranked, resonance, qrels, confidence)
        ],
        **_hardest(data, qrels, reranked, metric, hardest),
    }


def write_analysis(directory: str | Path, name: str, analysis: Mapping[str, Any]) -> list[Path]:
    """Write the `analysis_files` of a folder; UserError when that cannot be."""
    buffer = io.BytesIO()
    analysis_figure(analysis).savefig(buffer, format="png", dpi=150)
    contents = {
        "json": to_json(analysis),
        "png": buffer.getvalue(),
        "html": analysis_page(analysis).encode(),
    }
    files = analysis_files(directory, name)
    for ending, file in files.items():
        write_bytes(file, contents[ending])
    return list(files.values())


def analysis_files(directory: str | Path, name: str) -> dict[str, Path]:
    """Ending -> analysis-<name>.json, .png and .html of a folder."""
    return {ending: Path(directory) / f"analysis-{name}.{ending}" for ending in ("json", "png", "html")}


def _distribution(values: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
    """Both classes' moments, quantiles and histograms over common edges, and how well they are told apart."""
    edges = np.histogram_bin_edges(values, bins=_BINS)
    return {
        "auc": auroc(values, relevant),
        "edges": edges.tolist(),
        **{
            which: {
                "mean": float(part.mean()),
                "std": float(part.std()),
                "quantiles": dict(
                    zip(map(str, QUANTILES), np.quantile(part, QUANTILES).tolist(), strict=True)
                ),
                "histogram": np.histogram(part, bins=edges)[0].tolist(),
            }
            for which, part in (("relevant", values[relevant]), ("other", values[~relevant]))
        },
    }


def _hardest(
    data: RankingData, qrels: Qrels, reranked: Run, metric: str, number: int
) -> dict[str, list[dict[str, Any]] | int]:
    """The queries with the lowest metric, then the greatest lead of an irrelevant passage."""
    per_query = evaluate_run(reranked, qrels, (metric,))[metric]
    rows: list[dict[str, Any]] = []
    unreachable = 0
    for query, grades in qrels.items():
        order = ranked(reranked[query])
        places = [place for place, passage in enumerate(order, 1) if grades.get(passage, 0) > 0]
        if not places:
            unreachable += bool(relevant_passages(grades))
            continue
        top, best = order[0], order[places[0] - 1]
        rows.append(
            {
                "query_id": query,
                "query": data.queries[query],
                metric: per_query[query],
                "rank": places[0],  # of the first relevant passage
                "lead": reranked[query][top] - reranked[query][best],  # of the top score over its score
                "relevant": _excerpt(data.corpus[best]),
                "top": _excerpt(data.corpus[top]),
            }
        )
    rows.sort(key=lambda row: (row[metric], -row["lead"], row["query_id"]))
    return {"hardest": rows[:number], "without_relevant_candidate": unreachable}


def _excerpt(text: str) -> str:
    words: Sequence[str] = text.split()
    joined = " ".join(words)
    return joined if len(joined) <= _SHOWN else joined[:_SHOWN].rstrip() + " …"
