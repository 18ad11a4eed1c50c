"""The complete workflow: train, mine what the model gets wrong, retrain on it, analyze, rerank.

    python examples/complete_workflow.py [--quick] [--data my_pairs.jsonl]

Data: pydocs, or yours. Time on 2 CPU cores: not measured yet.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from common.backends import load_encoder, load_scorer
from common.config import RunOptions, load_recipe
from common.data.negatives import MiningRules
from common.data.sources import load_ranking_data
from common.errors import run_command
from common.reranker.analysis import analyse, write_analysis
from common.reranker.mining import mine_negatives, with_negatives
from common.reranker.prepare import candidates
from common.reranker.reranking import Ranking, load_confidence, rerank, shown
from common.reranker.workflow import cut_short, train_recipe

CONFIGS = Path(__file__).parents[1] / "configs"


def main(
    data: str = "pydocs", base: str = "default", runs: Path = Path("runs"), quick: bool = False
) -> Ranking:
    """Everything from `base` and `data` to the answer to one query."""
    documents, encoder, depth = load_ranking_data(data), load_encoder(base), 5 if quick else 20
    first = load_recipe(str(CONFIGS / "quantum_resonance.py"))
    first = first.changed(name="example_first", model={"base": base}, data={"name": data, "encoder": base})
    first = cut_short(first) if quick else first
    trained = train_recipe(first, RunOptions(runs=runs, evaluate_test=False))

    rules = MiningRules(count=5, last_rank=depth, relative_margin=None)  # what ranks high and is not relevant
    ranker = load_scorer(trained.best)
    mined, _ = mine_negatives(documents, rules=rules, by="cross-encoder", encoder=encoder, scorer=ranker)

    second = load_recipe(str(CONFIGS / "quantum_retrain.py"))  # held back by what the first model knew
    second = second.changed(name="example_second", model={"base": str(trained.best)})
    second = second.changed(data={"name": data, "encoder": base, "negatives": "given"})
    second = cut_short(second) if quick else second
    retrained = train_recipe(second, RunOptions(runs=runs), with_negatives(documents, mined))

    scorer = load_scorer(retrained.best)
    stage = candidates(documents, "test", encoder)["rrf"]
    report = analyse(scorer, documents, "test", stage, first_stage="rrf", depth=depth)
    print(*write_analysis(retrained.folder, "test", report), sep="\n")

    query = next(query for query in sorted(stage) if stage[query])
    passages = {passage: documents.corpus[passage] for passage in list(stage[query])[:depth]}
    print(f"query: {documents.queries[query]}")
    return rerank(scorer, documents.queries[query], passages, load_confidence(retrained.best))


if __name__ == "__main__":
    run_command(lambda: print(shown(tyro.cli(main, description=__doc__), top=5)))
