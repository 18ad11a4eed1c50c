"""A checkpoint trained in one backend, evaluated in both: the same NDCG, the same order for each query."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.backends import load_scorer
from common.data.sources import load_ranking_data
from common.metrics.ranking import evaluate_run, mean, ranked
from common.reranker.evaluation import score_pairs
from common.reranker.prepare import candidates
from tests.parity.backends import check
from tests.tiny import World, train

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

GAP = 1e-4  # closer scores may change places: where they are equal, rounding decides
TOLERANCE = 1e-4


@pytest.mark.parametrize("trained", ["jax", "mlx"])
def test_a_checkpoint_ranks_alike_in_both_backends(world: World, tmp_path: Path, trained: str) -> None:
    config = world.config(evaluations=1, learning_rate=3e-3)
    config = replace(config, quantum=replace(config.quantum, mode="resonance"))
    train(config, tmp_path, backend=trained, say=lambda _: None)
    data = load_ranking_data(str(world.data))
    qrels = data.split("train")
    stage = candidates(data, "train", None, depth=10, cache=tmp_path)["bm25"]
    pairs = {query: ranked(run, 10) for query, run in stage.items()}
    means, scores = [], []
    for backend in ("jax", "mlx"):
        scorer = load_scorer(tmp_path / "tiny" / "final", backend, say=lambda _: None)
        run = score_pairs(scorer, data, pairs, tmp_path / "scores")["score"]
        means.append(mean(evaluate_run(run, qrels, ("nDCG@10",))["nDCG@10"]))
        scores.append(run)
    close = 0
    for query, passages in pairs.items():
        values = np.array([[run[query][passage] for passage in passages] for run in scores])
        check(f"checkpoint of {trained}, scores", "jax with mlx", *values, TOLERANCE)
        ordered = [ranked(run[query], len(passages)) for run in scores]
        gaps = -np.diff([scores[0][query][passage] for passage in ordered[0]])
        if gaps.min() < GAP:
            close += 1
        else:
            assert ordered[0] == ordered[1], query
    print(f"{close} of {len(pairs)} queries with scores closer than {GAP:g}")
    assert close < len(pairs) / 2
    check(f"checkpoint of {trained}, nDCG@10", "jax with mlx", *means, 5e-5)  # 4 decimals
    assert means[0] > 0.2
