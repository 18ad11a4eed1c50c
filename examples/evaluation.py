"""Evaluation: a checkpoint beside BM25, dense retrieval and their fusion, with intervals and paired tests.

    python examples/evaluation.py --model runs/example_basic/best [--quick] [--data my_pairs.jsonl]

After examples/basic_training.py. Without --model: the untrained base. Time on 2 CPU cores: not measured yet.
"""

from __future__ import annotations

import tyro

from common.backends import load_encoder, load_scorer
from common.data.sources import load_ranking_data
from common.errors import run_command
from common.reranker.evaluation import Table, chosen_qrels, evaluate
from common.reranker.prepare import cache_root, candidates
from common.reranker.reranking import load_confidences


def main(model: str = "default", data: str = "pydocs", base: str = "default", quick: bool = False) -> Table:
    """Evaluate `model` on the test split; `base` is the encoder of dense retrieval."""
    depth = 5 if quick else 30
    documents, encoder = load_ranking_data(data), load_encoder(base)
    stages = candidates(documents, "test", encoder, depth=depth)  # "bm25", "dense", "rrf": query -> passages
    scorers = [load_scorer(model)]
    table = evaluate(
        documents,
        "test",
        stages,
        scorers,
        depth=depth,
        pools=("bm25", "rrf"),  # whose candidates are reranked
        metrics=("nDCG@10", "RR@10", "R@5"),
        qrels=chosen_qrels(documents, "test", max_queries=20 if quick else None),
        confidences=load_confidences([model], scorers),
        cache_dir=cache_root(),  # pairs are scored once
    )
    best = max((row for row in table.rows if row.model), key=lambda row: row.means["nDCG@10"])
    gain = best.versus_first["nDCG@10"]
    print(f"best: {best.label()}: {gain.difference:+.3f} over its first stage, p = {gain.p:.4f}")
    return table


if __name__ == "__main__":
    run_command(lambda: print(tyro.cli(main, description=__doc__).text()))
